"""What a pair costs in the machine code of the sweeps, as a table in docs/gpu.md for this version
of Triton: instructions, those of the tensor cores, widths of loads, barriers, buffers.

Needs no GPU: python -m benchmarks.gpu.gates. With --check it writes nothing and exits with 1 when
the table is not what this version gives.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import triton

from contrastive_kernels.triton import hopper
from contrastive_kernels.triton.compile import Compiled, compiling
from contrastive_kernels.triton.machine_code import Code, code
from contrastive_kernels.triton.tune import Entry, workload
from contrastive_kernels.types import known

from ..harness.markdown import table
from .resources import KERNELS, META, N, first_columns, main, tile_columns

VERSION = ".".join(triton.__version__.split(".")[:2])
NAME = f"gates-{VERSION}"
SCHEDULES = ("stats", "attend", "two_way", "gradient")
DIMS = {80: (128,), 90: (64, 128, 256), 100: (128,)}
# The kernels of the engine for Hopper.
HOPPER = {"attend": "attend_kernel", "gradient": "gradient_sweep_kernel"}
HEAD = ("GPU", "operands", "schedule", "D", "tile", "warps", "stages", "registers",
        "spilled bytes", "instructions per pair", "n", "16-byte loads", "narrower", "barriers",
        "buffers")  # fmt: skip


def entries() -> Iterator[tuple[int, Entry]]:
    for architecture, dims in DIMS.items():
        for dim in dims:
            yield from ((architecture, Entry(name, dim, "half")) for name in SCHEDULES)


def per_pair(made: Compiled, found: Code) -> float:
    """Instructions of single lanes in the loop over tiles, for each pair of vectors."""
    tile = known(made.tile)
    if made.kernel in HOPPER.values():  # a warpgroup has its own loop
        tile = tile._replace(block_m=tile.block_m // 2)
    return found.loop.all * 32 * tile.warps / (tile.block_m * tile.block_n)


def looked_at(architecture: int, entry: Entry, kernel: str) -> tuple[Compiled, Code]:
    """A kernel of a schedule, as `resources.compiled` has it, and its machine code."""
    seen: list[tuple[Compiled, Code]] = []

    def look(made: Compiled, found: Any) -> None:
        if not seen:  # what comes after it repairs
            seen.append((made, code(found)))

    with (
        patch.dict(os.environ, CK_HOPPER=str(int(kernel in HOPPER.values()))),
        compiling(architecture, kernel, look) as made,
    ):
        workload(entry, META, N)()
    if not seen:
        raise RuntimeError(f"sm_{architecture} {entry}: {made[0].error}")
    return seen[0]


def row(first: list[str], made: Compiled, found: Code) -> list[str]:
    numbers = [
        found.columns or "-", found.wide, found.narrow, found.loop.barriers, found.buffers,
    ]  # fmt: skip
    return [
        *first, str(made.registers), str(made.spilled),
        f"{per_pair(made, found):.1f}", *map(str, numbers),
    ]  # fmt: skip


def lines() -> list[str]:
    rows = []
    for architecture, entry in entries():
        found = looked_at(architecture, entry, KERNELS[entry.schedule])
        rows.append(row(first_columns(architecture, entry), *found))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    for dim, (schedule, kernel) in itertools.product(hopper.TILES, HOPPER.items()):
        first = ["sm_90", "half", f"{schedule}, Hopper's", str(dim)]
        found = looked_at(90, Entry(schedule, dim, "half"), kernel)
        rows.append(row(first + tile_columns(hopper.TILES[dim]), *found))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    return [f"Compiled by Triton {triton.__version__}.", "", *table(HEAD, rows)]


if __name__ == "__main__":
    sys.exit(main(NAME, lines, command="gates"))
