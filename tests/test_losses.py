"""Every loss against its paper's definition in `reference.py`: value and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    BACKENDS,
    DOUBLE,
    assert_equal_in_double,
    assert_within_budget,
    generator,
    randn,
    value_and_gradients,
)
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


class Case(NamedTuple):
    """A loss, its tensors for a dtype, and options. Tensors that are options carry a name."""

    loss: str
    tensors: Callable[[torch.dtype], list[Tensor]]
    options: dict
    named: tuple[str, ...] = ()
    rows: bool = True
    slack: float = 64.0

    def run(self, module, *inputs, **extra) -> Tensor:
        split = len(inputs) - len(self.named)
        named = dict(zip(self.named, inputs[split:], strict=True))
        if "exclude_rows" in named:
            named["exclude"] = (named.pop("exclude_rows"), named.pop("exclude_columns"))
        return getattr(module, self.loss)(*inputs[:split], **named, **self.options, **extra)


def views(n: int, dim: int, *others: tuple[int, ...]):
    """Two correlated views (n, dim), then further features of the given shapes."""

    def make(dtype):
        z1 = randn(n, dim, seed=1)
        z2 = z1 + 0.5 * randn(n, dim, seed=2)
        rest = [randn(*shape, seed=3 + i) for i, shape in enumerate(others)]
        return [t.to(dtype) for t in (z1, z2, *rest)]

    return make


def with_ids(make, *pairs):
    return lambda dtype: [*make(dtype), *pairs]


def with_scalars(make, *values):
    return lambda dtype: [*make(dtype), *(torch.tensor(v, dtype=dtype) for v in values)]


def labelled(*shape: int):
    return lambda dtype: [randn(*shape, seed=4, dtype=dtype), ids(0, 1, 0, 2, 0, 1, 3)[: shape[0]]]


def query_and_positives(n: int, k: int, dim: int, *negatives: tuple[int, ...]):
    def make(dtype):
        query = randn(n, dim, seed=1)
        positives = query[:, None] + 0.7 * randn(n, k, dim, seed=2)
        rest = [randn(*shape, seed=3) for shape in negatives]
        return [t.to(dtype) for t in (query, positives, *rest)]

    return make


SAME_IDS = ids(5, 7, 5, 9, 9, 2, 5)
COLUMN_IDS = ids(5, 7, 0, 9, 1, 1, 7)  # differs from SAME_IDS on the diagonal, four times
MORE_IDS = ids(5, 5, 1, 2, 9)
PERMUTATIONS = torch.stack([torch.randperm(12, generator=generator(i)) for i in range(3)])

CASES = {
    "info_nce": Case("info_nce", views(7, 5), {}),
    "info_nce two rows": Case("info_nce", views(2, 3), {"temperature": 1.0}),
    "info_nce symmetric": Case("info_nce", views(13, 11), {"symmetric": True}),
    "info_nce scale": Case(
        "info_nce", with_scalars(views(7, 5), 3.0), {"symmetric": True}, ("scale",)
    ),
    "info_nce dot": Case("info_nce", views(7, 5), {"normalize": False, "temperature": 1.0}),
    "info_nce shared": Case("info_nce", views(7, 5, (11, 5)), {}, ("negatives",)),
    "info_nce shared one row": Case("info_nce", views(1, 5, (3, 5)), {}, ("negatives",)),
    "info_nce own": Case("info_nce", views(7, 5, (7, 3, 5)), {}, ("negatives",)),
    "info_nce both": Case("info_nce", views(7, 5, (3, 5)), {"in_batch": True}, ("negatives",)),
    "info_nce both symmetric margin": Case(
        "info_nce",
        views(7, 5, (3, 5)),
        {"in_batch": True, "symmetric": True, "alpha": 50.0},
        ("negatives",),
    ),
    "info_nce both, own": Case(
        "info_nce", views(7, 5, (7, 3, 5)), {"in_batch": True, "alpha": 3.0}, ("negatives",)
    ),
    "info_nce bias": Case("info_nce", views(7, 5, (7,)), {"symmetric": True}, ("key_bias",)),
    "info_nce both bias": Case(
        "info_nce", views(7, 5, (3, 5), (10,)), {"in_batch": True}, ("negatives", "key_bias")
    ),
    "info_nce shared bias": Case(
        "info_nce", views(7, 5, (3, 5), (3,)), {}, ("negatives", "key_bias")
    ),
    "info_nce exclude": Case(
        "info_nce",
        with_ids(views(7, 5), SAME_IDS, SAME_IDS),
        {"symmetric": True},
        ("exclude_rows", "exclude_columns"),
    ),
    "info_nce exclude off the diagonal": Case(
        "info_nce",
        with_ids(views(7, 5), SAME_IDS, COLUMN_IDS),
        {"symmetric": True},
        ("exclude_rows", "exclude_columns"),
    ),
    "info_nce exclude margin": Case(
        "info_nce",
        with_ids(views(7, 5), SAME_IDS, COLUMN_IDS),
        {"symmetric": True, "alpha": 100.0},
        ("exclude_rows", "exclude_columns"),
        slack=64 * 25,  # lse - positive, times alpha / K
    ),
    "info_nce exclude small margin": Case(
        "info_nce",
        with_ids(views(7, 5), SAME_IDS, COLUMN_IDS),
        {"symmetric": True, "alpha": 0.5},
        ("exclude_rows", "exclude_columns"),
    ),
    "info_nce exclude shared": Case(
        "info_nce",
        with_ids(views(7, 5, (5, 5)), SAME_IDS, MORE_IDS),
        {"alpha": 9.0},
        ("negatives", "exclude_rows", "exclude_columns"),
    ),
    "info_nce exclude both": Case(
        "info_nce",
        with_ids(views(7, 5, (5, 5)), SAME_IDS, torch.cat((COLUMN_IDS, MORE_IDS))),
        {"in_batch": True, "alpha": 9.0},
        ("negatives", "exclude_rows", "exclude_columns"),
    ),
    "info_nce exclude all": Case(
        "info_nce",
        with_ids(views(7, 5, (2, 5)), SAME_IDS, torch.cat((SAME_IDS, ids(7, 7)))),
        {"in_batch": True, "alpha": 9.0},
        ("negatives", "exclude_rows", "exclude_columns"),
    ),
    "eqco": Case("eqco", views(7, 5, (11, 5)), {}, ("negatives",)),
    "eqco in batch": Case("eqco", views(7, 5), {"alpha": 16.0}),
    "clip_loss": Case("clip_loss", with_scalars(views(13, 5), 14.0), {}),
    "siglip_loss": Case("siglip_loss", with_scalars(views(13, 5), 10.0, -10.0), {}),
    "siglip_loss one row": Case("siglip_loss", with_scalars(views(1, 5), 10.0, -10.0), {}),
    "nt_xent": Case("nt_xent", views(7, 5), {}),
    "nt_xent two rows": Case("nt_xent", views(2, 5), {"temperature": 0.5}),
    "nt_xent scale": Case("nt_xent", with_scalars(views(7, 5), 3.0), {}, ("scale",)),
    "nt_xent negative scale": Case("nt_xent", views(7, 5), {"scale": -2.0}),
    "dcl": Case("dcl", views(7, 5), {}),
    "dcl scale": Case("dcl", with_scalars(views(7, 5), 3.0), {}, ("scale",)),
    "dcl weight": Case("dcl", views(7, 5, (14,)), {}, ("weight",)),
    "dclw": Case("dcl", views(7, 5), {"sigma": 0.5}),
    "debiased": Case("debiased", views(7, 5), {}),
    "debiased clamped": Case("debiased", views(7, 5), {"tau_plus": 0.6}),
    "debiased without prior": Case("debiased", views(7, 5), {"tau_plus": 0.0}),
    "hcl": Case("hcl", views(7, 5), {}),
    "hcl hard": Case("hcl", views(13, 5), {"beta": 2.5, "temperature": 0.2}),
    "hcl clamped": Case("hcl", views(7, 5), {"tau_plus": 0.9}),
    "sup_con": Case("sup_con", labelled(7, 5), {}),
    "sup_con views": Case("sup_con", labelled(7, 2, 5), {"base_temperature": 0.1}),
    "sup_con lonely": Case("sup_con", labelled(2, 5), {"temperature": 0.5}),
    "nce": Case("nce", views(7, 5, (11, 5)), {"num_data": 1000}),
    "nce own": Case("nce", views(7, 5, (7, 3, 5)), {"num_data": 1000, "temperature": 0.5}),
    "nce Z": Case("nce", views(7, 5, (11, 5)), {"num_data": 1000, "Z": 3e4}),
    "cacr": Case("cacr", query_and_positives(7, 3, 5), {}),
    "cacr one positive": Case("cacr", views(7, 5), {"alpha": 0.5, "beta": 2.0}),
    "cacr negatives": Case("cacr", query_and_positives(7, 3, 5, (11, 5)), {}, ("negatives",)),
    "cacr one row": Case("cacr", query_and_positives(1, 3, 5, (11, 5)), {}, ("negatives",)),
    "cacr detached": Case("cacr", query_and_positives(7, 3, 5), {"detach_weights": True}),
    "cacr on the plane": Case(
        "cacr", query_and_positives(7, 3, 5, (11, 5)), {"normalize": False}, ("negatives",)
    ),
    "cacr on the plane, detached": Case(
        "cacr", query_and_positives(7, 3, 5), {"normalize": False, "detach_weights": True}
    ),
    "cacr rbf": Case("cacr", query_and_positives(7, 3, 5), {"cost": "rbf"}, rows=False),
    "cacr rbf detached": Case(
        "cacr",
        query_and_positives(7, 3, 5, (11, 5)),
        {"cost": "rbf", "detach_weights": True, "rbf_t": 0.7},
        ("negatives",),
        rows=False,
    ),
    "cacr rbf on the plane": Case(
        "cacr",
        query_and_positives(7, 3, 5),
        {"cost": "rbf", "detach_weights": True, "normalize": False},
        rows=False,
    ),
    "cacr_views": Case("cacr_views", lambda dtype: [randn(4, 7, 5, dtype=dtype)], {}),
    "cacr_views two": Case("cacr_views", lambda dtype: [randn(2, 7, 5, dtype=dtype)], {}),
    "cacr_views detached": Case(
        "cacr_views", lambda dtype: [randn(3, 7, 5, dtype=dtype)], {"detach_weights": True}
    ),
    "cacr_views rbf": Case(
        "cacr_views", lambda dtype: [randn(3, 7, 5, dtype=dtype)], {"cost": "rbf"}, rows=False
    ),
    "cct": Case("cct", query_and_positives(7, 3, 5), {"t_pos": 2.0, "t_neg": 0.9}),
    "w_mse": Case(
        "w_mse",
        lambda dtype: [randn(3, 12, 3, dtype=dtype)],
        {"group_size": 6, "permutations": PERMUTATIONS},
    ),
    "w_mse plain": Case(
        "w_mse",
        lambda dtype: [randn(2, 12, 3, dtype=dtype)],
        {"group_size": 12, "permutations": PERMUTATIONS[:1], "normalize": False, "eps": 0.1},
    ),
    "w_mse zca": Case(
        "w_mse",
        lambda dtype: [randn(2, 12, 3, dtype=dtype)],
        {"group_size": 6, "permutations": PERMUTATIONS[:2], "method": "zca"},
    ),
    "w_mse newton": Case(
        "w_mse",
        lambda dtype: [randn(2, 12, 3, dtype=dtype)],
        {"group_size": 12, "permutations": PERMUTATIONS[:1], "method": "newton_schulz"},
    ),
    "intl": Case("intl", lambda dtype: [randn(2, 16, 37, dtype=dtype)], {}),
    "intl four views": Case(
        "intl", lambda dtype: [randn(4, 5, 9, dtype=dtype)], {"lam": 0.3, "iterations": 7}
    ),
    "intl more samples than features": Case(
        "intl", lambda dtype: [randn(3, 12, 5, dtype=dtype)], {"lam": 0.05}
    ),
    "intl features": Case("intl", lambda dtype: [randn(3, 40, 11, dtype=dtype)], {"axis": 1}),
    "intl more features than samples": Case(
        "intl", lambda dtype: [randn(2, 6, 13, dtype=dtype)], {"axis": 1, "lam": 0.0}
    ),
}
HAS_TEMPERATURE = [
    "info_nce", "info_nce symmetric", "info_nce shared", "info_nce own", "info_nce both",
    "eqco", "nt_xent", "dcl", "sup_con", "nce Z",
]  # fmt: skip
NO_SUCH_PAIR = [
    ("siglip_loss one row", "negative_similarity"),
    ("sup_con lonely", "positive_similarity"),
]
parametrize_cases = pytest.mark.parametrize("name", CASES)
parametrize_backends = pytest.mark.parametrize("backend", BACKENDS)


@parametrize_cases
@parametrize_backends
def test_value_and_gradients_in_double(name, backend):
    case = CASES[name]
    reduction = "none" if case.rows else "mean"
    assert_equal_in_double(
        partial(case.run, ck, backend=backend, reduction=reduction),
        partial(case.run, reference, reduction=reduction),
        case.tensors(DOUBLE),
    )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rows])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(name, reduction):
    case = CASES[name]
    inputs = case.tensors(DOUBLE)
    rows = case.run(ck, *inputs, reduction="none")
    reduced = case.run(ck, *inputs, reduction=reduction)
    torch.testing.assert_close(reduced, getattr(rows, reduction)(), rtol=1e-12, atol=1e-12)
    expected = case.run(reference, *inputs, reduction=reduction)
    torch.testing.assert_close(reduced, expected, rtol=1e-11, atol=1e-11)


@parametrize_cases
@parametrize_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(name, backend, dtype):
    case = CASES[name]
    reduction = "none" if case.rows else "mean"
    assert_within_budget(
        partial(case.run, ck, backend=backend, reduction=reduction),
        partial(case.run, reference, reduction=reduction),
        case.tensors(dtype),
        slack=case.slack,
    )


@pytest.mark.parametrize("name", HAS_TEMPERATURE)
@parametrize_backends
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_temperatures(name, backend, temperature, dtype):
    case = CASES[name]
    case = case._replace(options={**case.options, "temperature": temperature})
    assert_within_budget(
        partial(case.run, ck, backend=backend, reduction="none"),
        partial(case.run, reference, reduction="none"),
        case.tensors(dtype),
        slack=64 + 4 / temperature,  # logits are rounded to eps / temperature
    )


@parametrize_cases
@parametrize_backends
def test_statistics_leave_the_loss_alone(name, backend):
    case = CASES[name]
    inputs = case.tensors(DOUBLE)
    loss = case.run(ck, *inputs, backend=backend)
    with_stats, stats = case.run(ck, *inputs, backend=backend, return_stats=True)
    if backend == "triton":  # counting takes another schedule there
        torch.testing.assert_close(loss, with_stats, rtol=1e-13, atol=1e-14)
    else:
        assert torch.equal(loss, with_stats)
    assert isinstance(stats, ck.LossStats)
    assert not any(t.requires_grad for t in stats if t is not None)
    for field, value in zip(stats._fields, stats, strict=True):
        if value is not None and (name, field) not in NO_SUCH_PAIR:
            assert torch.isfinite(value).all(), field


@parametrize_backends
@pytest.mark.parametrize("columns", [None, SAME_IDS, COLUMN_IDS], ids=["all", "same", "other"])
@pytest.mark.parametrize("extra", [False, True], ids=["batch", "both"])
def test_statistics_of_info_nce(backend, columns, extra):
    query, key, more = views(7, 5, (5, 5))(DOUBLE)
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
    query, key, more = views(7, 5, (5, 5))(DOUBLE)
    options = {"in_batch": True, "backend": backend, "return_stats": True}
    _, both = ck.info_nce(query, key, negatives=more, symmetric=True, **options)
    _, forth = ck.info_nce(query, key, negatives=more, **options)
    _, back = ck.info_nce(key, query, **options)
    expected = (forth.mi_lower_bound + back.mi_lower_bound) / 2
    torch.testing.assert_close(both.mi_lower_bound, expected, rtol=1e-10, atol=1e-12)


@parametrize_backends
@pytest.mark.parametrize("loss", ["nt_xent", "dcl", "hcl"])
def test_statistics_of_two_views(backend, loss):
    z1, z2 = views(7, 5)(DOUBLE)
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
    query, key = views(7, 5)(DOUBLE)
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
    features, labels = labelled(7, 5)(DOUBLE)
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
    query, positives, negatives = query_and_positives(7, 1, 5, (11, 5))(DOUBLE)
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


@pytest.mark.parametrize("axis", [0, 1])
def test_weight_of_the_trace_loss_of_intl(axis):
    """0.01 (log2 - 3) of 16 samples or 64 features; it multiplies the sum of two trace losses."""
    views = randn(2, 16, 64)
    without, one = (ck.intl(views, axis=axis, lam=lam) for lam in (0.0, 1.0))
    weight = 0.03 if axis == 1 else 0.01
    torch.testing.assert_close(ck.intl(views, axis=axis), without + weight * (one - without))


@parametrize_backends
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent"])
def test_near_convergence_in_half_precision(backend, loss):
    """A loss near 1e-9 keeps its digits, which lse - positive would round away."""
    query = torch.eye(16, dtype=torch.bfloat16)
    options = [32.0] if loss == "clip_loss" else []
    keywords = {} if options else {"temperature": 1 / 32}
    run = partial(getattr(ck, loss), backend=backend, reduction="none", **keywords)
    value = run(query, query.clone(), *options)
    candidates = 30 if loss == "nt_xent" else 15
    expected = torch.tensor(candidates, dtype=DOUBLE) * torch.tensor(-32.0, dtype=DOUBLE).exp()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected.expand_as(value), rtol=1e-5, atol=0)


@parametrize_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("loss", ["info_nce", "nt_xent", "dcl", "hcl"])
def test_temperature_001_is_finite_and_right(loss, backend, dtype):
    """Logits reach 100, whose exp overflows float32 when squared."""
    options = {"temperature": 0.01, "reduction": "none"}
    ours = partial(getattr(ck, loss), backend=backend, **options)
    dense = partial(getattr(reference, loss), **options)
    z = randn(33, 16, dtype=dtype)
    assert_within_budget(ours, dense, [z, z.flip(0).contiguous()])
    same = torch.ones(33, 16, dtype=dtype)
    value, *gradients = value_and_gradients(ours, [same, same])
    expected = dense(same.double(), same.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    # the exact gradient is 0; each term of its sums is up to 100
    assert all(g.abs().max() < 1e-4 for g in gradients)


@parametrize_backends
def test_rows_without_negatives(backend):
    """All negatives of every row dropped: loss 0 and gradient exactly 0."""
    query, key = views(5, 3)(DOUBLE)
    one = torch.zeros(5, dtype=torch.long)
    for alpha in (None, 100.0):
        value, *gradients = value_and_gradients(
            partial(
                ck.info_nce, exclude=(one, one), symmetric=True, alpha=alpha, backend=backend,
                reduction="none",
            ),
            [query, key],
        )  # fmt: skip
        assert torch.equal(value, torch.zeros(5, dtype=DOUBLE))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@parametrize_backends
def test_frozen_keys_and_queue(backend):
    """The gradient of the query alone is the same as beside other gradients."""
    query, key, queue = views(7, 5, (11, 5))(DOUBLE)
    query.requires_grad_()
    loss = ck.info_nce(query, key, negatives=queue, backend=backend)
    (alone,) = torch.autograd.grad(loss, query)
    key.requires_grad_(), queue.requires_grad_()
    loss = ck.info_nce(query, key, negatives=queue, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss, query)[0], alone, rtol=1e-12, atol=0)


@parametrize_backends
@pytest.mark.parametrize("loss", ["info_nce", "nt_xent", "siglip_loss", "cacr"])
def test_inputs_of_any_strides(loss, backend):
    query = randn(5, 14).T[::2]
    key = randn(7, 10, seed=2)[:, ::2]
    assert not query.is_contiguous() and not key.is_contiguous()
    more = (5.0, -2.0) if loss == "siglip_loss" else ()
    assert_equal_in_double(
        lambda q, k: getattr(ck, loss)(q, k, *more, backend=backend),
        lambda q, k: getattr(reference, loss)(q, k, *more),
        [query, key],
    )


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "sup_con", "cacr", "w_mse", "intl"])
def test_autocast_keeps_the_precision_of_the_inputs(name, backend):
    if backend == "triton":
        pytest.skip("products in the type of the region: see the next test")
    case = CASES[name]

    def under_autocast(*inputs):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return case.run(ck, *inputs, backend=backend)

    inputs = case.tensors(torch.float32)
    exact = value_and_gradients(partial(case.run, ck, backend=backend), inputs)
    for got, wanted in zip(value_and_gradients(under_autocast, inputs), exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not usable here")
@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_autocast_casts_the_operands_of_triton(name):
    case = CASES[name]

    def under_autocast(*inputs):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return case.run(ck, *inputs, backend="triton")

    def cast_by_hand(*inputs):
        rounded = (t.bfloat16() if t.is_floating_point() else t for t in inputs)
        return case.run(ck, *rounded, backend="triton")

    inputs = case.tensors(torch.float32)
    got, wanted = (value_and_gradients(f, inputs) for f in (under_autocast, cast_by_hand))
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-7)
    for a, b in zip(got[1:], wanted[1:], strict=True):
        assert a.dtype == torch.float32
        # by hand, gradients of several operators are added in bfloat16
        assert (a - b).norm() <= torch.finfo(torch.bfloat16).eps * b.norm()


@parametrize_backends
def test_labels_of_any_value_and_order(backend):
    features = randn(50, 5)
    labels = torch.randint(-(2**40), 2**40, (7,), generator=generator())[
        torch.randint(7, (50,), generator=generator(1))
    ]
    assert_equal_in_double(
        lambda x: ck.sup_con(x, labels, backend=backend),
        lambda x: reference.sup_con(x, labels),
        [features],
    )


@pytest.mark.parametrize("loss", ["info_nce", "nt_xent", "hcl", "cacr"])
def test_second_order_gradients_on_the_reference(loss):
    def run(z1, z2):
        return getattr(ck, loss)(z1, z2, backend="reference")

    z1, z2 = (t.requires_grad_() for t in views(4, 3)(DOUBLE))
    assert torch.autograd.gradgradcheck(run, (z1, z2))


def test_mi_lower_bound():
    loss = torch.tensor([0.5, 1.0], requires_grad=True)
    bound = ck.mi_lower_bound(loss, 15)
    assert not bound.requires_grad
    torch.testing.assert_close(bound, torch.tensor(16.0).log() - loss.detach())
    bound = ck.mi_lower_bound(loss, torch.tensor([1, 3]))
    torch.testing.assert_close(bound, torch.tensor([2.0, 4.0]).log() - loss.detach())


def test_log_z_replaces_a_z_that_overflows():
    query, key, negatives = (t.float() for t in views(5, 3, (4, 3))(DOUBLE))
    options = {"num_data": 1000, "temperature": 0.005}
    loss = ck.nce(query, key, negatives, log_z=200.0, **options)
    expected = ck.nce(query.double(), key.double(), negatives.double(), log_z=200.0, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_half_scalars_are_rounded_once(backend):
    """The scale meets the positives and the sweep, in terms that nearly cancel."""
    z1 = 3 + randn(40, 16, seed=1, dtype=torch.float32)
    z2 = z1 + 0.3 * randn(40, 16, seed=2, dtype=torch.float32)
    for loss, values in (("clip_loss", (20.0,)), ("siglip_loss", (20.0, -10.0))):
        gradients = []
        for dtype in (torch.float32, torch.bfloat16):
            scalars = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in values]
            value = getattr(ck, loss)(z1, z2, *scalars, backend=backend)
            gradients.append(torch.autograd.grad(value, scalars))
        for exact, rounded in zip(*gradients, strict=True):
            torch.testing.assert_close(rounded, exact.bfloat16(), rtol=0, atol=0)
