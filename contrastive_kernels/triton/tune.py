"""Finds the tiles of configs.TILES for the GPU at hand: `python -m contrastive_kernels tune`.

Every candidate is timed on the host function that uses it, and its results are compared with those
of the tile that the table has now. Nothing is written but what is asked for: the lines to paste are
printed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from triton.testing import do_bench

from ..types import known, statistics_dtype
from . import configs, row_stats, row_stats_backward
from .configs import SHARED_KIB, TILES, WIDTHS, Tile, properties, width_of

Workload = Callable[[], tuple[Tensor, ...]]
Timer = Callable[[Workload], float]

SCHEDULES = ("stats", "attend", "two_way", "gradient", "coefficient")
DTYPES = {"half": torch.bfloat16, "single": torch.float32, "double": torch.float64}
WIDE_DIM = 768  # stands for all vectors that are read in slices
SIZES = {"half": 32768, "single": 16384, "double": 4096}
# The largest difference between two tiles' results, relative to the largest element.
TOLERANCE = {"half": 2e-2, "single": 1e-4, "double": 1e-10}
# Numbers that a thread may hold of what is accumulated, of the 255 registers.
ACCUMULATED = 160


class Entry(NamedTuple):
    """A tile of the table."""

    schedule: str
    width: int
    kind: str

    @property
    def dim(self) -> int:
        return self.width or WIDE_DIM

    def __str__(self) -> str:
        return f"{self.schedule} D={self.dim} {self.kind}"


class Trial(NamedTuple):
    """A candidate's time, or why it has none."""

    tile: Tile
    milliseconds: float | None = None
    failed: str = ""


def entries(schedules: list[str], dims: list[int], kinds: list[str]) -> list[Entry]:
    """Those of the table's tiles that are asked for."""
    table = TILES[max(TILES)]
    widths = list(dict.fromkeys(width_of(dim) for dim in dims))
    return [
        Entry(schedule, width, kind)
        for kind, schedule, width in product(kinds, schedules, widths)
        if width in table[kind][schedule]
    ]


def candidates(entry: Entry, architecture: int) -> list[Tile]:
    """Tiles whose accumulators fit into registers, and whose features into shared memory."""
    half = entry.kind == "half"
    own = (64, 128) if half else (16, 32, 64, 128)
    other = (32, 64, 128, 256) if half else (16, 32, 64)
    stages = (2, 3, 4) if half else (1, 2, 3)
    slices = {entry.width or 64}
    if not half and entry.schedule not in ("attend", "gradient"):  # these keep whole vectors
        slices = {16 if entry.kind == "double" else 32}
    grid = product(own, other, slices, (4, 8), stages)
    return [tile for tile in map(Tile._make, grid) if fits(entry, tile, architecture)]


def fits(entry: Entry, tile: Tile, architecture: int) -> bool:
    if entry.schedule == "two_way" and tile.block_n % tile.block_m:
        return False
    itemsize = DTYPES[entry.kind].itemsize
    accumulated = tile.block_m * tile.block_n
    if entry.schedule in ("attend", "gradient"):
        accumulated += tile.block_m * tile.block_k
    registers = accumulated * max(1, itemsize // 4) / (32 * tile.warps)
    # buffers between two stages; own vectors stay, unless they too are read in slices
    buffers = max(1, tile.stages - 1)
    own = buffers if tile.block_k < entry.dim else 1
    shared = (own * tile.block_m + buffers * tile.block_n) * tile.block_k * itemsize
    return registers <= ACCUMULATED and shared <= SHARED_KIB[architecture] * 1024


def workload(entry: Entry, device: torch.device, n: int) -> Workload:
    """What runs the kernel of a schedule as the commonest losses do: unit vectors with ids."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": DTYPES[entry.kind], "device": device}
    x, y = torch.randn(n, entry.dim, **options), torch.randn(n, entry.dim, **options)
    statistics: dict[str, Any] = {"dtype": statistics_dtype(x), "device": device}
    scale, ids = torch.full((), 10.0, **statistics), torch.arange(n, device=device)
    pairs: dict[str, Any] = {
        "x": x,
        "y": y,
        "scale": scale,
        "bias": None,
        "exclude_rows": ids,
        "exclude_cols": ids,
        "keep_rows": None,
        "keep_cols": None,
        "normalize": True,
        "together": False,
    }
    if entry.schedule in ("gradient", "coefficient"):
        none = torch.zeros(0, **statistics)
        upstream: dict[str, Any] = {
            **{name: torch.zeros(n, **statistics) for name in ("lse", "lse_low")},
            **dict.fromkeys(
                ("mean", "col_lse", "col_lse_low", "col_mean", "attended", "slope"), none
            ),
            "grad_lse": torch.ones(n, **statistics),
            **dict.fromkeys(("grad_mean", "grad_col_lse", "grad_col_mean", "grad_partner")),
        }
        needs = [True, False, False, False]
        return lambda: (row_stats_backward(**pairs, **upstream, needs=needs).x,)
    options = {"columns": entry.schedule == "two_way", "attend": entry.schedule == "attend"}
    return lambda: row_stats(**pairs, threshold=None, mean=False, aligned=False, **options)


def use(entry: Entry, tile: Tile, architecture: int) -> AbstractContextManager:
    """Within it, the table has this tile."""
    return patch.dict(TILES[architecture][entry.kind][entry.schedule], {entry.width: tile})


def deviation(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference, relative to the largest element of each result."""
    pairs = ((a.double(), b.double()) for a, b in zip(results, expected, strict=True) if b.numel())
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def trials(
    entry: Entry, architecture: int, run: Workload, timer: Timer, tiles: list[Tile]
) -> Iterator[Trial]:
    """Times each tile; the results of the table's own are what the others must agree with."""
    expected = run()
    for tile in tiles:
        with use(entry, tile, architecture):
            try:
                error = deviation(run(), expected)
                if not error <= TOLERANCE[entry.kind]:
                    yield Trial(tile, failed=f"wrong by {error:.1e}")
                    continue
                yield Trial(tile, timer(run))
            except Exception as error:  # whatever the compiler or the driver raises
                lines = str(error).strip().splitlines() or [""]
                yield Trial(tile, failed=f"{type(error).__name__}: {lines[0][:80]}")


def best(found: list[Trial]) -> Trial | None:
    timed = [trial for trial in found if trial.milliseconds is not None]
    return min(timed, key=lambda trial: known(trial.milliseconds), default=None)


def literal(rows: dict[int, Tile]) -> str:
    """A schedule's line of the table."""
    items = []
    for width, tile in rows.items():
        values = tuple(tile)
        if width == tile.block_k:
            values = values[:2] + values[3:]
        items.append(str(values) if width else f"wide={values}")
    return f"row({', '.join(items)})"


def paste(winners: dict[Entry, Tile], architecture: int) -> list[str]:
    """The lines of the table, with what was found, of every schedule that was tuned."""
    changed = dict.fromkeys((entry.kind, entry.schedule) for entry in winners)
    lines = []
    for kind, schedule in changed:
        rows = dict(TILES[architecture][kind][schedule])
        rows |= {e.width: t for e, t in winners.items() if (e.kind, e.schedule) == (kind, schedule)}
        lines.append(f'{architecture} {kind}: "{schedule}": {literal(rows)},')
    return lines


Found = dict[Entry, list[Trial]]


def tune(
    chosen: list[Entry],
    device: torch.device,
    architecture: int,
    timer: Timer,
    seconds: float = math.inf,
    keep: Callable[[Found], object] = lambda found: None,
) -> Found:
    """All trials that begin within so many seconds; the first of each entry is the tile of the
    table. `keep` gets after each trial what there is."""
    found: Found = {}
    end = time.monotonic() + seconds
    for entry in chosen:
        now = TILES[architecture][entry.kind][entry.schedule][entry.width]
        tiles = [now, *(t for t in candidates(entry, architecture) if t != now)]
        run = workload(entry, device, SIZES[entry.kind])
        found[entry] = []
        for trial in trials(entry, architecture, run, timer, tiles):
            found[entry].append(trial)
            keep(found)
            text = trial.failed or f"{trial.milliseconds:.3f} ms"
            progress(f"{entry}: {len(found[entry])} of {len(tiles)}, {tuple(trial.tile)} {text}")
            if time.monotonic() >= end:
                progress("")
                return found
    progress("")
    return found


def progress(text: str) -> None:
    """One line that is overwritten on a terminal; lines of a log elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def report(found: Found, architecture: int) -> list[str]:
    """The final table, and the lines to paste."""
    lines = [f"{'':28}{'now':>10}{'best':>10}  tile"]
    winners = {}
    for entry, tried in found.items():
        winner = best(tried)
        if winner is None:
            lines.append(f"{str(entry):28}nothing ran: {tried[0].failed}")
            continue
        now = tried[0].milliseconds
        text = "-" if now is None else f"{now:.3f}"
        row = f"{str(entry):28}{text:>10}{winner.milliseconds:10.3f}  {tuple(winner.tile)}"
        lines.append(row)
        winners[entry] = winner.tile
    return lines + ["", *paste(winners, architecture)]


def record(found: Found, architecture: int) -> str:
    """All trials as JSON."""
    rows = [
        entry._asdict() | trial._asdict() | {"tile": trial.tile._asdict()}
        for entry, tried in found.items()
        for trial in tried
    ]
    return json.dumps({"architecture": architecture, "trials": rows}, indent=1)


def main(argv: list[str]) -> int:
    """Tune on the current GPU; 2 where there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m contrastive_kernels tune",
        description="Time candidate tiles on this GPU; print the lines for configs.py.",
    )
    parser.add_argument("--schedule", action="append", choices=SCHEDULES, help="default: all")
    parser.add_argument("--dim", action="append", type=positive, help="features; default: all")
    parser.add_argument("--dtype", action="append", choices=KINDS, help="default: bfloat16")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every trial to this file")
    parser.add_argument("--seconds", type=positive, default=math.inf, help="begin no trial later")
    arguments = parser.parse_args(argv)
    dims = arguments.dim or [width or WIDE_DIM for width in WIDTHS]
    kinds = [KINDS[name] for name in arguments.dtype or ["bfloat16"]]
    chosen = entries(arguments.schedule or list(SCHEDULES), dims, kinds)
    if not chosen:
        parser.error("no schedule of those has tiles for such a --dim")
    if configs.INTERPRETED or not torch.cuda.is_available():
        print("tune needs an NVIDIA GPU, and TRITON_INTERPRET not set", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = properties(device).architecture

    def keep(found: Found) -> None:
        if arguments.json is not None:
            arguments.json.write_text(record(found, architecture))

    found = tune(
        chosen, device, architecture, lambda run: do_bench(run, return_mode="median"),
        arguments.seconds, keep,
    )  # fmt: skip
    print("\n".join(report(found, architecture)))
    return 0


KINDS = {str(dtype).removeprefix("torch."): kind for kind, dtype in DTYPES.items()}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
