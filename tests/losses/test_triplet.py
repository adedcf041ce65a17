"""triplet against its definition, in ties, in several blocks, and where labels are alone."""

from __future__ import annotations

import pytest
import torch
from oracles import BACKENDS, assert_equal_in_double, randn, value_and_gradients

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.losses import algebra

parametrize_mining = pytest.mark.parametrize("mining", ["hard", "semihard"])
LABELS = torch.tensor([0, 1, 0, 2, 0, 1, 3, 2, 2, 0, 1, 1, 0, 2])


def both(labels, backend, **options):
    return (
        lambda x: ck.triplet(x, labels, backend=backend, **options),
        lambda x: reference.triplet(x, labels, **options),
    )


@parametrize_mining
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
# 200: 3 rows of semi-hard ones, 40: 8 of hard ones; the last block is smaller
@pytest.mark.parametrize("block", [2**20, 200, 40])
def test_definition(mining, backend, distance, block, monkeypatch):
    monkeypatch.setattr(algebra, "BLOCK_PAIRS", block)
    x = randn(14, 5, seed=3)
    x[9] = x[2] = x[4]  # of one label
    x[3] = x[1] = x[8]  # of two
    for reduction in ("mean", "none"):
        for margin in (0.2, 3.0):
            options = {
                "mining": mining, "distance": distance, "margin": margin, "reduction": reduction,
            }  # fmt: skip
            assert_equal_in_double(*both(LABELS, backend, **options), [x.clone()])


@parametrize_mining
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 1]], ids=str)
def test_labels_without_a_triplet(mining, labels):
    labels, x = torch.tensor(labels), randn(4, 3)
    for margin in (9.0, None) if mining == "hard" else (9.0,):
        options = {"mining": mining, "margin": margin, "reduction": "none"}
        value, gradient = value_and_gradients(both(labels, "auto", **options)[0], [x])
        there = torch.tensor([labels.tolist().count(each) > 1 for each in labels.tolist()])
        there &= labels.unique().numel() > 1
        assert torch.equal(value > 0, there)
        assert gradient.isfinite().all()
        assert (gradient.abs().sum() > 0) == there.any()


@parametrize_mining
def test_far_from_the_origin(mining):
    """Distances are not what is left of squares."""
    x = randn(30, 8, seed=2).float()
    labels = torch.arange(30) % 5
    options = {"mining": mining, "margin": 1.0, "normalize": False, "reduction": "none"}
    ours, definition = both(labels, "auto", **options)
    moved = x + 1000.0
    torch.testing.assert_close(
        ours(moved).double(), definition(moved.double()), rtol=1e-6, atol=1e-6
    )


def test_semi_hard_of_all_triples():
    x = randn(14, 4, seed=5)
    d = torch.cdist(x, x)
    i, p, n = torch.meshgrid(*3 * [torch.arange(14)], indexing="ij")
    pairs = (LABELS[i] == LABELS[p]) & (i != p)
    valid = pairs & (LABELS[i] != LABELS[n])
    far = torch.where(valid & (d[i, n] > d[i, p]), d[i, n], torch.inf).amin(2)
    last = torch.where(valid, d[i, n], -torch.inf).amax(2)
    chosen = torch.where(far < torch.inf, far, last)
    loss = (d - chosen + 0.5).relu()[pairs.any(2)].mean()
    found = ck.triplet(x, LABELS, mining="semihard", margin=0.5, normalize=False)
    torch.testing.assert_close(found, loss)


def test_operators():
    x, y = randn(5, 3).requires_grad_(), randn(9, 3, seed=1).requires_grad_()
    labels = torch.arange(9) % 3
    for of_x, keys, first in ((labels[2:7], y, 2), (labels[:5], None, 0)):
        every = labels[:5] if keys is None else labels
        arguments = (x, keys, of_x, every, first, 0.3, "euclidean", True)
        torch.library.opcheck(
            torch.ops.contrastive_kernels.semi_hard.default, arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip
