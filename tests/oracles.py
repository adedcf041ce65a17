"""Helpers of the tests: random features, gradients, and the error budget against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from contrastive_kernels.backends import unusable_reason

DEVICE = torch.get_default_device().type
BACKENDS = [b for b in ("reference", "cpu", "triton") if unusable_reason(b, DEVICE) is None]
DOUBLE = torch.float64


def interpreted(backend: str) -> bool:
    """Whether its kernels are interpreted here, which is slow."""
    return backend == "triton" and DEVICE == "cpu"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Normal numbers drawn in float64, then rounded to `dtype`."""
    return torch.randn(shape, dtype=DOUBLE, generator=generator(seed)).to(dtype)


def views(n: int, dim: int, *others: tuple[int, ...]) -> list[Tensor]:
    """Two correlated views (n, dim), then further features of the given shapes."""
    z1 = randn(n, dim, seed=1)
    z2 = z1 + 0.5 * randn(n, dim, seed=2)
    return [z1, z2, *(randn(*shape, seed=3 + i) for i, shape in enumerate(others))]


def sample(backend: str, combinations: list, seed: int, every: int = 5) -> list:
    """All combinations; a fifth, by the seed, for Triton, which interprets or compiles each."""
    return combinations[seed % every :: every] if backend == "triton" else combinations


def value_and_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], seed: int = 99
) -> list[Tensor]:
    """function(*inputs), and the gradients that an upstream gradient of random numbers gives: of
    the inputs that require one, or if none does of every floating one."""
    learned = [t.requires_grad for t in inputs]
    if not any(learned):
        learned = [t.is_floating_point() for t in inputs]
    inputs = [t.detach().requires_grad_(need) for t, need in zip(inputs, learned, strict=True)]
    value = function(*inputs)
    upstream = randn(*value.shape, seed=seed).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, differentiable(inputs), upstream)]


def differentiable(inputs: list[Tensor]) -> list[Tensor]:
    return [t for t in inputs if t.requires_grad]


def assert_equal_in_double(
    actual: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Value and gradients agree to the rounding of float64, each relative to its largest entry."""
    got = value_and_gradients(actual, inputs)
    wanted = value_and_gradients(expected, inputs)
    for which, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, (which, a.shape, b.shape)
        error = (a - b).abs().max()
        assert error <= 1e-11 * (1 + b.abs().max()), f"output {which}: error {error:.2e}"


def assert_within_budget(
    actual: Callable[..., Tensor],
    dense: Callable[..., Tensor],
    inputs: list[Tensor],
    slack: float = 64.0,
) -> None:
    """error(actual) <= 2 error(dense) + slack * eps * size, for the value and every gradient.

    Errors are root mean squares against `dense` in float64 on the same, already rounded inputs;
    `dense` itself runs in the dtype of the inputs (where it overflows its error counts as 0). eps
    is that of the dtype the output has; the oracle's own rounding is allowed for too.
    """
    widened = [t.double() if t.is_floating_point() else t for t in inputs]
    oracle = value_and_gradients(dense, widened)
    got = value_and_gradients(actual, inputs)
    eager = value_and_gradients(dense, inputs)
    for which, (a, b, exact) in enumerate(zip(got, eager, oracle, strict=True)):
        assert torch.isfinite(a).all(), f"output {which} is not finite"
        rounding = torch.finfo(a.dtype).eps * rms(exact) + torch.finfo(DOUBLE).eps
        budget = 2 * rms(b.double() - exact).nan_to_num(0.0, 0.0) + slack * rounding
        error = rms(a.double() - exact)
        assert error <= budget, f"output {which}: error {error:.2e}, budget {budget:.2e}"


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
