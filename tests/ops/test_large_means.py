"""The mean of logits of 1e3 to 1e7 and its gradients, which are of z - mean.

Logits are large whole numbers plus small ones, or that times log 2 where kernels count in units of
it: float32 holds them exactly, and any error is that of the statistics.
"""

from __future__ import annotations

import math

import oracles
import pytest
import sweeps
import torch
from sweep_cases import FUSED, assert_close, needs_fused

from contrastive_kernels import reference

pytestmark = needs_fused

UNITS = {"cpu": 1.0, "triton": math.log(2)}
ROWS, KEYS, D = 37, 131, 5
CASES = ("shared", "columns", "ids", "bias", "own", "itself", "chunks", "equal")


def whole_numbers(*shape: int, seed: int, first: float) -> torch.Tensor:
    """Features `first`, then numbers of -1, 0, 1."""
    x = torch.randint(-1, 2, shape, generator=oracles.generator(seed)).float()
    x[..., 0] = first
    return x


def results(sweep, x, y, unit, bias, options):
    """The means, and all gradients for random ones of lse and mean."""
    x, scale = x.clone().requires_grad_(), torch.tensor(unit).to(x.dtype).requires_grad_()
    leaves = [x, scale]
    given = y
    if isinstance(y, torch.Tensor):
        given = y.clone().requires_grad_()
        leaves.append(given)
    if bias is not None:
        bias = bias.to(x.dtype).requires_grad_()
        leaves.append(bias)
    out = sweep(x, given, scale=scale, bias=bias, mean=True, **options)
    found = [t for t in (out.lse, out.mean, out.col_lse, out.col_mean) if t is not None]
    upstream = [oracles.randn(*t.shape, seed=k).to(t.dtype) for k, t in enumerate(found)]
    return [*found, *torch.autograd.grad(found, leaves, upstream)]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2**10, 2**16, 2**22])
def test_gradients_of_the_mean(backend, case, size):
    root = math.isqrt(size) if case == "itself" else size
    x = whole_numbers(ROWS, D, seed=1, first=root)
    y = whole_numbers(*(ROWS,) * (case == "own"), KEYS, D, seed=2, first=1)
    if case == "equal":
        y = y[:1].expand(KEYS, D).contiguous()
    ids = tuple(torch.arange(n) % 4 for n in (ROWS, KEYS))
    options = {"exclude": ids} if case == "ids" else {}
    options |= {"columns": True} if case in ("columns", "bias", "equal") else {}
    bias = (torch.arange(KEYS) % 3).float() * UNITS[backend] if case == "bias" else None
    if case == "itself":
        y, options = None, {"exclude": (ids[0], ids[0])}
    given = [y[:50], y[50:51], y[51:]] if case == "chunks" else y
    unit = UNITS[backend]
    got = results(sweeps.sweep, x, given, unit, bias, options | {"backend": backend})
    # the exact logits, without what rounding took from the unit
    wide = None if bias is None else (bias / unit).round().double() * unit
    right = results(
        reference.sweep, x.double(), None if y is None else y.double(), unit, wide, options
    )
    if case == "chunks":
        del right[-1]  # of the keys
    for which, (a, e) in enumerate(zip(got, right, strict=True)):
        assert_close(a / e.abs().max(), e / e.abs().max(), 1e-5, f"output {which}")
