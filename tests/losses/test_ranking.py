"""mnrl against its definition, pair by pair: every set of directions, partition and hardness."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    BACKENDS,
    DOUBLE,
    assert_equal_in_double,
    assert_within_budget,
    randn,
    sample,
    value_and_gradients,
)
from torch import Tensor

from contrastive_kernels import info_nce
from contrastive_kernels.losses.mnrl import DIRECTIONS, HARDNESS, mnrl
from contrastive_kernels.reference import mnrl as definition

ALL = DIRECTIONS
SETS = [
    ("query_to_doc", *more) for count in range(4) for more in combinations(DIRECTIONS[1:], count)
]
MODES = [
    (directions, partition, hardness)
    for directions in SETS
    for partition in ("joint", "per_direction")
    for hardness in (None, *HARDNESS)
    if partition == "joint" or not {"query_to_query", "doc_to_doc"} & set(directions)
]


def features(n: int, blocks: int, dim: int, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """Queries (n, dim), and documents that look like them."""
    query = randn(n, dim, seed=1) + randn(dim, seed=5)
    documents = query.repeat(blocks, 1) + randn(n * blocks, dim, seed=2)
    return [query.to(dtype), documents.to(dtype)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 3, 4), (2, 1, 1), (5, 2, 3), (13, 4, 7)], ids=str)
def test_definition(shape, backend):
    seed = sum(shape)
    for directions, partition, hardness in sample(backend, MODES, seed, every=20):
        options = {
            "directions": directions, "partition_mode": partition, "hardness_mode": hardness,
            "hardness_strength": 5.0, "reduction": "none",
        }  # fmt: skip
        assert_equal_in_double(
            partial(mnrl, **options, backend=backend), partial(definition, **options),
            features(*shape),
        )  # fmt: skip


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("hardness", [None, *HARDNESS])
def test_error_budget(dtype, scale, hardness, backend):
    options = {
        "directions": ALL, "scale": scale, "hardness_mode": hardness, "hardness_strength": 9.0,
        "reduction": "none",
    }  # fmt: skip
    fused = partial(mnrl, **options, backend=backend)
    assert_within_budget(fused, partial(definition, **options), features(37, 2, 16, dtype))


@pytest.mark.parametrize("hardness", [None, *HARDNESS])
def test_a_learned_scale_and_no_normalization(hardness):
    options = {
        "directions": ALL, "hardness_mode": hardness, "hardness_strength": 2.0, "normalize": False,
    }  # fmt: skip
    query, documents = features(11, 3, 5)
    assert_equal_in_double(
        lambda q, d, s: mnrl(q, d, scale=s, **options),
        lambda q, d, s: definition(q, d, scale=s, **options),
        [query, documents, torch.tensor(1.5, dtype=DOUBLE)],
    )


def test_documents_as_a_sequence_and_reductions():
    query, documents = features(7, 3, 5)
    for reduction in ("mean", "sum", "none"):
        options = {"directions": ALL, "reduction": reduction}
        assert_equal_in_double(
            lambda q, a, b, c, options=options: mnrl(q, [a, b, c], **options),
            lambda q, a, b, c, options=options: definition(q, torch.cat((a, b, c)), **options),
            [query, *documents.split(7)],
        )


def test_one_pair_has_no_loss_and_no_gradient():
    for directions, partition, _ in MODES:
        value, *gradients = value_and_gradients(
            partial(mnrl, directions=directions, partition_mode=partition), features(1, 1, 4)
        )
        twice = partition == "joint" and "doc_to_query" in directions
        torch.testing.assert_close(value, torch.tensor(2.0 if twice else 1.0, dtype=DOUBLE).log())
        assert all(g.abs().max() < 1e-12 for g in gradients)


def test_converged_loss_keeps_its_digits():
    """log(1 + x) of the negatives' share x, where log(exp(z_i+) + ..) - z_i+ would be 0."""
    query = torch.eye(4, 8)
    loss = mnrl(query, torch.cat((query, -query)), scale=30.0, reduction="none")
    expected = 6 * torch.tensor(-30.0, dtype=DOUBLE).exp().expand(4)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)


def test_frozen_documents_get_no_gradient():
    query, documents = (t.float() for t in features(9, 2, 5))
    query.requires_grad_()
    mnrl(query, documents, hardness_mode="all_negatives", hardness_strength=3.0).backward()
    assert documents.grad is None and query.grad.abs().max() > 0


def test_statistics():
    query, documents = features(13, 3, 6)
    z = F.normalize(query, dim=1) @ F.normalize(documents, dim=1).T
    pos = z[:, :13].diagonal()
    above = z > pos[:, None]
    for hardness in (None, "in_batch_negatives"):
        loss, stats = mnrl(
            query, documents, hardness_mode=hardness, hardness_strength=4.0, return_stats=True,
            reduction="none",
        )  # fmt: skip
        assert torch.equal(stats.rank, above.sum(1))
        torch.testing.assert_close(stats.accuracy, (above.sum(1) == 0).double().mean())
        torch.testing.assert_close(stats.positive_similarity, pos.mean())
        negative = (z.sum() - pos.sum()) / (z.numel() - 13)
        torch.testing.assert_close(stats.negative_similarity, negative)
        torch.testing.assert_close(stats.lse, loss + 20 * pos)
        assert (stats.mi_lower_bound is None) == (hardness is not None)


def test_statistics_are_those_of_info_nce():
    query, documents = features(13, 3, 6)
    loss, stats = mnrl(query, documents, return_stats=True)
    expected, more = info_nce(
        query, documents[:13], negatives=documents[13:], in_batch=True, scale=20.0,
        return_stats=True,
    )  # fmt: skip
    torch.testing.assert_close((loss, *stats), (expected, *more))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be a finite number > 0, got 0.0"),
        ({"scale": torch.ones(2)}, r"scale must be .*one element, got shape \(2,\)"),
        ({"directions": ("doc_to_doc",)}, "directions must have query_to_doc among them"),
        ({"directions": ()}, "directions must have query_to_doc among them"),
        ({"directions": ("query_to_doc", "up")}, "directions must be some of query_to_doc, .*'up'"),
        ({"directions": "query_to_doc"}, "directions must be some of .*got 'query_to_doc'"),
        ({"partition_mode": "both"}, "partition_mode must be one of joint, .*got 'both'"),
        (
            {"directions": ALL, "partition_mode": "per_direction"},
            "partition_mode must be 'joint' with query_to_query or doc_to_doc",
        ),
        ({"hardness_mode": "all"}, "hardness_mode must be one of in_batch_negatives, .*got 'all'"),
        ({"hardness_strength": -1.0}, "hardness_strength must be a finite number >= 0, got -1.0"),
        ({"reduction": "average"}, 'reduction must be "mean", "sum" or "none"'),
        ({"backend": "fast"}, "backend must be .* got 'fast'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        mnrl(torch.ones(4, 3), torch.ones(8, 3), **options)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (torch.ones(6, 3), "documents must have a multiple of the 4 rows of query, got 6"),
        (torch.ones(8, 2), "query and documents must have the same number of features D"),
        (torch.ones(4, 2, 3), r"documents must have shape \(N, D\), got \(4, 2, 3\)"),
        (torch.ones(0, 3), "documents must not be empty"),
        ([], "documents must have at least one tensor, got an empty sequence"),
        ([torch.ones(4, 3), torch.ones(5, 3)], r"query and documents\[1\] .*rows, got 4 and 5"),
    ],
)
def test_bad_documents(documents, message):
    with pytest.raises(ValueError, match=message):
        mnrl(torch.ones(4, 3), documents)
