"""How a drop-in is held against its peer."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence

import torch
from oracles import DOUBLE, randn, rms
from torch import Tensor, nn

from contrastive_kernels.backends import CPU_BFLOAT16
from contrastive_kernels.integrations.swap import release

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def since(distribution: str, version: str) -> bool:
    """Whether a package is installed in `version` or a newer one, or is not there."""
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return True
    return release(found) >= release(version)


def clustered(*shape: int, seed: int = 0, spread: float = 0.5) -> Tensor:
    """Features (..., D) that share a direction, so that similarities are far from 0."""
    return randn(*shape, seed=seed) * spread + randn(shape[-1], seed=1000)


def run(loss: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """loss(*inputs) and its gradients, from an upstream gradient, in float64; features in dtype.

    Inputs are rounded to `dtype` unless they are integers; a module loss gives its parameters'
    gradients too.
    """
    leaves = [t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs]
    sources = [t for t in leaves if t.requires_grad]
    if isinstance(loss, nn.Module):
        sources += [p for p in loss.parameters() if p.requires_grad]
    value = loss(*leaves)
    upstream = randn(*value.shape, seed=99).to(value.dtype)
    gradients = torch.autograd.grad(value, sources, upstream, allow_unused=True)
    pairs = zip(sources, gradients, strict=True)
    filled = (torch.zeros_like(s) if g is None else g for s, g in pairs)
    return [t.detach().to(DOUBLE) for t in (value, *filled)]


def assert_conforms(
    fused: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    bfloat16: bool = True,
) -> None:
    """Value and gradients are the peer's: in float64 within 1e-10, in float32 within 1e-5 of its
    float64 result on the same inputs, each relative to the largest entry (and for entries that are
    0, the rounding of a logit of 100); and bfloat16 is no further from it than the peer's bfloat16,
    or than the rounding of gradients.
    """
    for dtype, tolerance in TOLERANCE.items():
        rounded = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
        for which, (ours, theirs) in enumerate(
            zip(run(fused, rounded, dtype), run(peer, rounded, DOUBLE), strict=True)
        ):
            error = (ours - theirs).abs().max()
            limit = tolerance * theirs.abs().max() + 100 * torch.finfo(dtype).eps
            assert error <= limit, f"{dtype}, output {which}: {error:.2e} above {limit:.2e}"
    if not bfloat16:
        return
    rounded = [t.bfloat16() if t.is_floating_point() else t for t in inputs]
    exact = run(peer, rounded, DOUBLE)
    eager, ours = (run(loss, rounded, torch.bfloat16) for loss in (peer, fused))
    # where ours rounds weights too, its error and eager's are two draws of the same size: of a row
    # of a few features one may be twice the other
    draws = 2 if CPU_BFLOAT16 else 1
    for which, (a, b, wanted) in enumerate(zip(ours, eager, exact, strict=True)):
        budget = (
            draws * rms(b - wanted) + 2**-9 * rms(wanted) + 100 * torch.finfo(torch.float32).eps
        )
        assert rms(a - wanted) <= budget, f"bfloat16, output {which}: above {budget:.2e}"
