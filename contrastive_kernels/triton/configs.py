"""Tiles of each schedule, and what differs between versions of Triton or between devices.

The table is found by `python -m contrastive_kernels tune`; nothing is tuned at import or at a call.
"""

import os
from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl

from ..backends import float32_products

# Whether kernels run in Triton's interpreter, on CPU tensors: decided when triton is imported.
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


class Tile(NamedTuple):
    """Own vectors, other vectors, features of a slice; warps and stages of the pipeline."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class Arithmetic(NamedTuple):
    """Type of the operands of products and of their sums, and how float32 is multiplied."""

    operand: tl.dtype
    sum: tl.dtype
    precision: str
    kind: str


def arithmetic(x: torch.Tensor, y: torch.Tensor) -> Arithmetic:
    """Products of half operands, where both sides have the same; float32 or float64 else."""
    if x.dtype == torch.float64:
        return Arithmetic(tl.float64, tl.float64, "ieee", "double")
    if x.dtype == y.dtype and x.dtype in (torch.bfloat16, torch.float16):
        operand = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
        return Arithmetic(operand, tl.float32, "ieee", "half")
    precision = "tf32" if float32_products("cuda") == "tf32" else "tf32x3"
    return Arithmetic(tl.float32, tl.float32, precision, "single")


# The largest number of features that a program holds at once.
RESIDENT_DIM = 256

# Numbers of features that the table has tiles for; 0: more, read in slices.
WIDTHS = (64, 128, 256, 0)
# Of one program at most, in KiB.
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227}
SMALL = Tile(64, 64, 32, 4, 2)


def row(*resident: tuple[int, ...], wide: tuple[int, ...] | None = None) -> dict[int, Tile]:
    """A schedule's tiles by width: (block_m, block_n, warps, stages), with block_k in the middle
    where vectors are read in slices although they would fit."""
    tiles = {}
    for width, (m, n, *k, warps, stages) in zip(WIDTHS, resident, strict=False):
        tiles[width] = Tile(m, n, k[0] if k else width, warps, stages)
    return tiles if wide is None else tiles | {0: Tile(*wide)}


# float32 is multiplied as three products of TF32, whose operands take twice the registers: beyond
# D = 128 gradients go through stored parts (backends.resident_dim).
SINGLE_80 = {
    "stats": row(*3 * [(64, 64, 32, 8, 3)], wide=(64, 64, 32, 8, 3)),
    "attend": row((32, 32, 4, 2), (16, 32, 4, 2)),
    "two_way": row(*3 * [(64, 64, 32, 8, 3)], wide=(64, 64, 32, 8, 3)),
    "gradient": row((32, 32, 4, 2), (16, 32, 4, 2)),
    "coefficient": row(wide=(64, 64, 32, 8, 3)),
}
SINGLE_90 = {
    "stats": row((64, 64, 8, 2), *2 * [(128, 64, 32, 8, 3)], wide=(128, 64, 32, 8, 3)),
    "attend": row((64, 32, 4, 2), (64, 16, 8, 1)),
    "two_way": row((64, 64, 8, 2), *2 * [(64, 64, 32, 8, 3)], wide=(64, 64, 32, 8, 3)),
    "gradient": row((64, 32, 4, 2), (64, 16, 8, 1)),
    "coefficient": row(wide=(128, 64, 32, 8, 3)),
}
SINGLE_100 = SINGLE_90 | {
    "attend": row((64, 64, 8, 2), (64, 32, 8, 1)),
    "gradient": row((64, 64, 8, 2), (64, 32, 8, 1)),
}
DOUBLE = {
    "stats": row(*3 * [(64, 32, 16, 8, 2)], wide=(64, 32, 16, 8, 2)),
    "attend": row((64, 32, 8, 2), (32, 16, 8, 1), (16, 16, 4, 1)),
    "two_way": row(*3 * [(32, 64, 16, 8, 2)], wide=(32, 64, 16, 8, 2)),
    "gradient": row((64, 32, 8, 2), (32, 16, 8, 1), (16, 16, 4, 1)),
    "coefficient": row(wide=(64, 32, 16, 8, 2)),
}

HALF_80 = {
    "stats": row(*3 * [(128, 64, 8, 3)], wide=(128, 64, 64, 8, 4)),
    "attend": row((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "two_way": row(*3 * [(64, 128, 8, 3)], wide=(64, 128, 64, 8, 4)),
    "gradient": row((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "coefficient": row(wide=(128, 128, 64, 8, 3)),
}
HALF_86 = HALF_80 | {
    "stats": row(*2 * [(128, 64, 8, 3)], (128, 64, 8, 2), wide=(128, 64, 64, 8, 4)),
    "two_way": row(*2 * [(64, 128, 8, 3)], (64, 128, 8, 2), wide=(64, 128, 64, 8, 4)),
}
HALF_90 = {
    "stats": row(*2 * [(128, 64, 8, 3)], (128, 64, 8, 2), wide=(128, 128, 64, 8, 3)),
    "attend": row((128, 64, 8, 4), (64, 64, 4, 3), (128, 32, 8, 3)),
    "two_way": row((64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), wide=(128, 128, 64, 8, 2)),
    "gradient": row((128, 64, 8, 4), (64, 64, 4, 3), (128, 32, 8, 3)),
    "coefficient": row(wide=(128, 128, 64, 8, 3)),
}
HALF_100 = HALF_86 | {
    "two_way": row(*2 * [(64, 128, 8, 3)], (64, 64, 8, 2), wide=(64, 128, 64, 8, 4)),
    "coefficient": row(wide=(128, 64, 64, 8, 4)),
}

# Architectures: 80 and 87; 86, 89 and 120, which have less shared memory; 90; 100 and above.
TILES: dict[int, dict[str, dict[str, dict[int, Tile]]]] = {
    80: {"half": HALF_80, "single": SINGLE_80, "double": DOUBLE},
    86: {"half": HALF_86, "single": SINGLE_80, "double": DOUBLE},
    90: {"half": HALF_90, "single": SINGLE_90, "double": DOUBLE},
    100: {"half": HALF_100, "single": SINGLE_100, "double": DOUBLE},
}


class Properties(NamedTuple):
    """What the schedules know of a device: the row of TILES, the number of multiprocessors, and the
    bytes of L2, 0 if that is not known."""

    architecture: int
    processors: int
    l2: int = 0


def row_of(major: int, minor: int) -> int:
    """The row of TILES for a compute capability: the nearest that is not above it."""
    if major < 8:
        raise RuntimeError(
            "the Triton backend needs a GPU of compute capability 8.0 or newer, "
            f"this one has {major}.{minor}"
        )
    if (major, minor) in ((8, 6), (8, 9)) or major == 12:
        return 86
    return max(row for row in TILES if row != 86 and row <= 10 * major + minor)


@cache
def properties(device: torch.device) -> Properties:
    if device.type != "cuda":  # the interpreter; few, so that work is split there too
        return Properties(0, 2)
    found = torch.cuda.get_device_properties(device)
    row, l2 = row_of(found.major, found.minor), getattr(found, "L2_cache_size", 0)
    return Properties(row, found.multi_processor_count, l2)


def processors(device: torch.device) -> int:
    return properties(device).processors


def bucket(dim: int) -> int:
    """The power of two that holds a vector, at least 16; 0 where it is read in slices."""
    if dim > RESIDENT_DIM:
        return 0
    return max(16, 1 << (dim - 1).bit_length())


def width_of(dim: int) -> int:
    """Which of WIDTHS serves a number of features."""
    return max(64, bucket(dim)) if bucket(dim) else 0


def tile(schedule: str, dim: int, kind: str, device: torch.device) -> Tile:
    width = 0 if schedule == "coefficient" else bucket(dim)
    if INTERPRETED:
        return SMALL._replace(block_k=width or SMALL.block_k)
    found = TILES[properties(device).architecture][kind][schedule][width_of(dim) if width else 0]
    return found._replace(block_k=min(found.block_k, width)) if width else found
