"""What the large cases should take on an H200, by counting: tables in docs/gpu.md.

Needs no GPU: python -m benchmarks.gpu.predict, or with --check. Instructions are counted in the
machine code; model.py makes times of them, and published.py holds that against measurements.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from contrastive_kernels import triton as operators
from contrastive_kernels.triton import stored
from contrastive_kernels.triton.compile import L2, Compiled, compiling
from contrastive_kernels.triton.machine_code import Count, Loops, loops

from ..harness.markdown import table
from . import published, resources
from .gates import HOPPER
from .model import H200, Prediction, Sweep, Tile, arithmetic_cycles, predicted, wgmma_cycles

NAME = "predict"
ARCHITECTURE = 90
ITEMSIZE, LOGIT = 2, 4
RATE = H200.products * H200.clock * H200.processors
N, MILLION = 65536, 2**20


class Workload(NamedTuple):
    """A loss, forward and backward: its sweeps, and how often both sides are read to be packed.

    `share` of the pairs is computed by each sweep. `library`: products of 2 N M D with stored
    coefficients, which are written once and read by each. `run` starts the kernels.
    """

    name: str
    n: int
    m: int
    dim: int
    at_most_ms: float
    sweeps: dict[str, float]
    run: Callable[[Inputs], None]
    packings: int = 2
    library: int = 0

    @property
    def title(self) -> str:
        return f"`{self.name}` N={self.n:,} M={self.m:,} D={self.dim}"


class Inputs:
    """Tensors without data, for the operators of a workload."""

    def __init__(self, n: int, m: int, dim: int):
        self.x, self.y = (self.empty(size, dim, dtype=torch.bfloat16) for size in (n, m))
        self.scale, self.none = self.empty(), self.empty(0)
        self.rows, self.columns = self.empty(n), self.empty(m)
        self.ids = self.empty(n, dtype=torch.int64)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=resources.META)

    def forward(self, y: torch.Tensor | None, ids: bool = False, **flags: bool) -> None:
        operators.row_stats(
            self.x, y, self.scale, None, self.ids if ids else None, None, None, None, None,
            mean=False, normalize=True, together=False, aligned=False,
            columns=flags.get("columns", False), attend=flags.get("attend", False),
        )  # fmt: skip

    def backward(
        self, y: torch.Tensor | None, needs: str, columns: bool, ids: bool = False
    ) -> None:
        lse = (self.rows, self.none, self.columns if columns else self.none, self.none)
        low = (self.rows, self.columns if columns else self.none)
        grads = (self.rows, None, self.columns if columns else None, None, None)
        operators.row_stats_backward(
            self.x, y, self.scale, None, self.ids if ids else None, None, None, None, *lse,
            self.none, self.none, *low, *grads, normalize=True,
            needs=[name in needs for name in ("x", "y", "scale", "bias")], together=False,
        )  # fmt: skip


def info_nce(at: Inputs) -> None:
    at.forward(at.y, attend=True)
    at.backward(at.y, "y", columns=False)


def frozen(at: Inputs) -> None:
    at.forward(at.y, attend=True)


def clip_loss(at: Inputs) -> None:
    at.forward(at.y, columns=True)
    at.backward(at.y, "xy", columns=True)


def siglip_loss(at: Inputs) -> None:
    pairs: tuple[Any, ...] = (at.x, at.y, at.scale, None, None, None, None, None, None)
    operators.row_softplus(*pairs, True, [True, True, True, False], False)


def nt_xent(at: Inputs) -> None:
    at.forward(None, ids=True, columns=True)
    at.backward(None, "x", columns=True, ids=True)


ROWS = {"attend": 1.0, "gradient": 1.0}
LONG = {"two_way": 1.0, "coefficient": 1.0}
WORKLOADS = (
    Workload("info_nce", N, N, 128, 9.0, ROWS, info_nce),
    Workload("clip_loss", N, N, 512, 30.0, LONG, clip_loss, library=2),
    Workload("clip_loss", N, N, 768, 42.0, LONG, clip_loss, library=2),
    Workload("siglip_loss", N, N, 768, 36.0, {"coefficient": 1.0}, siglip_loss, 1, library=2),
    Workload("nt_xent", N, N, 128, 6.0, {"two_way": 0.5, "gradient": 1.0}, nt_xent),
    Workload("info_nce, frozen keys", 1024, MILLION, 128, 1.1, {"attend": 1.0}, frozen, 1),
)


def compiled(case: Workload, schedule: str, hopper: bool = False) -> tuple[Compiled, Loops] | None:
    """The first kernel of a schedule that a workload starts, and its loops; None where the engine
    for Hopper has none."""
    if hopper and schedule not in HOPPER:
        return None
    kernel = (HOPPER if hopper else resources.KERNELS)[schedule]
    seen: list[tuple[Compiled, Loops]] = []

    def look(made: Compiled, found: Any) -> None:
        if not seen:
            seen.append((made, loops(found.asm["cubin"])))

    with (
        patch.dict(os.environ, CK_HOPPER=str(int(hopper))),
        compiling(ARCHITECTURE, kernel, look, l2=L2) as made,
    ):
        case.run(Inputs(case.n, case.m, case.dim))
    if made and made[0].error:
        raise RuntimeError(f"{case.title} {schedule}: {made[0].error}")
    return seen[0] if made else None


def sweep(case: Workload, schedule: str, share: float, made: Compiled, issued: Loops) -> Sweep:
    """A chain is one warpgroup; those of a program meet at barriers, but not those of the engine
    for Hopper, which fill a multiprocessor. What multiplies nothing reads logits of a library."""
    block_m, block_n, block_k, warps, _ = made.tile
    alone = made.kernel in HOPPER.values()
    groups = block_m // 64 if alone else warps // 4
    slices = math.ceil(case.dim / block_k)
    by_library = not made.instruction
    if slices > 1 and issued.inner.special and not by_library:  # that over slices was unrolled
        issued = Loops(Count(), issued.inner)
    count = issued.of_tile(1 if by_library else slices)
    if not count.all:  # without a loop
        count = issued.outer
    lanes = 128 if alone else 32 * warps / groups
    plain, special = lanes * (count.all - count.special), lanes * count.special
    columns = block_m * block_n // groups // 64
    products = 0.0 if by_library else wgmma_cycles(H200, 64, columns, case.dim, True)
    if schedule in ("attend", "gradient"):
        products += wgmma_cycles(H200, 64, case.dim, columns, False)
    # own vectors stay, unless they are read in slices
    vectors = block_m + block_n if slices > 1 else block_m if schedule == "two_way" else block_n
    asked = block_m * block_n * LOGIT if by_library else vectors * case.dim * ITEMSIZE
    tile = Tile(products, arithmetic_cycles(H200, plain, special), bytes=asked / groups)
    tiles = share * math.ceil(case.n / block_m) * math.ceil(case.m / block_n)
    programs = math.prod(made.grid)
    if schedule == "coefficient":  # launched for each chunk
        programs = int(tiles)
    elif by_library:  # and for each piece
        rows, columns = stored.of_bytes(stored.SHARE * L2)
        programs *= math.ceil(case.n / rows) * math.ceil(case.m / columns)
    written = case.n * case.m * ITEMSIZE if schedule == "coefficient" else 0
    resident = 1 if alone else made.programs(ARCHITECTURE)
    chains = groups if alone else 1 + (groups - 1) / 2
    return Sweep(tile, programs, groups * tiles / programs, resident, chains, written)


def beside(case: Workload) -> float:
    """Milliseconds of packing, and of a library's products."""
    packed = case.packings * (case.n + case.m) * case.dim * ITEMSIZE / H200.memory
    flops = 2 * case.library * case.n * case.m * case.dim
    read = case.library * case.n * case.m * ITEMSIZE
    return 1e3 * (packed + max(flops / RATE, read / H200.memory))


def of_logits(case: Workload) -> float:
    """Milliseconds of the products that a library stores in L2."""
    flops, written = 2 * case.n * case.m * case.dim, case.n * case.m * LOGIT
    return 1e3 * max(flops / RATE, written / H200.l2)


def predictions(case: Workload, hopper: bool) -> dict[str, Prediction]:
    """Of each sweep that an engine runs."""
    found = {}
    for schedule, share in case.sweeps.items():
        made = compiled(case, schedule, hopper)
        if made is not None:
            one = predicted(H200, sweep(case, schedule, share, *made))
            if not made[0].instruction:
                logits = share * of_logits(case)
                limit = f"{logits:.2f} ms a library's products, then {one.limit}"
                one = Prediction(one.milliseconds + logits, limit)
            found[schedule] = one
    return found


HEAD = ("case", "bound", "Triton engine", "with the engine for Hopper", "what limits each sweep",
        "measured")  # fmt: skip


def row(case: Workload) -> list[str]:
    triton, hopper = (predictions(case, engine) for engine in (False, True))
    totals = [
        sum(one.milliseconds for one in found.values()) + beside(case)
        for found in (triton, triton | hopper)
    ]
    limits = [limited(name, "", one) for name, one in triton.items()]
    limits += [limited(name, " on Hopper's", one) for name, one in hopper.items()]
    if case.library:
        limits.append(f"library products {beside(case):.1f} ms")
    numbers = [f"{totals[0]:.3g} ms", f"{totals[1]:.3g} ms" if hopper else "the same"]
    return [case.title, f"{case.at_most_ms:g} ms", *numbers, "; ".join(limits), "not yet"]


def limited(name: str, engine: str, one: Prediction) -> str:
    return f"`{name}`{engine} {one.milliseconds:.2f} ms: {one.limit}"


def lines() -> list[str]:
    return [
        *table(HEAD, map(row, WORKLOADS)),
        "",
        "The same model beside published speeds:",
        "",
        *table(published.HEAD, published.rows()),
    ]


if __name__ == "__main__":
    sys.exit(resources.main(NAME, lines))
