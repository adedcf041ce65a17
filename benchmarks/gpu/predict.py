"""What the large cases should take on an H200, by counting: a table in docs/gpu.md.

Needs no GPU: python -m benchmarks.gpu.predict, or with --check. Nothing here is measured but the
rates of the machine.
"""

import math
import sys
from typing import NamedTuple

from contrastive_kernels.triton.compile import Compiled
from contrastive_kernels.triton.configs import TILES, Tile, width_of
from contrastive_kernels.triton.tune import Entry

from ..harness.markdown import table
from . import resources

NAME = "predict"
ARCHITECTURE, PROCESSORS = 90, 132
# Measured on an H200: dense bfloat16 products, exponentials, and device memory, for a second.
TENSOR, EXPONENTIALS, MEMORY = 790e12, 4.18e12, 4.3e12
L2 = 5.5e12  # an assumption
# 16 exponentials and 128 other instructions of single lanes for each clock of a multiprocessor.
INSTRUCTIONS = EXPONENTIALS / 16 * 128
ITEMSIZE = 2
MILLION = 2**20


class Times(NamedTuple):
    """Milliseconds that each unit is busy."""

    tensor: float
    exponentials: float
    instructions: float
    l2: float
    memory: float

    def overlapped(self) -> float:
        """Without L2, whose rate is only assumed."""
        return max(self._replace(l2=0.0))

    def likely(self, programs: int) -> float:
        """Loads are prefetched. Arithmetic runs beside products where programs share an SM."""
        scalar = max(self.exponentials, self.instructions)
        busy = max(self.tensor, scalar) if programs > 1 else self.tensor + scalar
        return max(busy, self.l2, self.memory)

    def serial(self) -> float:
        scalar = max(self.exponentials, self.instructions)
        return self.tensor + scalar + max(self.l2, self.memory)


class Sweep(NamedTuple):
    """One kernel of ours over n own vectors and m others.

    `special` counts exponentials, logarithms and divisions of a pair, `plain` all its instructions
    (an estimate from the code); `share` of the pairs is computed, `stored` bytes of each written.
    """

    schedule: str
    n: int
    m: int
    dim: int
    special: int
    plain: int
    share: float = 1.0
    stored: int = 0

    @property
    def entry(self) -> Entry:
        return Entry(self.schedule, width_of(self.dim), "half")

    @property
    def tile(self) -> Tile:
        return TILES[ARCHITECTURE]["half"][self.schedule][self.entry.width]

    @property
    def products(self) -> int:
        return 2 if self.schedule in ("attend", "gradient") else 1

    def tiles(self) -> float:
        blocks = math.ceil(self.n / self.tile.block_m) * math.ceil(self.m / self.tile.block_n)
        return blocks * self.share

    def times(self) -> Times:
        tile, pairs = self.tile, self.n * self.m * self.share
        flops = 2 * pairs * self.dim * self.products
        vectors = tile.block_n  # of a tile, read from L2: own vectors stay
        if self.schedule == "two_way":
            vectors = tile.block_m
        if tile.block_k < self.dim:
            vectors = tile.block_m + tile.block_n
        moved = self.tiles() * vectors * self.dim * ITEMSIZE
        inputs = (self.n + self.m) * self.dim * ITEMSIZE
        return Times(
            1e3 * flops / TENSOR,
            1e3 * pairs * self.special / EXPONENTIALS,
            1e3 * pairs * self.plain / INSTRUCTIONS,
            1e3 * moved / L2,
            1e3 * (inputs + pairs * self.stored) / MEMORY,
        )


class Workload(NamedTuple):
    """A loss, forward and backward; `library`: products of 2 N M D with stored coefficients."""

    name: str
    n: int
    m: int
    dim: int
    at_most_ms: float
    sweeps: tuple[Sweep, ...]
    library: int = 0


def workload(
    name: str, n: int, m: int, dim: int, at_most_ms: float, *sweeps: tuple, library: int = 0
) -> Workload:
    made = tuple(Sweep(schedule, n, m, dim, *rest) for schedule, *rest in sweeps)
    return Workload(name, n, m, dim, at_most_ms, made, library)


ATTEND, GRADIENT, FORWARD = ("attend", 1, 7), ("gradient", 1, 7), ("two_way", 1, 6)
# both sides' coefficients
SYMMETRIC, CLIP, SIGLIP = ("gradient", 2, 10), ("coefficient", 2, 10), ("coefficient", 4, 20)
HALF = (*FORWARD, 0.5)
N = 65536
WORKLOADS = (
    workload("info_nce", N, N, 128, 9.0, ATTEND, GRADIENT),
    workload("clip_loss", N, N, 512, 30.0, FORWARD, (*CLIP, 1.0, ITEMSIZE), library=2),
    workload("clip_loss", N, N, 768, 42.0, FORWARD, (*CLIP, 1.0, ITEMSIZE), library=2),
    workload("siglip_loss", N, N, 768, 36.0, (*SIGLIP, 1.0, ITEMSIZE), library=2),
    workload("nt_xent", N, N, 128, 6.0, HALF, SYMMETRIC),
    workload("info_nce, frozen keys", 1024, MILLION, 128, 1.1, ATTEND),
)


def library_times(case: Workload) -> Times:
    """Products with what is stored: read once for each."""
    pairs = case.n * case.m * case.library
    return Times(
        1e3 * 2 * pairs * case.dim / TENSOR, 0.0, 0.0, 0.0, 1e3 * pairs * ITEMSIZE / MEMORY
    )


SWEEP_HEAD = ("case", "sweep", "NMD", "tile", "programs per SM", "tiles per SM", "waves",
              "tensor", "special", "all instructions", "L2", "memory")  # fmt: skip
CASE_HEAD = ("case", "bound", "all overlapped", "likely", "nothing overlapped", "NMD")


def title(case: Workload) -> str:
    return f"`{case.name}` N={case.n:,} M={case.m:,} D={case.dim}"


def sweep_row(case: Workload, sweep: Sweep, made: Compiled) -> list[str]:
    programs = made.programs(ARCHITECTURE)
    own = sweep.tile.block_n if sweep.schedule == "two_way" else sweep.tile.block_m
    blocks = math.ceil(sweep.n / own)
    if sweep.schedule == "coefficient":
        blocks = int(sweep.tiles())
    waves = blocks / (PROCESSORS * programs)
    shape = f"{sweep.tile.block_m} x {sweep.tile.block_n}"
    return [
        title(case),
        sweep.schedule,
        f"{2 * sweep.products * sweep.share:g}",
        shape,
        str(programs),
        f"{sweep.tiles() / PROCESSORS:,.0f}",
        f"{waves:.1f}" if waves >= 2 else "split into parts",
        *(f"{time:.2f}" for time in sweep.times()),
    ]


def case_row(case: Workload, made: list[Compiled]) -> list[str]:
    times = [sweep.times() for sweep in case.sweeps]
    programs = [one.programs(ARCHITECTURE) for one in made]
    if case.library:
        times.append(library_times(case))
        programs.append(2)  # a library's products overlap what they read
    totals = (
        sum(one.overlapped() for one in times),
        sum(one.likely(count) for one, count in zip(times, programs, strict=True)),
        sum(one.serial() for one in times),
    )
    flops = sum(2 * s.products * s.share for s in case.sweeps) + 2 * case.library
    numbers = [f"{total:.1f} ms" if total >= 10 else f"{total:.2f} ms" for total in totals]
    return [title(case), f"{case.at_most_ms:g} ms", *numbers, f"{flops:g}"]


def lines() -> list[str]:
    sweeps, cases = [], []
    for one in WORKLOADS:
        made = [resources.compiled(ARCHITECTURE, sweep.entry) for sweep in one.sweeps]
        pairs = zip(one.sweeps, made, strict=True)
        sweeps += [sweep_row(one, sweep, kernel) for sweep, kernel in pairs]
        cases.append(case_row(one, made))
    return [
        *table(CASE_HEAD, cases),
        "",
        "The sweeps of each case, with the milliseconds that each unit is busy:",
        "",
        *table(SWEEP_HEAD, sweeps),
    ]


if __name__ == "__main__":
    sys.exit(resources.main(NAME, lines))
