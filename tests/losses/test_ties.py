"""Ranks of positives among negatives that equal them, nearly equal them, or are NaN."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from loss_calls import inputs, ours, with_backends
from oracles import BACKENDS, DOUBLE, randn
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels.losses.table import CASES

DTYPES = (DOUBLE, torch.float32, torch.bfloat16, torch.float16)
NOT_RANKED = ("clip_distill", "gist", "intl", "sup_con", "w_mse")
RANKED = [
    name
    for name, (row, _) in CASES.items()
    if row.takes("return_stats") and row.name not in NOT_RANKED
]
# kernels that are interpreted are slow
FEW = ("info_nce", "siglip_loss", "nt_xent", "mnrl", "cacr", "cpc")
with_ranked_backends = with_backends(RANKED, interpreted=FEW)


def features(name: str, make) -> list[Tensor]:
    """The inputs of a case with other features; entries of a vector, such as a bias, are 0."""

    def replaced(t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.dim() == 0:
            return t.detach()
        return make(t.detach()) if t.dim() > 1 else torch.zeros_like(t)

    return [replaced(t) for t in inputs(name)]


def rank_of(stats: ck.LossStats) -> Tensor | None:
    return None if stats.rank is None else stats.rank.long()


@with_ranked_backends
def test_collapsed_features_are_ties_and_nan_is_never_right(name, backend):
    dtypes = DTYPES if backend != "triton" else (torch.bfloat16,)
    rows = (
        torch.zeros(16),
        torch.full((16,), 0.3),
        randn(16, seed=1),
        torch.full((16,), torch.nan),
    )
    for dtype, row in product(dtypes, rows if backend != "triton" else rows[2:]):
        given = features(name, lambda t, row=row: row[: t.shape[-1]].to(t).expand_as(t))
        given = [t.to(dtype) if t.is_floating_point() else t for t in given]
        _, stats = ours(name, backend=backend, return_stats=True)(*given)
        if stats.accuracy is not None:  # of one positive
            assert stats.accuracy == (0 if row.isnan().any() else 1), (dtype, row)
        if stats.rank is not None and not row.isnan().any():
            assert not stats.rank.any(), (dtype, row)


@with_ranked_backends
def test_samples_that_come_twice_rank_alike_everywhere(name, backend):
    """As in the reference, in float64, of the same rounded features."""

    def twice(t: Tensor) -> Tensor:
        half = len(t) // 2
        return t.index_copy(0, torch.arange(half), t[len(t) - half :])

    for dtype in DTYPES if backend != "triton" else (torch.float32,):
        given = features(name, lambda t, dtype=dtype: twice(t).to(dtype).double())
        call = {"return_stats": True}
        _, wanted = ours(name, backend="reference", **call)(*given)
        given = [t.to(dtype) if t.is_floating_point() else t for t in given]
        _, stats = ours(name, backend=backend, **call)(*given)
        if wanted.rank is not None:
            assert torch.equal(rank_of(stats), rank_of(wanted)), dtype
        if wanted.accuracy is not None:
            torch.testing.assert_close(stats.accuracy.double(), wanted.accuracy.double())


def ranks_by_definition(query: Tensor, keys: Tensor, same: Tensor) -> Tensor:
    """Among keys of which `same` ones equal the positive, the key of the row itself."""
    z = F.normalize(query.double()) @ F.normalize(keys.double()).T
    return ((z > z.diagonal()[:, None]) & ~same).sum(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_the_same_key_twice(backend, temperature):
    key = randn(9, 16, seed=1)
    query = torch.cat((key, key)) + 2 * randn(18, 16, seed=2)
    key = torch.cat((key, key))
    same = torch.eye(9, dtype=torch.bool).repeat(2, 2)
    for dtype in DTYPES:
        q, k = query.to(dtype), key.to(dtype)
        rank = ranks_by_definition(q, k, same)
        assert rank.max() > 0
        options = {"return_stats": True, "backend": backend, "temperature": temperature}
        calls = {
            "batch": ck.info_nce(q, k, **options),
            "symmetric": ck.info_nce(q, k, symmetric=True, **options),
            "queue": ck.info_nce(q, k, negatives=k, **options),
            "chunks": ck.info_nce(q, k, negatives=list(k.split(5)), **options),
            "own": ck.info_nce(q, k, negatives=k.expand(18, 18, 16), **options),
            "clip": ck.clip_loss(q, k, 1 / temperature, return_stats=True, backend=backend),
            "siglip": ck.siglip_loss(
                q, k, 1 / temperature, -10.0, return_stats=True, backend=backend
            ),
            "nce": ck.nce(q, k, k, num_data=50, **options),
            "rince": ck.rince(q, k, q=1e-3, **options),
        }
        for name, (_, stats) in calls.items():
            assert torch.equal(stats.rank.long(), rank), (dtype, name)
            torch.testing.assert_close(stats.accuracy.double(), (rank == 0).double().mean())


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dim", [1, 2, 33, 1000, 4096])
def test_rounding_of_long_vectors(dim, normalize, backend):
    """Sums whose roundings do not cancel: equal entries, and one far larger than the others."""
    rows = torch.linspace(0.1, 0.9, 24, dtype=DOUBLE)[:, None]
    first = torch.cat((torch.full((1,), 300.0), torch.ones(dim - 1)))
    for x, dtype in product((rows.expand(24, dim), rows * first, randn(24, dim)), DTYPES[:3]):
        x = x.to(dtype)
        x = x if normalize else x / 16  # the square of 300 in half precision
        _, stats = ck.info_nce(
            x, x, negatives=x[:, None].expand(24, 3, dim), temperature=0.01, normalize=normalize,
            return_stats=True, backend=backend,
        )  # fmt: skip
        _, batch = ck.info_nce(
            x[:1].expand(24, dim), x[:1].expand(24, dim), temperature=0.01, normalize=normalize,
            return_stats=True, backend=backend,
        )  # fmt: skip
        assert not stats.rank.any() and not batch.rank.any(), dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("length", [1.0, 50.0])
def test_a_negative_a_little_above_ties_within_the_documented_bound(length, dtype, backend):
    bound = (0.5 * 2 + 8) * torch.finfo(dtype).eps
    angle = torch.tensor(0.25, dtype=DOUBLE)
    query = length * torch.tensor([[1.0, 0.0]], dtype=DOUBLE)
    key = torch.stack((angle, (1 - angle.square()).sqrt()))[None]
    for above, rank in ((-3.0, 0), (0.3, 0), (3.0, 1)):
        x = angle + above * bound
        negative = torch.stack((x, (1 - x.square()).sqrt()))[None]
        _, stats = ck.info_nce(
            query.to(dtype), key.to(dtype), negatives=negative.to(dtype), temperature=0.1,
            normalize=length == 1, return_stats=True, backend=backend,
        )  # fmt: skip
        assert stats.rank.item() == rank, above


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_of_rows_with_nan(backend):
    query, key = randn(7, 5, seed=1), randn(7, 5, seed=2)
    _, clean = ck.info_nce(query, query, return_stats=True, backend=backend)
    assert clean.accuracy == 1
    broken = query.clone()
    broken[2, 1] = torch.nan
    _, stats = ck.info_nce(broken, query, return_stats=True, backend=backend)
    assert stats.rank.tolist() == [0, 0, 6, 0, 0, 0, 0]  # behind all of its negatives
    torch.testing.assert_close(stats.accuracy, torch.tensor(6 / 7, dtype=DOUBLE))
    _, stats = ck.info_nce(query, broken, return_stats=True, backend=backend)
    assert stats.rank.tolist() == [1, 1, 6, 1, 1, 1, 1] and stats.accuracy == 0
    _, stats = ck.info_nce(query, query, negatives=broken[2:4], return_stats=True, backend=backend)
    assert stats.accuracy == 0 and stats.rank.min() >= 1
    _, stats = ck.siglip_loss(broken[2:3], key[:1], 10.0, return_stats=True, backend=backend)
    assert stats.rank.tolist() == [0] and stats.accuracy == 0  # no negative at all
