"""The oracle of whitening, and of the losses that are made of it."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from identities import assert_same, assert_same_with_grad, randn
from oracles import DOUBLE, generator
from torch.autograd import gradcheck, gradgradcheck

from contrastive_kernels import reference as ref


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
