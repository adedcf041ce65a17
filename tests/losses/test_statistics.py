"""The statistics of every loss, `return_stats=True`."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_calls import FIRST, inputs, ours, with_backends
from oracles import BACKENDS, DOUBLE, randn, views

import contrastive_kernels as ck
from contrastive_kernels.losses.table import CASES

SAME_IDS, MORE_IDS = torch.tensor([5, 7, 5, 9, 9, 2, 5]), torch.tensor([5, 5, 1, 2, 9])
COLUMN_IDS = torch.tensor([5, 7, 0, 9, 1, 1, 7])  # differ from SAME_IDS four times

NO_SUCH_PAIR = [
    ("siglip_loss one row", "negative_similarity"),
    ("sup_con lonely", "positive_similarity"),
]
parametrize_backends = pytest.mark.parametrize("backend", BACKENDS)


@with_backends(
    [name for name, (row, _) in CASES.items() if row.takes("return_stats")],
    interpreted=FIRST.values(),
)
def test_statistics_leave_the_loss_alone(name, backend):
    given = inputs(name)
    loss = ours(name, backend=backend)(*given)
    with_stats, stats = ours(name, backend=backend, return_stats=True)(*given)
    if backend == "triton":  # counting takes another schedule there
        torch.testing.assert_close(loss, with_stats, rtol=1e-13, atol=1e-14)
    else:
        assert torch.equal(loss, with_stats)
    assert isinstance(stats, ck.LossStats)
    assert not any(t.requires_grad for t in stats if t is not None)
    for field, value in zip(stats._fields, stats, strict=True):
        if value is None:
            continue
        assert value.dtype == (torch.int64 if field == "rank" else DOUBLE), field
        if (name, field) not in NO_SUCH_PAIR:
            assert torch.isfinite(value).all(), field


@parametrize_backends
@pytest.mark.parametrize("columns", [None, SAME_IDS, COLUMN_IDS], ids=["all", "same", "other"])
@pytest.mark.parametrize("extra", [False, True], ids=["batch", "both"])
def test_statistics_of_info_nce(backend, columns, extra):
    query, key, more = views(7, 5, (5, 5))
    key[3] = -query[3]  # a positive that does not rank first
    candidates = torch.cat((key, more)) if extra else key
    dropped = torch.zeros(7, len(candidates), dtype=torch.bool)
    dropped[:, :7] = torch.eye(7, dtype=torch.bool)
    exclude = None
    if columns is not None:
        columns = torch.cat((columns, MORE_IDS)) if extra else columns
        exclude = (SAME_IDS, columns)
        dropped |= SAME_IDS[:, None] == columns[None]
    loss, stats = ck.info_nce(
        query, key, negatives=more if extra else None, in_batch=True, exclude=exclude,
        backend=backend, return_stats=True, reduction="none",
    )  # fmt: skip
    similarity = F.normalize(query) @ F.normalize(candidates).T
    positive = similarity.diagonal()
    rank = ((similarity > positive[:, None]) & ~dropped).sum(1)
    assert torch.equal(stats.rank.long(), rank) and rank.max() > 0
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    close(stats.accuracy, (rank == 0).double().mean())
    close(stats.positive_similarity, positive.mean())
    close(stats.negative_similarity, similarity[~dropped].mean())
    allowed = dropped.clone()
    allowed[:, :7] &= ~torch.eye(7, dtype=torch.bool)
    lse = (similarity / 0.1).masked_fill(allowed, -torch.inf).logsumexp(1)
    close(stats.lse, lse)
    close(stats.mi_lower_bound, ((~dropped).sum(1) + 1).double().log().mean() - loss.mean())


@parametrize_backends
def test_bound_of_a_symmetric_loss_is_the_mean_of_its_directions(backend):
    query, key, more = views(7, 5, (5, 5))
    options = {"in_batch": True, "backend": backend, "return_stats": True}
    _, both = ck.info_nce(query, key, negatives=more, symmetric=True, **options)
    _, forth = ck.info_nce(query, key, negatives=more, **options)
    _, back = ck.info_nce(key, query, **options)
    expected = (forth.mi_lower_bound + back.mi_lower_bound) / 2
    torch.testing.assert_close(both.mi_lower_bound, expected, rtol=1e-10, atol=1e-12)


@parametrize_backends
@pytest.mark.parametrize("loss", ["nt_xent", "dcl", "hcl"])
def test_statistics_of_two_views(backend, loss):
    z1, z2 = views(7, 5)
    z2[3] = -z1[3]
    value, stats = getattr(ck, loss)(z1, z2, backend=backend, return_stats=True)
    z = F.normalize(torch.cat((z1, z2)))
    similarity, positive = z @ z.T, (z[:7] * z[7:]).sum(1).repeat(2)
    sample = torch.arange(7).repeat(2)
    negative = sample[:, None] != sample[None]
    rank = ((similarity > positive[:, None]) & negative).sum(1)
    assert torch.equal(stats.rank.long(), rank) and rank.max() > 0
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    close(stats.positive_similarity, positive.mean())
    close(stats.negative_similarity, similarity[negative].mean())
    if loss == "nt_xent":
        close(stats.mi_lower_bound, torch.tensor(13.0, dtype=DOUBLE).log() - value)
    else:
        assert stats.mi_lower_bound is None


@parametrize_backends
@pytest.mark.parametrize("loss", ["siglip_loss", "nce"])
def test_statistics_of_sigmoid_losses(backend, loss):
    query, key = views(7, 5)
    key[3] = -query[3]
    if loss == "nce":
        negatives = randn(11, 5, seed=8)
        _, stats = ck.nce(query, key, negatives, num_data=100, backend=backend, return_stats=True)
        similarity = F.normalize(query) @ F.normalize(negatives).T
        negative = torch.ones_like(similarity, dtype=torch.bool)
    else:
        _, stats = ck.siglip_loss(query, key, 10.0, -10.0, backend=backend, return_stats=True)
        similarity = F.normalize(query) @ F.normalize(key).T
        negative = ~torch.eye(7, dtype=torch.bool)
    positive = F.cosine_similarity(query, key)
    rank = ((similarity > positive[:, None]) & negative).sum(1)
    assert torch.equal(stats.rank.long(), rank) and rank.max() > 0
    torch.testing.assert_close(stats.negative_similarity, similarity[negative].mean())
    assert stats.lse is None and stats.mi_lower_bound is None


@parametrize_backends
def test_statistics_of_sup_con(backend):
    features, labels = (t.detach() for t in inputs("sup_con"))
    _, stats = ck.sup_con(features, labels, backend=backend, return_stats=True)
    z = F.normalize(features)
    own = torch.eye(7, dtype=torch.bool)
    positive = (labels[:, None] == labels[None]) & ~own
    torch.testing.assert_close(stats.positive_similarity, (z @ z.T)[positive].mean())
    torch.testing.assert_close(stats.negative_similarity, (z @ z.T)[~positive & ~own].mean())
    expected = (z @ z.T / 0.07).masked_fill(own, -torch.inf).logsumexp(1)
    torch.testing.assert_close(stats.lse, expected)


@parametrize_backends
def test_statistics_of_cacr(backend):
    query, positive, negatives = views(7, 5, (11, 5))
    positives = positive[:, None]
    positives[3] = -query[3]
    _, stats = ck.cacr(query, positives, negatives=negatives, backend=backend, return_stats=True)
    similarity = F.normalize(query) @ F.normalize(negatives).T
    positive = F.cosine_similarity(query, positives[:, 0])
    assert torch.equal(stats.rank.long(), (similarity > positive[:, None]).sum(1))
    torch.testing.assert_close(stats.positive_similarity, positive.mean())
    torch.testing.assert_close(stats.negative_similarity, similarity.mean())


def test_statistics_of_w_mse():
    z = randn(3, 12, 4)
    loss, stats = ck.w_mse(z, group_size=12, return_stats=True)
    torch.testing.assert_close(loss, 2 - 2 * stats.positive_similarity)


def test_statistics_of_intl():
    views = randn(3, 12, 20)
    loss, stats = ck.intl(views, lam=0.0, return_stats=True)
    torch.testing.assert_close(loss, 2 - 2 * stats.positive_similarity)
