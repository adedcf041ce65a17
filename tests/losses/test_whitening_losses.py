"""What is particular to w_mse and intl; their values and gradients are in the table of losses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from loss_calls import backends
from oracles import DEVICE, generator, randn

import contrastive_kernels as ck


@pytest.mark.parametrize("backend", backends("w_mse"))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_w_mse_draws_its_permutations(backend, reduction):
    views = randn(2, 24, 3)
    options = {"group_size": 8, "iterations": 3, "reduction": reduction, "backend": backend}
    loss = ck.w_mse(views, generator=generator(5), **options)
    drawn = generator(5)
    permutations = torch.stack([torch.randperm(24, generator=drawn) for _ in range(3)])
    given = ck.w_mse(views, permutations=permutations, **options)
    torch.testing.assert_close(loss, given, rtol=1e-12, atol=0)
    other = ck.w_mse(views, generator=generator(6), **options)
    assert not torch.allclose(loss, other)


def test_w_mse_of_nearly_equal_views_keeps_its_digits():
    """2 - 2 cos would round 1e-8 away in float32."""
    view = randn(64, 8)
    views = torch.stack((view, view + 1e-4 * randn(64, 8, seed=1)))
    options = {"group_size": 64, "permutations": torch.arange(64)[None], "eps": 0.0}
    exact = ck.w_mse(views, **options)
    loss = ck.w_mse(views.float(), **options)
    assert exact < 1e-6
    torch.testing.assert_close(loss.double(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "loss",
    [
        partial(ck.w_mse, group_size=8, iterations=1),
        partial(ck.w_mse, group_size=8, iterations=3, normalize=False),
        partial(ck.intl, axis=0),
        partial(ck.intl, axis=1),
    ],
    ids=["w_mse", "w_mse of several permutations", "intl of samples", "intl of features"],
)
def test_half_views_are_those_numbers_in_float32(loss, dtype):
    """Bit for bit: nothing but the gradient is rounded, and that once."""
    views = randn(3, 24, 5, dtype=torch.float32).to(dtype)
    values, gradients = [], []
    for leaf in (views.clone().requires_grad_(), views.float().requires_grad_()):
        drawn = {"generator": generator(5)} if loss.func is ck.w_mse else {}
        values.append(loss(leaf, reduction="none", **drawn))
        weights = randn(24, seed=1, dtype=torch.float32)
        gradients.append(torch.autograd.grad(values[-1], leaf, weights)[0])
    assert values[0].dtype == torch.float32 and torch.equal(*values)
    assert gradients[0].dtype == dtype and gradients[0].any()
    assert torch.equal(gradients[0], gradients[1].to(dtype))


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((1, 8, 3), {"group_size": 8}, r"views must have shape \(V, N, D\) with V >= 2"),
        ((8, 3), {"group_size": 8}, "views must have shape"),
        ((2, 12, 3), {"group_size": 8}, "group_size must divide N = 12, got 8"),
        ((2, 12, 3), {"group_size": 0}, "group_size must divide N = 12, got 0"),
        ((2, 12, 3), {"group_size": 3}, "group_size must be above D = 3"),
        ((2, 12, 3), {"group_size": 6, "iterations": 0}, "iterations must be at least 1"),
        (
            (2, 12, 3),
            {"group_size": 6, "permutations": torch.arange(6)[None]},
            r"permutations must have shape \(1, 12\), got \(1, 6\)",
        ),
    ],
)
def test_w_mse_bad_input(shape, options, message):
    with pytest.raises(ValueError, match=message):
        ck.w_mse(torch.randn(shape), **options)


def test_w_mse_bad_permutations():
    with pytest.raises(TypeError, match="permutations must be an integer tensor"):
        ck.w_mse(torch.randn(2, 12, 3), group_size=6, permutations=torch.rand(1, 12))


@pytest.mark.parametrize("axis", [0, 1])
def test_intl_of_a_collapsed_view(axis):
    """Constant: what is made of it is 0, and so is its gradient; others still have theirs."""
    views = torch.randn(2, 6, 9)
    views[1] = 0.5
    loss = ck.intl(views.requires_grad_(), axis=axis, lam=0.1, reduction="none")
    alone = ck.intl(views.detach()[:1].repeat(2, 1, 1), axis=axis, lam=0.1)
    expected = 2 + 0.5 * alone + 0.1 * views.shape[1 + axis]
    torch.testing.assert_close(loss.detach(), expected.expand(6))
    (gradient,) = torch.autograd.grad(loss.sum(), views)
    assert 0 < gradient[0].abs().max() < 10 and gradient[1].count_nonzero() == 0


@pytest.mark.skipif(DEVICE != "cpu", reason="the error comes later on a GPU")
def test_intl_names_a_view_that_is_not_finite():
    views = torch.randn(3, 6, 9)
    views[2, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="the covariance of group 2 of 3 is not finite"):
        ck.intl(views)


def test_intl_has_no_kernels():
    with pytest.raises(RuntimeError, match="it has no kernels for this operation"):
        ck.intl(torch.randn(2, 6, 9), backend="cuda")
