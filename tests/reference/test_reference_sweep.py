"""The primitives of the oracle, pair by pair and at their limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from identities import assert_same, assert_same_with_grad, randn
from oracles import DOUBLE
from torch.autograd import gradcheck, gradgradcheck

from contrastive_kernels import reference as ref


@pytest.mark.parametrize("keys", ["shared", "per query", "self"])
@pytest.mark.parametrize("normalize", [False, True])
def test_sweep_equals_its_definition_pair_by_pair(keys, normalize):
    n, m, dim, scale = 5, 5 if keys == "self" else 7, 3, 1.7
    x = randn(n, dim)
    y = {"shared": randn(m, dim, seed=1), "per query": randn(n, m, dim, seed=1), "self": None}[keys]
    bias, threshold = randn(m, seed=2), randn(n, seed=3)
    exclude = (torch.arange(n) % 3, torch.arange(m) % 4)
    keep = (torch.tensor([0, 1, 1, 1, 2]), torch.tensor([1, 1, 3, 1, 0, 1, 0][:m]))
    out = ref.sweep(
        x, y, scale=scale, bias=bias, exclude=exclude, keep=keep, normalize=normalize,
        mean=True, columns=True, threshold=threshold,
    )  # fmt: skip

    rows, columns = [[] for _ in range(n)], [[] for _ in range(m)]
    for i in range(n):
        for j in range(m):
            if exclude[0][i] == exclude[1][j] or keep[0][i] != keep[1][j]:
                continue
            k = x[j] if y is None else y[j] if y.dim() == 2 else y[i, j]
            dot = float(x[i] @ k)
            if normalize:
                dot /= math.sqrt(float(x[i] @ x[i])) * math.sqrt(float(k @ k))
            z = scale * dot + float(bias[j])
            rows[i].append(z)
            columns[j].append(z)

    def lse_and_mean(z):
        if not z:
            return -math.inf, 0.0
        weights = [math.exp(v) for v in z]
        return math.log(sum(weights)), sum(w * v for w, v in zip(weights, z, strict=True)) / sum(
            weights
        )

    def as_tensor(values):
        return torch.tensor(values, dtype=DOUBLE)

    assert [] in rows and [] in columns, "the masks must leave an empty row and column"
    for stats, (lse, mean) in ((rows, out[:2]), (columns, out[2:4])):
        assert_same(lse, as_tensor([lse_and_mean(z)[0] for z in stats]))
        assert_same(mean, as_tensor([lse_and_mean(z)[1] for z in stats]))
    assert out.counts.rank.tolist() == [
        sum(v > t for v in z) for z, t in zip(rows, threshold, strict=True)
    ]
    assert out.counts.pairs.tolist() == [len(z) for z in rows]
    assert_same(out.counts.total, as_tensor([sum(z) for z in rows]))

    soft = ref.softplus_sweep(
        x, x if y is None else y, scale=scale, bias=bias, exclude=exclude, keep=keep,
        normalize=normalize, threshold=threshold,
    )  # fmt: skip
    assert_same(soft.value, as_tensor([sum(math.log1p(math.exp(v)) for v in z) for z in rows]))
    assert all(torch.equal(a, b) for a, b in zip(soft.counts, out.counts, strict=True))


def test_sweep_returns_only_what_was_asked():
    x = randn(4, 3)
    assert [v is None for v in ref.sweep(x, None)] == [False] + 11 * [True]
    assert [v is None for v in ref.softplus_sweep(x, None)] == [False, True, True]


def test_rank_counts_strictly_greater():
    x = torch.tensor([[1.0]], dtype=DOUBLE)
    y = torch.tensor([[1.0], [2.0], [2.0], [3.0]], dtype=DOUBLE)
    assert ref.sweep(x, y, threshold=torch.tensor([2.0], dtype=DOUBLE)).counts.rank.item() == 1


def test_sweep_is_stable_at_a_large_scale():
    x, y = randn(4, 3, grad=True), randn(5, 3, seed=1)
    out = ref.sweep(x, y, scale=1e6, mean=True)
    assert_same(out.lse, (1e6 * x @ y.T).amax(1))
    assert_same(out.mean, out.lse)
    soft = ref.softplus_sweep(x, y, scale=1e6).value
    assert_same(soft, (1e6 * x @ y.T).clamp(min=0).sum(1))
    for value in (out.lse, out.mean, soft):
        assert torch.autograd.grad(value.sum(), x, retain_graph=True)[0].isfinite().all()


def test_softplus_keeps_its_small_part_and_its_second_derivative():
    x = torch.ones(1, 1, dtype=DOUBLE, requires_grad=True)
    y = torch.tensor([[22.0], [-22.0], [800.0], [-800.0]], dtype=DOUBLE)
    value = ref.softplus_sweep(x, y).value
    assert_same(value, torch.tensor([822 + 2 * math.log1p(math.exp(-22))], dtype=DOUBLE))
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    slope = 1 / (1 + math.exp(-22))
    assert_same(first, torch.tensor([[800 + 22 * (2 * slope - 1)]], dtype=DOUBLE))
    assert_same(second, torch.tensor([[2 * 22**2 * slope * (1 - slope)]], dtype=DOUBLE))


def test_empty_rows_give_exactly_zero_gradients_of_both_orders():
    x, y = randn(3, 2, grad=True), randn(4, 2, seed=1, grad=True)
    scale, bias = torch.tensor(1.5, dtype=DOUBLE, requires_grad=True), randn(4, seed=2, grad=True)
    inputs = (x, y, scale, bias)
    keep = (torch.zeros(3, dtype=torch.long), torch.ones(4, dtype=torch.long))
    out = ref.sweep(x, y, scale=scale, bias=bias, keep=keep, mean=True, columns=True)
    soft = ref.softplus_sweep(x, y, scale=scale, bias=bias, keep=keep)
    assert (out.lse == -math.inf).all() and (out.col_lse == -math.inf).all()
    assert not out.mean.any() and not out.col_mean.any() and not soft.value.any()
    values = [out.lse, out.col_lse, out.mean, out.col_mean, soft.value]
    upstream = [randn(*v.shape, seed=3).requires_grad_() for v in values]
    first = torch.autograd.grad(values, inputs, upstream, create_graph=True)
    second = torch.autograd.grad(first, (*inputs, *upstream), [randn(*g.shape) for g in first])
    assert all(not g.any() and not g.isnan().any() for g in (*first, *second))


@pytest.mark.parametrize("columns", [False, True])
def test_sweep_gradients_of_both_orders(columns):
    inputs = (
        randn(3, 2, grad=True), randn(4, 2, seed=1, grad=True),
        torch.tensor(1.3, dtype=DOUBLE, requires_grad=True), randn(4, seed=2, grad=True),
    )  # fmt: skip
    exclude = (torch.tensor([0, 1, 2]), torch.tensor([0, 0, 2, 3]))
    keep = (torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0, 0]))  # row 2 is empty

    def run(x, y, scale, bias):
        out = ref.sweep(
            x, y, scale=scale, bias=bias, exclude=exclude, keep=keep, normalize=True,
            mean=True, columns=columns,
        )  # fmt: skip
        return tuple(v[v.isfinite()] for v in out if v is not None)

    assert gradcheck(run, inputs) and gradgradcheck(run, inputs)


@pytest.mark.parametrize("keys", ["self", "per query"])
def test_gradients_of_the_other_key_forms(keys):
    x, own = randn(3, 2, grad=True), (torch.arange(3), torch.arange(3))
    inputs = (x,) if keys == "self" else (x, randn(3, 3, 2, seed=1, grad=True))

    def run(x, y=None):
        out = ref.sweep(x, y, scale=2.0, exclude=own, mean=True)
        return out.lse, out.mean, ref.softplus_sweep(x, y, bias=-1.0, exclude=own).value

    assert gradcheck(run, inputs) and gradgradcheck(run, inputs)


def test_row_dot():
    x, y = randn(4, 3, grad=True), randn(4, 2, 3, seed=1, grad=True)
    assert_same(ref.row_dot(x, y), torch.einsum("nd,nkd->nk", x, y))
    assert_same(ref.row_dot(x, y[:, 1]), torch.einsum("nd,nd->n", x, y[:, 1]))
    cosine = F.cosine_similarity(x[:, None], y, dim=-1)
    assert_same_with_grad(ref.row_dot(x, y, normalize=True), cosine, (x, y))
    assert gradgradcheck(lambda x, y: ref.row_dot(x, y, normalize=True), (x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_promoted_before_any_arithmetic(dtype):
    x, y = randn(6, 5).to(dtype), randn(7, 5, seed=1).to(dtype)
    calls = [
        lambda x, y: ref.sweep(x, y, scale=100.0, normalize=True).lse,
        lambda x, y: ref.softplus_sweep(x, y).value,
        lambda x, y: ref.row_dot(x, y[:6]),
        lambda x, y: ref.info_nce(x, y[:6], negatives=y, in_batch=True, temperature=0.01),
        lambda x, y: ref.cacr(x, y[:6], negatives=y),
        lambda x, y: ref.w_mse(torch.cat([x, y])[:12, :2].view(2, 6, 2), group_size=6),
    ]
    for call in calls:
        assert call(x, y).dtype == torch.float32
        torch.testing.assert_close(call(x, y), call(x.float(), y.float()), rtol=1e-6, atol=0)
