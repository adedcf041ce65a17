"""Rows of zeros: normalised they stay zeros, of similarity 0 and a squared distance of 1 to all
unit vectors, and their gradient is that of a row divided by 1e-12, as F.normalize has it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loss_calls import FIRST, by_rows, dense, inputs, ours, with_backends
from oracles import BACKENDS, DOUBLE, randn, value_and_gradients

import contrastive_kernels as ck
from contrastive_kernels.losses.table import CASES

DISTANCES = [name for name, (row, _) in CASES.items() if row.takes("t_neg")]
OTHERS = ["info_nce", "nt_xent", "sup_con", "clip_loss", "gist"]
parametrize_backends = pytest.mark.parametrize("backend", BACKENDS)


def with_zeros(name: str, dtype: torch.dtype = DOUBLE) -> list:
    given = inputs(name, dtype)
    with torch.no_grad():
        for i, t in enumerate(given):
            if t.is_floating_point() and t.dim() > 1:
                t.view(-1, t.shape[-1])[i + 1 :: 4] = 0.0
    return given


def assert_equal(ours: list, theirs: list, given: list) -> None:
    learned = [None, *(t for t in given if t.requires_grad)]
    for a, b, t in zip(ours, theirs, learned, strict=True):
        if t is not None and t.dim() > 1:
            unit = torch.where((t == 0).all(-1, keepdim=True), 1e-12, 1.0)
            a, b = a * unit, b * unit
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@with_backends([*DISTANCES, *OTHERS], interpreted=["cacr", "cacr rbf negatives", "info_nce"])
def test_as_the_definition(name, backend):
    given = with_zeros(name)
    results = (value_and_gradients(f, given) for f in (ours(name, backend=backend), dense(name)))
    assert_equal(*results, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@with_backends(FIRST.values(), interpreted=["info_nce", "hcl"])
def test_what_float16_has_no_number_for(name, backend, dtype):
    """A gradient divided by 1e-12 is beyond its range, and so may rounding be where it is zero:
    of these rows alone."""
    given = with_zeros(name, dtype)
    value, *gradients = value_and_gradients(
        ours(name, backend=backend, reduction=by_rows(name)), given
    )
    assert value.isfinite().all()
    for t, gradient in zip((t for t in given if t.requires_grad), gradients, strict=True):
        zeros = (t == 0).all(-1) if t.dim() > 1 and dtype == torch.float16 else t != t
        assert gradient[~zeros].isfinite().all()


def by_cdist(query, positives, negatives):
    query, positives, negatives = (F.normalize(t, dim=-1) for t in (query, positives, negatives))
    near, far = ((query[:, None] - t).square().sum(-1) for t in (positives, negatives))
    rows = (near.softmax(1) * near).sum(1) - ((-2.0 * far).softmax(1) * far).sum(1)
    return rows.mean()


@parametrize_backends
@pytest.mark.parametrize("zeros", [(0,), (1,), (2,), (0, 1, 2)])
def test_what_a_user_computes(backend, zeros):
    given = [randn(9, 5, seed=1), randn(9, 2, 5, seed=2), randn(7, 5, seed=3)]
    for i in zeros:
        given[i][1::3] = 0.0
    given = [t.requires_grad_() for t in given]
    results = (
        value_and_gradients(f, given)
        for f in (lambda q, p, n: ck.cacr(q, p, negatives=n, backend=backend), by_cdist)
    )
    assert_equal(*results, given)


@parametrize_backends
@pytest.mark.parametrize("given", ["batch", "negatives", "chunks"])
def test_statistics(backend, given):
    query, key, more = (randn(n, 5, seed=n) for n in (7, 8, 11))
    key = key[:7]
    query[2], key[4], key[5], more[3] = 0.0, 0.0, 0.0, 0.0
    negatives = {"batch": None, "negatives": more, "chunks": more.split(4)}[given]
    _, stats = ck.cacr(query, key, negatives=negatives, backend=backend, return_stats=True)
    unit = [F.normalize(t, dim=-1) for t in (query, key, key if negatives is None else more)]
    similarity = unit[0] @ unit[2].T
    kept = torch.ones_like(similarity, dtype=torch.bool)
    if negatives is None:
        kept.fill_diagonal_(False)
    torch.testing.assert_close(stats.negative_similarity, similarity[kept].mean())
    distance = torch.cdist(unit[0], unit[2]).square()
    positive = (unit[0] - unit[1]).square().sum(1, keepdim=True)
    assert torch.equal(stats.rank, ((distance < positive - 1e-9) & kept).sum(1))
