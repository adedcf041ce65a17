"""CACR in the oracle, by hand, and its gradient by its coefficients."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from identities import INPUTS, D, N, assert_same, assert_same_with_grad, randn

from contrastive_kernels import reference as ref


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
