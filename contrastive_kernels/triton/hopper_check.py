"""The check of the engine for Hopper on the GPU at hand: beside the Triton engine, in float64."""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor

from .. import engines
from ..types import known
from . import backward, forward, hopper
from .backward import Upstream
from .engine import COLUMNS, ROWS, Needs, Problem

# Not multiples of a tile; so many pairs that there is a fixed shift, and few queries, whose keys
# come in parts.
SIZES = 1031, 65537
DTYPES = torch.bfloat16, torch.float16
NAMES = ("lse", "attended", "slope", "dx", "dy", "dscale", "dy of rows")


def on_request(device: torch.device) -> None:
    """With CK_HOPPER=check, the check at the first call on a device; a fault is a warning."""
    if not engines.wants_check(device):
        return
    engines.checked[device] = found = fault(device)
    if found is not None:
        warnings.warn(f"the engine for Hopper is not used on {device}: {found}", stacklevel=2)


def fault(
    device: torch.device, sizes: tuple[int, int] = SIZES, dims: tuple[int, ...] = (*hopper.TILES,)
) -> str | None:
    """What is wrong, or None: its errors may be twice those of the Triton engine, plus rounding of
    float32."""
    for dtype, dim in itertools.product(DTYPES, dims):
        where = f"{str(dtype).removeprefix('torch.')}, D={dim}"
        generator = torch.Generator().manual_seed(dim)
        x, y = (torch.randn(n, dim, generator=generator).to(device, dtype) for n in sizes)
        grads = [torch.randn(n, generator=generator).to(device) for n in sizes]
        lses, exact = truth(x, y, grads)
        made = []
        for taken in (True, False):
            try:
                with engines.forced(taken):
                    made.append(results(x, y, lses, grads, taken))
            except Exception as raised:
                return f"{where}: {type(raised).__name__}: {raised}"
        for name, ours, theirs, oracle in zip(NAMES, *made, exact, strict=True):
            limit = 2 * size(theirs - oracle) + 64 * torch.finfo(torch.float32).eps * size(oracle)
            error = size(ours - oracle)
            if not error <= limit:  # NaN is not
                return f"{where}: the error of {name} is {error:.2e}, beyond {limit:.2e}"
    return None


def matrix(x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The scale, and ids: pairs of equal ones are dropped."""
    ids = tuple(torch.arange(len(t), device=t.device) % 97 for t in (x, y))
    return torch.full((), 9.0, device=x.device), (ids[0], ids[1])


def results(
    x: Tensor, y: Tensor, lses: list[Tensor], grads: list[Tensor], taken: bool
) -> list[Tensor]:
    """What the sweeps of an engine give, by NAMES; `taken`: by that for Hopper."""
    scale, ids = matrix(x, y)
    none = (None, None)
    problem = Problem(x, y, scale, None, ids, none, True)
    if taken and hopper.tile(problem, problem.side(ROWS), problem.side(COLUMNS)) is None:
        raise RuntimeError("it does not take these sweeps")
    out = forward.stats(problem, ROWS, attend=True)
    found = [known(out.first), known(out.gradient), known(out.slope)]
    for sides in ((ROWS, COLUMNS), (ROWS,)):
        upstream = Upstream()
        for which in sides:
            lse = lses[which].float()
            low = (lses[which] - lse).float()
            half = x.dtype == torch.float16
            upstream.add(which, lse, None, grads[which], None, half, low)
        problem = Problem(x, y, scale, None, ids, none, True)
        both = len(sides) > 1
        made = backward.gradients(problem, upstream, Needs(both, True, both, False))
        found += [made.x, made.y, made.scale] if both else [made.y]
    return found


def truth(x: Tensor, y: Tensor, grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """lse of rows and columns, and what `results` should give, in float64."""
    scale, ids = matrix(x, y)
    scale = scale.double()
    norms = [t.double().norm(dim=1, keepdim=True) for t in (x, y)]
    a, b = (t.double() / norm for t, norm in zip((x, y), norms, strict=True))
    products = a @ b.T
    z = (scale * products).masked_fill(ids[0][:, None] == ids[1], -torch.inf)
    lses = [z.logsumexp(1), z.logsumexp(0)]
    p, q = (z - lses[0][:, None]).exp(), (z - lses[1]).exp()
    rows = p * grads[0].double()[:, None]
    both = rows + q * grads[1].double()

    def back(weights: Tensor, own: Tensor, other: Tensor, norm: Tensor) -> Tensor:
        made = weights @ other
        return scale * (made - own * (own * made).sum(1, keepdim=True)) / norm

    found = [lses[0], back(p, a, b, norms[0]), (p * products).sum(1)]
    found += [back(both, a, b, norms[0]), back(both.T, b, a, norms[1])]
    return lses, [*found, (both * products).sum(), back(rows.T, b, a, norms[1])]


def size(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())
