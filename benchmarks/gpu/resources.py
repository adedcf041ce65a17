"""What the compiler makes of each tile of the Triton kernels, as a table in docs/gpu.md.

Needs no GPU: python -m benchmarks.gpu.resources. With --check it writes nothing and exits with 1
when the table is not what this version of Triton gives.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
import triton

from contrastive_kernels.triton.compile import Compiled, compiling
from contrastive_kernels.triton.configs import TILES, Tile
from contrastive_kernels.triton.tune import Entry, workload

from ..harness import pages
from ..harness.markdown import table
from ..harness.paths import DOCS

DOC = DOCS / "gpu.md"
NAME = "resources"
KERNELS = {"stats": "stats_kernel", "attend": "stats_kernel", "two_way": "two_way_kernel",
           "gradient": "gradient_kernel", "coefficient": "coefficient_kernel"}  # fmt: skip
N = 8192  # from 2^26 pairs on sweeps have a fixed shift
HEAD = ("GPU", "operands", "schedule", "D", "tile", "warps", "stages", "registers", "shared KiB",
        "spilled bytes", "instruction", "programs per SM")  # fmt: skip
META = torch.device("meta")


def configurations() -> Iterator[tuple[int, Entry]]:
    """Every tile of the table, with its architecture."""
    for architecture, kinds in TILES.items():
        for kind, schedules in kinds.items():
            for schedule, widths in schedules.items():
                yield from ((architecture, Entry(schedule, width, kind)) for width in widths)


def compiled(architecture: int, entry: Entry) -> Compiled:
    """The kernel of a schedule, for unit vectors with ids: that of the first sweep."""
    with compiling(architecture, only=KERNELS[entry.schedule]) as made:
        workload(entry, META, N)()
    if made[0].error:
        raise RuntimeError(f"sm_{architecture} {entry}: {made[0].error}")
    return made[0]


def first_columns(architecture: int, entry: Entry) -> list[str]:
    """What a row says of the configuration itself."""
    tile = TILES[architecture][entry.kind][entry.schedule][entry.width]
    width = str(entry.width) if entry.width else "> 256"
    return [f"sm_{architecture}", entry.kind, entry.schedule, width, *tile_columns(tile)]


def tile_columns(tile: Tile) -> list[str]:
    m, n, k, warps, stages = tile
    return [f"{m} x {n} x {k}", str(warps), str(stages)]


def row(architecture: int, entry: Entry, made: Compiled) -> list[str]:
    numbers = [str(made.registers), f"{made.shared / 1024:.0f}", str(made.spilled)]
    programs = str(made.programs(architecture))
    return [*first_columns(architecture, entry), *numbers, made.instruction or "none", programs]


def lines() -> list[str]:
    rows = []
    for architecture, entry in configurations():
        rows.append(row(architecture, entry, compiled(architecture, entry)))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    return [f"Compiled by Triton {triton.__version__}.", "", *table(HEAD, rows)]


def main(
    name: str, lines: Callable[[], list[str]], argv: list[str] | None = None, command: str = ""
) -> int:
    """Writes lines into the document, or checks them; `command`: the module, if named otherwise."""
    command = f"python -m benchmarks.gpu.{command or name}"
    parser = argparse.ArgumentParser(prog=command)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    options = parser.parse_args(argv)
    text = "\n".join(["", *lines(), "", ""])
    return pages.update(
        {DOC: lambda page: pages.replaced(page, name, text)}, command, check=options.check
    )


if __name__ == "__main__":
    sys.exit(main(NAME, lines))
