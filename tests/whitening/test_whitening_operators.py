"""Operators of whitening: half samples, and what torch.ops may hand them."""

from __future__ import annotations

import pytest
import torch
from oracles import DEVICE, DOUBLE, randn
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels.backends import CPU_ERROR
from contrastive_kernels.whitening import operators

METHODS = ["cholesky", "zca", "newton_schulz"]
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(7, 3), (2, 17, 16), (1, 37, 31), (3, 70, 33), (2, 129, 65), (2, 10, 40)]


def operators_of(method: str, x: Tensor, kernel: str) -> tuple:
    """The operator of a method and its backward, with the options of one and all that the other
    takes, for the groups x."""
    forward = getattr(operators, f"whiten_{method}")
    backward = getattr(operators, f"whiten_{method}_backward")
    options: tuple = (0.1, kernel)
    if method == "newton_schulz":
        options = (0.1, 4, kernel)
    z, *rest, _info = (t.detach() for t in forward(x, *options))
    saved = (x.detach(), *rest) if method == "newton_schulz" else (z, *rest, x.dtype)
    upstream = randn(*x.shape, seed=1, dtype=z.dtype)
    return forward, backward, options, (upstream, *saved, *options)


@pytest.mark.skipif(CPU_ERROR is not None or DEVICE != "cpu", reason="no CPU kernels")
@pytest.mark.parametrize("method", METHODS)
def test_kernels_refuse_what_does_not_fit(method):
    """Operators that torch.ops reaches: C++ trusts types and shapes."""
    x = randn(2, 6, 3, dtype=torch.float32)
    forward, backward, options, saved = operators_of(method, x, "cpu")
    with pytest.raises(TypeError, match="x must be float32, float64, .* got torch.int64"):
        forward(x.long(), *options)
    backward(*saved)
    for i, given in enumerate(saved):
        if not isinstance(given, Tensor):
            continue
        with pytest.raises(TypeError, match="must be torch.float.*, got torch.float"):
            backward(*saved[:i], given.double(), *saved[i + 1 :])
        with pytest.raises(ValueError, match=r"must have shape \(.*\), got \("):
            backward(*saved[:i], given[:1], *saved[i + 1 :])


@pytest.mark.skipif(CPU_ERROR is not None or DEVICE != "cpu", reason="no CPU kernels")
def test_kernels_of_view_distance_refuse_what_does_not_fit():
    z, grad = randn(3, 5, 4), randn(5, seed=1)
    with pytest.raises(TypeError, match="z must be torch.float32, got torch.bfloat16"):
        operators.view_distance(z.bfloat16(), True)
    with pytest.raises(TypeError, match="grad must be torch.float64, got torch.float32"):
        operators.view_distance_backward(grad.float(), z, True)
    with pytest.raises(ValueError, match=r"grad must have shape \(5,\), got \(4,\)"):
        operators.view_distance_backward(grad[:4], z, True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_samples_are_those_numbers_in_float32(shape, method, dtype, path):
    """Bit for bit: they are converted on the way, and their gradient is rounded once."""
    x = randn(*shape, dtype=torch.float32).to(dtype).transpose(-2, -1).contiguous().mT
    eps, upstream = 0.1 if shape[-2] <= shape[-1] else 0.0, randn(*shape, seed=1)
    runs = []
    for leaf in (x.detach().requires_grad_(), x.float().requires_grad_()):
        z = ck.whiten(leaf, method=method, eps=eps)
        assert z.dtype == torch.float32
        runs.append((z, torch.autograd.grad(z, leaf, upstream.float())[0]))
    (z, gradient), (z_of_float, gradient_of_float) = runs
    assert torch.equal(z, z_of_float)
    assert gradient.dtype == dtype and gradient.any()
    assert torch.equal(gradient, gradient_of_float.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_half_groups_that_fail_leave_the_others_alone(method, dtype, path):
    x = randn(4, 9, 8, dtype=torch.float32).to(dtype)
    x[1, 4, 2], x[2, 0, 0] = torch.inf, torch.nan
    fine = [0, 3]
    leaf = x.requires_grad_()
    z, ok = ck.whiten(leaf, method=method, return_info=True)
    assert ok.tolist() == [True, False, False, True]
    assert z[1:3].isnan().all()
    (gradient,) = torch.autograd.grad(z, leaf, randn(4, 9, 8, seed=1, dtype=torch.float32))
    assert gradient.dtype == dtype and not gradient[1:3].any()
    alone = x[fine].detach().requires_grad_()
    (expected,) = torch.autograd.grad(
        ck.whiten(alone, method=method), alone,
        randn(4, 9, 8, seed=1, dtype=torch.float32)[fine],
    )  # fmt: skip
    assert torch.equal(gradient[fine], expected) and expected.any()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_operators_pass_opcheck(method, dtype, path):
    x = randn(2, 6, 3, dtype=dtype).requires_grad_()
    forward, backward, options, saved = operators_of(method, x, "auto")
    torch.library.opcheck(forward, (x, *options))
    torch.library.opcheck(backward, saved)


@pytest.mark.parametrize("normalize", [True, False])
def test_operators_of_w_mse_pass_opcheck(normalize, path):
    z, grad = randn(3, 5, 4).requires_grad_(), randn(5, seed=1)
    torch.library.opcheck(operators.view_distance, (z, normalize))
    torch.library.opcheck(operators.view_distance_backward, (grad, z.detach(), normalize))
    permutations = torch.stack([torch.randperm(5) for _ in range(2)])
    torch.library.opcheck(operators.permute_rows, (z, permutations))
    torch.library.opcheck(operators.permute_rows_backward, (randn(3, 10, 4, seed=1), permutations))
