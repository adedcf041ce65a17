"""The losses of the oracle against formulas written by hand, and against one another."""

import math

import pytest
import torch
import torch.nn.functional as F
from identities import INPUTS, D, N, assert_same, assert_same_with_grad, randn, unit
from oracles import DOUBLE
from torch.autograd import gradcheck, gradgradcheck

from contrastive_kernels import reference as ref

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
