"""The oracle against itself: identities and hand-written formulas that need no other code."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from oracles import generator
from torch.autograd import gradcheck, gradgradcheck

from contrastive_kernels import reference as ref

DOUBLE = torch.float64
# sums of a few hundred float64 terms
TOLERANCE = dict(rtol=1e-12, atol=1e-12)


def randn(*shape, seed=0, grad=False):
    x = torch.randn(shape, dtype=DOUBLE, generator=generator(seed))
    return x.requires_grad_(grad)


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=-1)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def assert_same_with_grad(actual, expected, inputs):
    """Equal values and equal gradients under one random upstream gradient."""
    assert_same(actual, expected)
    upstream = randn(*actual.shape, seed=99)
    assert_same(
        torch.autograd.grad(actual, inputs, upstream, retain_graph=True),
        torch.autograd.grad(expected, inputs, upstream, retain_graph=True),
    )


# primitives


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
    assert out.rank.tolist() == [
        sum(v > t for v in z) for z, t in zip(rows, threshold, strict=True)
    ]
    assert out.count.tolist() == [len(z) for z in rows]
    assert_same(out.total, as_tensor([sum(z) for z in rows]))

    soft = ref.softplus_sweep(
        x, x if y is None else y, scale=scale, bias=bias, exclude=exclude, keep=keep,
        normalize=normalize, threshold=threshold,
    )  # fmt: skip
    assert_same(soft.value, as_tensor([sum(math.log1p(math.exp(v)) for v in z) for z in rows]))
    assert all(torch.equal(a, b) for a, b in zip(soft[1:], out[4:], strict=True))


def test_sweep_returns_only_what_was_asked():
    x = randn(4, 3)
    assert [v is None for v in ref.sweep(x, None)] == [False] + 6 * [True]
    assert [v is None for v in ref.softplus_sweep(x, None)] == [False] + 3 * [True]


def test_rank_counts_strictly_greater():
    x = torch.tensor([[1.0]], dtype=DOUBLE)
    y = torch.tensor([[1.0], [2.0], [2.0], [3.0]], dtype=DOUBLE)
    assert ref.sweep(x, y, threshold=torch.tensor([2.0], dtype=DOUBLE)).rank.item() == 1


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


# whitening


@pytest.mark.parametrize("method", ["cholesky", "zca", "newton_schulz"])
def test_whitened_groups_have_covariance_one(method):
    x = randn(2, 3, 40, 4) @ randn(4, 4, seed=1) + 5
    z = ref.whiten(x, method=method, iterations=30)
    identity = torch.eye(4, dtype=DOUBLE).expand(2, 3, 4, 4)
    torch.testing.assert_close(z.mT @ z / 39, identity, rtol=0, atol=1e-9)
    torch.testing.assert_close(z.mean(-2), torch.zeros(2, 3, 4, dtype=DOUBLE), rtol=0, atol=1e-9)
    assert_same(z[1, 2], ref.whiten(x[1, 2], method=method, iterations=30))


def test_whitening_matrices():
    eps, x = 0.05, randn(20, 3) @ randn(3, 3, seed=1)
    covariance = (1 - eps) * torch.cov(x.T) + eps * torch.eye(3, dtype=DOUBLE)
    centered = x - x.mean(0)
    lower = torch.linalg.lstsq(centered, ref.whiten(x, eps=eps)).solution.T
    assert_same(lower, torch.linalg.inv(torch.linalg.cholesky(covariance)))
    for method, tolerance in (("zca", 1e-12), ("newton_schulz", 1e-9)):
        z = ref.whiten(x, method=method, eps=eps, iterations=30)
        root = torch.linalg.lstsq(centered, z).solution
        expected = torch.eye(3, dtype=DOUBLE)
        torch.testing.assert_close(root, root.T, rtol=0, atol=tolerance)
        torch.testing.assert_close(root @ covariance @ root, expected, rtol=0, atol=tolerance)


def test_newton_schulz_follows_the_published_iteration_and_then_stays_stable():
    x = randn(30, 3) @ torch.diag(torch.tensor([1.0, 0.3, 0.01], dtype=DOUBLE))
    centered, covariance = x - x.mean(0), torch.cov(x.T)
    p = torch.eye(3, dtype=DOUBLE)
    for _ in range(5):
        p = 1.5 * p - 0.5 * p @ p @ p @ covariance / covariance.trace()
    assert_same(ref.whiten(x, method="newton_schulz"), centered @ p / covariance.trace().sqrt())
    zca = ref.whiten(x, method="zca")
    errors = [
        float((ref.whiten(x, method="newton_schulz", iterations=t) - zca).abs().max())
        for t in (1, 5, 10, 15, 40)
    ]
    assert errors == sorted(errors, reverse=True) and errors[1] > 0.1 and errors[4] < 1e-9


@pytest.mark.parametrize("method", ["cholesky", "zca", "newton_schulz"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_whiten_gradients_of_both_orders(method, eps):
    x = randn(2, 5, 2, grad=True)

    def run(x):
        return ref.whiten(x, method=method, eps=eps, iterations=3)

    assert gradcheck(run, x) and gradgradcheck(run, x)


def test_whiten_unknown_method():
    with pytest.raises(ValueError, match="method must be .* got 'svd'"):
        ref.whiten(randn(5, 2), method="svd")


# losses


N, D = 5, 4
INPUTS = (randn(N, D, grad=True), randn(N, D, seed=1, grad=True))
LOSSES = {
    "info_nce": ref.info_nce,
    "info_nce symmetric": lambda q, k: ref.info_nce(q, k, symmetric=True, alpha=9.0),
    "info_nce shared": lambda q, k: ref.info_nce(q, k, negatives=k.roll(1, 1), in_batch=True),
    "info_nce per query": lambda q, k: ref.info_nce(q, k, negatives=(q[:, None] + k)[:, :3]),
    "info_nce excluding everything": lambda q, k: ref.info_nce(
        q, k, exclude=(torch.zeros(N, dtype=torch.long),) * 2
    ),
    "eqco": ref.eqco,
    "nt_xent": ref.nt_xent,
    "clip_loss": lambda q, k: ref.clip_loss(q, k, q.square().sum()),
    "siglip_loss": lambda q, k: ref.siglip_loss(q, k, q.square().sum(), k.sum()),
    "sup_con": lambda q, k: ref.sup_con(torch.stack([q, k], 1), torch.tensor([0, 1, 0, 2, 1])),
    "dcl": ref.dcl,
    "dcl sigma": lambda q, k: ref.dcl(q, k, sigma=0.5),
    "debiased": ref.debiased,
    "hcl": ref.hcl,
    "nce": lambda q, k: ref.nce(q, k, k.flip(0), num_data=100, Z=50.0),
    "cacr": lambda q, k: ref.cacr(q, torch.stack([k, q + k], 1)),
    "cacr rbf": lambda q, k: ref.cacr(q, k, negatives=k.flip(1), cost="rbf", beta=0.5),
    "cacr_views": lambda q, k: ref.cacr_views(torch.stack([q, k, q - k]), alpha=2.0),
    "cacr_views rbf": lambda q, k: ref.cacr_views(torch.stack([q, k, q - k]), cost="rbf"),
    "cct": ref.cct,
    "w_mse": lambda q, k: ref.w_mse(
        torch.stack([torch.cat([q, k]), torch.cat([k, q * k])])[:, :, :2],
        group_size=5,
        permutations=torch.arange(10)[None],
    ),
    "intl": lambda q, k: ref.intl(torch.stack([q, k, q * k]), axis=1, lam=0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradients_of_both_orders(name):
    if name == "info_nce excluding everything":
        assert not torch.autograd.grad(LOSSES[name](*INPUTS), INPUTS[0])[0].any()
    assert LOSSES[name](*INPUTS).dtype == DOUBLE
    assert gradcheck(LOSSES[name], INPUTS)
    assert gradgradcheck(LOSSES[name], INPUTS)


TWO_TENSOR_LOSSES = ["info_nce", "eqco", "nt_xent", "dcl", "debiased", "hcl", "cacr", "cct"]


@pytest.mark.parametrize("name", TWO_TENSOR_LOSSES)
def test_reductions_and_normalize(name):
    loss, (a, b) = getattr(ref, name), INPUTS
    rows = loss(a, b, reduction="none")
    assert rows.shape == ((2 * N,) if name in ("nt_xent", "dcl", "debiased", "hcl") else (N,))
    assert_same(loss(a, b), rows.mean())
    assert_same(loss(a, b, reduction="sum"), rows.sum())
    by_hand = loss(F.normalize(a, dim=1), F.normalize(b, dim=1), normalize=False, reduction="none")
    assert_same_with_grad(rows, by_hand, INPUTS)
    assert not torch.allclose(loss(a, b, normalize=False), loss(a, b))
    with pytest.raises(ValueError, match="reduction must be .* got 'avg'"):
        loss(a, b, reduction="avg")


def test_info_nce_is_cross_entropy():
    q, k = INPUTS
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.1
    rows = F.cross_entropy(logits, torch.arange(N), reduction="none")
    columns = F.cross_entropy(logits.T, torch.arange(N), reduction="none")
    assert_same_with_grad(ref.info_nce(q, k, reduction="none"), rows, INPUTS)
    both = ref.info_nce(q, k, symmetric=True, reduction="none")
    assert_same_with_grad(both, (rows + columns) / 2, INPUTS)
    assert_same_with_grad(both, ref.clip_loss(q, k, 10.0, reduction="none"), INPUTS)


def test_info_nce_scale_replaces_temperature_and_has_a_gradient():
    q, k = INPUTS
    scale = torch.tensor(1 / 0.07, dtype=DOUBLE, requires_grad=True)
    assert_same(ref.info_nce(q, k, scale=scale), ref.info_nce(q, k, temperature=0.07))
    assert gradcheck(lambda s: ref.info_nce(q, k, scale=s), scale)


def info_nce_by_hand(positive, negatives):
    """positive: a number, negatives: a list of numbers; both logits."""
    return math.log(math.exp(positive) + sum(map(math.exp, negatives))) - positive


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("form", ["shared", "per query"])
@pytest.mark.parametrize("alpha", [None, 300.0])
def test_info_nce_candidates_exclude_and_key_bias(in_batch, form, alpha):
    n, m, t = 4, 6, 0.3
    q, k, shared, each = unit(n, D), unit(n, D, seed=1), unit(m, D, seed=2), unit(n, m, D, seed=3)
    negatives = shared if form == "shared" else each
    count = (n if in_batch else 0) + m
    row_ids = torch.tensor([0, 1, 1, 7])
    # the in-batch part repeats the row ids, so the diagonal is equal and rows 1 and 2 collide
    col_ids = torch.cat([row_ids[: n if in_batch else 0], torch.tensor([0, 5, 0, 1, 7, 9])])
    bias = randn(count, seed=4)
    rows = ref.info_nce(
        q, k, negatives=negatives, temperature=t, in_batch=in_batch, alpha=alpha,
        exclude=(row_ids, col_ids), key_bias=bias, reduction="none",
    )  # fmt: skip
    for i in range(n):
        keys = list(k) if in_batch else []
        keys += list(shared if form == "shared" else each[i])
        positive = float(q[i] @ k[i]) / t + (float(bias[i]) if in_batch else 0.0)
        logits = [
            float(q[i] @ keys[j]) / t + float(bias[j])
            for j in range(count)
            if not (in_batch and j == i) and row_ids[i] != col_ids[j]
        ]
        margin = 0.0 if alpha is None else math.log(alpha / len(logits))
        expected = info_nce_by_hand(positive, [z + margin for z in logits])
        assert float(rows[i]) == pytest.approx(expected, rel=1e-12)


def test_symmetric_key_bias_cancels_in_the_other_direction():
    q, k = INPUTS
    bias, log = randn(N, seed=4), []
    for key_bias in (None, bias):
        rows = ref.info_nce(q, k, key_bias=key_bias, reduction="none")
        both = ref.info_nce(q, k, key_bias=key_bias, symmetric=True, reduction="none")
        log.append(2 * both - rows)
    assert_same(*log)


def test_symmetric_with_negatives_gives_them_to_the_queries_only():
    q, k = INPUTS
    negatives, ids = randn(3, D, seed=5), torch.arange(N)
    row_ids, col_ids = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([1, 0, 1, 1, 7, 9, 2, 9])
    queries = ref.info_nce(
        q, k, negatives=negatives, in_batch=True, exclude=(row_ids, col_ids), alpha=8.0
    )
    keys = ref.info_nce(k, q, exclude=(col_ids[:N], row_ids), alpha=8.0)
    both = ref.info_nce(
        q, k, negatives=negatives, in_batch=True, exclude=(row_ids, col_ids), alpha=8.0,
        symmetric=True,
    )  # fmt: skip
    assert_same_with_grad(both, (queries + keys) / 2, INPUTS)
    assert_same(ref.info_nce(q, k, exclude=(ids, ids)), ref.info_nce(q, k))
    with pytest.raises(ValueError, match="symmetric must be False"):
        ref.info_nce(q, k, negatives=negatives, symmetric=True)


def test_eqco_is_the_multiplier_form_and_info_nce_at_alpha_k():
    q, k = INPUTS
    negatives, t, alpha = randn(7, D, seed=5), 0.2, 65536.0
    positive = F.cosine_similarity(q, k) / t
    s = F.normalize(q, dim=1) @ F.normalize(negatives, dim=1).T / t
    expected = torch.log(positive.exp() + alpha / 7 * s.exp().sum(1)) - positive
    assert_same_with_grad(ref.eqco(q, k, negatives=negatives, reduction="none"), expected, INPUTS)
    for count, options in ((7, {"negatives": negatives}), (N - 1, {})):
        plain = ref.info_nce(q, k, temperature=t, **options)
        assert_same_with_grad(ref.eqco(q, k, alpha=count, **options), plain, INPUTS)


def test_two_view_family():
    z1, z2 = INPUTS
    t = 0.1
    rows = ref.nt_xent(z1, z2, temperature=t, reduction="none")
    pairs = torch.arange(N).repeat(2)
    features = torch.cat([z1, z2])
    assert_same_with_grad(
        rows, ref.sup_con(features, pairs, temperature=t, reduction="none"), INPUTS
    )
    # both views of a sample, stacked: the same anchors in another order
    views = ref.sup_con(torch.stack([z1, z2], 1), torch.arange(N), temperature=t, reduction="none")
    assert_same_with_grad(rows, views.T.reshape(-1), INPUTS)
    # with the positive put back into the sum, decoupled becomes NT-Xent
    decoupled = ref.dcl(z1, z2, temperature=t, reduction="none")
    assert_same_with_grad(rows, F.softplus(decoupled, threshold=1000), INPUTS)
    # nothing to correct: debiased is NT-Xent
    plain = ref.debiased(z1, z2, temperature=t, tau_plus=0.0, reduction="none")
    assert_same_with_grad(rows, plain, INPUTS)
    # one anchor at a time, through the one-query form: all other features but the positive
    for i, positive in ((1, N + 1), (N + 2, 2)):
        others = [j for j in range(2 * N) if j not in (i, positive)]
        one = ref.info_nce(
            features[i][None], features[positive][None], negatives=features[others], temperature=t
        )
        assert_same(one, rows[i])


def test_swapping_the_views_swaps_the_anchors():
    z1, z2 = INPUTS
    for loss in (ref.nt_xent, ref.dcl, ref.debiased, ref.hcl):
        assert_same(loss(z1, z2, reduction="none").roll(N), loss(z2, z1, reduction="none"))


def test_dclw_weights():
    z1, z2 = INPUTS
    s = F.cosine_similarity(z1, z2)
    weight = 2 - N * F.softmax(s / 0.5, dim=0)
    assert_same(weight.mean(), torch.tensor(1.0, dtype=DOUBLE))
    difference = ref.dcl(z1, z2, sigma=0.5, reduction="none") - ref.dcl(z1, z2, reduction="none")
    assert_same_with_grad(difference, ((1 - weight) * s / 0.1).repeat(2), INPUTS)


@pytest.mark.parametrize("tau_plus, beta", [(0.1, 0.0), (0.1, 1.0), (0.6, 0.5), (0.6, 0.0)])
def test_debiased_and_hcl_by_hand(tau_plus, beta):
    z1, z2 = INPUTS
    t, count = 0.5, 2 * N - 2
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    rows, clamped = [], []
    for i in range(2 * N):
        s = torch.stack([z[i] @ z[j] for j in range(2 * N) if j % N != i % N])
        u = torch.exp(z[i] @ z[(i + N) % (2 * N)] / t)
        reweighted = count * torch.exp((1 + beta) * s / t).sum() / torch.exp(beta * s / t).sum()
        estimate = (reweighted - tau_plus * count * u) / (1 - tau_plus)
        floor = count * math.exp(-1 / t)
        clamped.append(bool(estimate < floor))
        rows.append(torch.log(1 + estimate.clamp(min=floor) / u))
    expected = torch.stack(rows)
    assert_same_with_grad(
        ref.hcl(z1, z2, temperature=t, tau_plus=tau_plus, beta=beta, reduction="none"),
        expected,
        INPUTS,
    )
    if beta == 0:
        debiased = ref.debiased(z1, z2, temperature=t, tau_plus=tau_plus, reduction="none")
        assert_same_with_grad(debiased, expected, INPUTS)
    assert any(clamped) == (tau_plus == 0.6) and not all(clamped)


def test_sup_con_by_hand():
    features, labels, t = (
        randn(2 * N, D, grad=True),
        torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 1, 4]),
        0.3,
    )
    z = F.normalize(features, dim=1)
    rows = []
    for i in range(2 * N):
        others = [a for a in range(2 * N) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        logits = z @ z[i] / t
        total = torch.logsumexp(logits[others], 0)
        terms = [total - logits[p] for p in positives]
        rows.append(sum(terms) / len(terms) if terms else 0.0 * total)
    expected = torch.stack(rows)
    assert (expected == 0).sum() == 2, "two anchors without a positive"
    options = dict(temperature=t, reduction="none")
    assert_same_with_grad(ref.sup_con(features, labels, **options), expected, (features,))
    assert_same(ref.sup_con(features, labels, temperature=t), expected.sum() / (2 * N))
    scaled = ref.sup_con(features, labels, base_temperature=0.07, **options)
    assert_same(scaled, expected * t / 0.07)


def test_siglip_by_hand():
    a, b = INPUTS
    z = 12.0 * F.cosine_similarity(a[:, None], b[None], dim=-1) - 10.0
    rows = F.softplus(z, threshold=1000).sum(1) - z.diagonal()
    assert_same_with_grad(ref.siglip_loss(a, b, 12.0, -10.0, reduction="none"), rows, INPUTS)
    assert_same(ref.siglip_loss(a, b, 12.0, -10.0), rows.sum() / N)


@pytest.mark.parametrize("form", ["shared", "per query"])
def test_nce_is_its_probabilities(form):
    q, k = INPUTS
    t, num_data, m = 0.2, 1000, 6
    negatives = randn(m, D, seed=5) if form == "shared" else randn(N, m, D, seed=5)
    positive = F.cosine_similarity(q, k)[:, None] / t
    logits = torch.cat([positive, F.cosine_similarity(q[:, None], negatives, dim=-1) / t], 1)
    estimate = float(num_data * logits.detach().exp().mean())
    for given, Z in ((estimate, None), (77.0, 77.0), (77.0, torch.tensor(77.0, dtype=DOUBLE))):
        p = logits.exp() / given
        noise = m / num_data
        expected = -(p[:, 0] / (p[:, 0] + noise)).log() - (noise / (p[:, 1:] + noise)).log().sum(1)
        options = dict(temperature=t, num_data=num_data, Z=Z, reduction="none")
        assert_same_with_grad(ref.nce(q, k, negatives, **options), expected, INPUTS)
    # the sigmoid form of SigLIP, with the partition function as its bias
    bias = -math.log(77.0) - math.log(m / num_data)
    soft = F.softplus(-(positive[:, 0] + bias)) + F.softplus(logits[:, 1:] + bias).sum(1)
    assert_same(ref.nce(q, k, negatives, **options), soft)


# CACR


def cacr_by_hand(query, positives, negatives, t_pos, t_neg, alpha, beta):
    """Lists of vectors: positives of each query, negatives of each query."""
    rows = []
    for q, near, far in zip(query, positives, negatives, strict=True):
        pull = torch.stack([(q - p) @ (q - p) for p in near])
        push = torch.stack([(q - p) @ (q - p) for p in far])
        w_pull = torch.exp(t_pos * pull) / torch.exp(t_pos * pull).sum()
        w_push = torch.exp(-t_neg * push) / torch.exp(-t_neg * push).sum()
        rows.append(alpha * (w_pull * pull).sum() - beta * (w_push * push).sum())
    return torch.stack(rows)


@pytest.mark.parametrize("normalize", [False, True])
def test_cacr_by_hand(normalize):
    q, p, shared = randn(N, D, grad=True), randn(N, 3, D, seed=1, grad=True), randn(6, D, seed=2)
    length = (lambda x: F.normalize(x, dim=-1)) if normalize else (lambda x: x)
    options = dict(t_pos=0.7, t_neg=1.3, alpha=2.0, beta=0.5)
    others = [[length(p[j, c]) for j in range(N) if j != i for c in range(3)] for i in range(N)]
    for given, negatives in ((None, others), (shared, N * [length(shared)])):
        actual = ref.cacr(q, p, negatives=given, normalize=normalize, reduction="none", **options)
        expected = cacr_by_hand(length(q), length(p), negatives, **options)
        assert_same_with_grad(actual, expected, (q, p))
    assert_same(ref.cct(q, p, **options), ref.cacr(q, p, **options))


def test_one_positive_is_pulled_without_weights():
    q, p = INPUTS
    actual = ref.cacr(q, p, alpha=3.0, beta=0.0, reduction="none")
    expected = 3 * (F.normalize(q, dim=1) - F.normalize(p, dim=1)).square().sum(1)
    assert_same_with_grad(actual, expected, INPUTS)


@pytest.mark.parametrize("detach", [False, True])
def test_cacr_gradient_coefficients(detach):
    """dL/dd for the attraction w (1 + t (d - mean)), for the repulsion -w (1 - t (d - mean)); the
    bracket is 1 with detached weights."""
    q, p, k = randn(N, D), randn(N, 3, D, seed=1), randn(6, D, seed=2)
    t_pos, t_neg = 0.7, 1.3
    pull = (q[:, None] - p).square().sum(-1)
    push = (q[:, None] - k).square().sum(-1)
    w_pull, w_push = (t_pos * pull).softmax(1), (-t_neg * push).softmax(1)
    h_pull, h_push = w_pull, -w_push
    if not detach:
        h_pull = h_pull * (1 + t_pos * (pull - (w_pull * pull).sum(1, keepdim=True)))
        h_push = h_push * (1 - t_neg * (push - (w_push * push).sum(1, keepdim=True)))
    to_p = 2 * h_pull[..., None] * (p - q[:, None])
    to_k = 2 * h_push[..., None] * (k - q[:, None])
    inputs = [x.requires_grad_() for x in (q, p, k)]
    value = ref.cacr(
        q, p, negatives=k, t_pos=t_pos, t_neg=t_neg, detach_weights=detach, normalize=False,
        reduction="sum",
    )  # fmt: skip
    expected = (-to_p.sum(1) - to_k.sum(1), to_p, to_k.sum(0))
    assert_same(torch.autograd.grad(value, inputs), expected)


def test_detached_cacr_has_the_gradient_of_decoupled_contrastive_learning():
    q, k = INPUTS
    t_neg = 0.9
    tau = 1 / (2 * t_neg)
    s = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / tau
    others = s.masked_fill(torch.eye(N, dtype=torch.bool), -math.inf)
    decoupled = (others.logsumexp(1) - s.diagonal()).mean()
    cacr = ref.cacr(q, k, t_neg=t_neg, detach_weights=True)
    assert_same(torch.autograd.grad(cacr, INPUTS), torch.autograd.grad(2 * tau * decoupled, INPUTS))


def test_detaching_changes_the_gradient_and_not_the_value():
    q, p = randn(N, D, grad=True), randn(N, 3, D, seed=1)
    for cost in ("euclidean", "rbf"):
        live = ref.cacr(q, p, cost=cost)
        detached = ref.cacr(q, p, cost=cost, detach_weights=True)
        assert_same(live, detached)
        gradients = [torch.autograd.grad(loss, q)[0] for loss in (live, detached)]
        assert not torch.allclose(*gradients)


def test_cacr_rbf_from_two_log_sums():
    q, k = INPUTS
    t_neg, t, beta = 1.5, 2.0, 0.7
    d = (F.normalize(q, dim=1)[:, None] - F.normalize(k, dim=1)).square().sum(-1)
    own = torch.eye(N, dtype=torch.bool)
    a, b = ((-c * d).masked_fill(own, -math.inf).logsumexp(1) for c in (t_neg + t, t_neg))
    expected = d.diagonal().mean() + beta * ((a - b).logsumexp(0) - math.log(N))
    actual = ref.cacr(q, k, t_neg=t_neg, beta=beta, cost="rbf", rbf_t=t)
    assert_same_with_grad(actual, expected, INPUTS)
    for loss, inputs in ((ref.cacr, (q, k)), (ref.cacr_views, (torch.stack([q, k]),))):
        with pytest.raises(ValueError, match="reduction must be 'mean' with cost='rbf'"):
            loss(*inputs, cost="rbf", reduction="none")
        with pytest.raises(ValueError, match="cost must be .* got 'cosine'"):
            loss(*inputs, cost="cosine")


@pytest.mark.parametrize("cost", ["euclidean", "rbf"])
def test_cacr_views_is_made_of_one_query_parts(cost):
    views = randn(4, N, D, grad=True)
    options = dict(t_pos=0.8, t_neg=1.2)
    pulls = [
        ref.cacr(
            views[v], views[[u for u in range(4) if u != v]].transpose(0, 1), beta=0.0, **options
        )
        for v in range(4)
    ]
    pushes = [
        ref.cacr(views[v], views[u], alpha=0.0, cost=cost, **options)
        for v, u in combinations(range(4), 2)
    ]
    expected = 2.0 * sum(pulls) / 4 + 0.5 * sum(pushes) / 6
    actual = ref.cacr_views(views, alpha=2.0, beta=0.5, cost=cost, **options)
    assert_same_with_grad(actual, expected, (views,))
    two = ref.cacr_views(views[:2], cost=cost, **options)
    assert_same_with_grad(two, ref.cacr(views[0], views[1], cost=cost, **options), (views,))


# W-MSE


@pytest.mark.parametrize("method", ["cholesky", "zca"])
def test_w_mse_by_hand_and_in_sample_order(method):
    views, permutation = randn(3, 12, 2, grad=True), torch.randperm(12)
    options = dict(group_size=6, method=method, eps=0.02, permutations=permutation[None])
    rows = torch.zeros(12, dtype=DOUBLE)
    squares = torch.zeros(12, dtype=DOUBLE)
    for group in permutation.view(2, 6):
        z = [ref.whiten(view[group], method=method, eps=0.02) for view in views]
        for a, b in combinations(z, 2):
            rows = rows.index_add(0, group, (2 - 2 * F.cosine_similarity(a, b)) / 3)
            squares = squares.index_add(0, group, (a - b).square().mean(1) / 3)
    assert_same_with_grad(ref.w_mse(views, reduction="none", **options), rows, (views,))
    assert_same(ref.w_mse(views, **options), rows.mean())
    assert_same(ref.w_mse(views, normalize=False, **options), squares.mean())


def test_w_mse_is_linear_in_the_number_of_views():
    views = randn(4, 10, 3)
    z = F.normalize(torch.stack([ref.whiten(view) for view in views]), dim=-1)
    expected = 2 - 2 * ((z.sum(0).square().sum(1) - 4) / (4 * 3))
    assert_same(ref.w_mse(views, group_size=10, reduction="none"), expected)


def test_w_mse_permutations():
    views = randn(2, 12, 2)
    options = dict(group_size=4)
    drawn = [
        ref.w_mse(views, iterations=3, generator=generator(seed), **options) for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and drawn[0] != drawn[2]
    permutations = torch.stack([torch.randperm(12) for _ in range(3)])
    each = [ref.w_mse(views, permutations=p[None], **options) for p in permutations]
    assert_same(ref.w_mse(views, permutations=permutations, **options), sum(each) / 3)
    same = views[:1].repeat(2, 1, 1)
    assert abs(float(ref.w_mse(same, **options))) < 1e-12


# INTL


@pytest.mark.parametrize("axis", [0, 1])
def test_intl_by_the_spectrum(axis):
    """Each step of iterative normalisation acts on the eigenvalues alone."""
    views = randn(3, 6, 11) if axis == 0 else randn(3, 11, 6)
    transformed, traces = [], []
    for view in views:
        centered = view - view.mean(1 - axis, keepdim=True)
        values, vectors = torch.linalg.eigh(torch.cov(view if axis == 0 else view.T))
        factor = torch.ones_like(values)
        for _ in range(4):
            factor = 1.5 * factor - 0.5 * factor**3 * values / values.sum()
        factor = factor / values.sum().sqrt()
        matrix = (vectors * factor) @ vectors.T
        transformed.append(matrix @ centered if axis == 0 else centered @ matrix)
        covariance = (vectors * (values * factor**2)) @ vectors.T
        traces.append((covariance.diagonal() - 1).square().sum())
    rows = [
        2 - 2 * F.cosine_similarity(transformed[v], transformed[0]) + 0.3 * (traces[v] + traces[0])
        for v in (1, 2)
    ]
    expected = (rows[0] + rows[1]) / 2
    assert_same(ref.intl(views, axis=axis, lam=0.3, reduction="none"), expected)
    assert_same(ref.intl(views, axis=axis, lam=0.3), expected.mean())


def test_mi_lower_bound():
    q = torch.zeros(N, D, dtype=DOUBLE, requires_grad=True)
    loss = ref.info_nce(q, q)
    bound = ref.mi_lower_bound(loss, N - 1)
    assert not bound.requires_grad
    assert float(bound) == pytest.approx(0.0, abs=1e-12)
    q, k = INPUTS
    perfect = ref.info_nce(q, q, temperature=1e-3)
    assert float(ref.mi_lower_bound(perfect, N - 1)) == pytest.approx(math.log(N), rel=1e-12)
    weak = ref.info_nce(q, k)
    assert float(ref.mi_lower_bound(weak, torch.tensor(N - 1))) == pytest.approx(
        math.log(N) - weak.item(), rel=1e-12
    )
