"""Tiles of each schedule, and what differs between versions of Triton or between devices.

The table is found by `python -m contrastive_kernels tune`; nothing is tuned at import or at a call.
"""

import os
from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl

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
    exact = torch.get_float32_matmul_precision() == "highest"
    return Arithmetic(tl.float32, tl.float32, "tf32x3" if exact else "tf32", "single")


# The largest number of features that a program holds at once.
RESIDENT_DIM = 256

TILES = {
    90: {
        "half": {
            "stats": {64: Tile(128, 128, 64, 8, 3), 128: Tile(128, 128, 128, 8, 2),
                      256: Tile(128, 128, 256, 8, 2), 0: Tile(128, 128, 64, 8, 4)},
            "attend": {64: Tile(128, 128, 64, 8, 3), 128: Tile(128, 64, 128, 8, 3),
                       256: Tile(128, 64, 256, 8, 2)},
            "two_way": {64: Tile(64, 128, 64, 8, 3), 128: Tile(64, 128, 128, 8, 3),
                        256: Tile(64, 128, 256, 8, 2), 0: Tile(128, 128, 64, 8, 4)},
            "gradient": {64: Tile(128, 128, 64, 8, 3), 128: Tile(128, 64, 128, 8, 3),
                         256: Tile(128, 64, 256, 8, 2)},
            "coefficient": {0: Tile(128, 128, 64, 8, 4)},
        },
    },
}  # fmt: skip
SMALL = Tile(64, 64, 32, 4, 2)


def bucket(dim: int) -> int:
    """The power of two that holds a vector, at least 16; 0 where it is read in slices."""
    if dim > RESIDENT_DIM:
        return 0
    return max(16, 1 << (dim - 1).bit_length())


def tile(schedule: str, dim: int, kind: str, device: torch.device) -> Tile:
    width = bucket(dim)
    if kind != "half":
        return SMALL._replace(block_k=width or SMALL.block_k)
    rows = TILES[90][kind][schedule]
    found = rows[0 if width == 0 else max(64, width)]
    return found._replace(block_k=width) if width else found


@cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors; few in the interpreter, so that work is split there too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
