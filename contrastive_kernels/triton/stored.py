"""Logits of long vectors by a library's products, a piece at a time that stays in L2 until it was
read.

A program that reads long vectors in slices asks L2 for them again for every tile, and waits for it;
a library's products run at the rate of the tensor cores, and what reads them once has little to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import configs
from .configs import Tile
from .tiles import Side

if TYPE_CHECKING:
    from .engine import Problem

# Of L2, for a piece: the rest is for the vectors that are multiplied, and for what is written.
SHARE = 0.65
LEAST_BYTES = 16 << 20  # smaller products are slow, and their launches many
TILE = Tile(64, 128, 16, 8, 1)


def shape(problem: Problem) -> tuple[int, int] | None:
    """Rows and columns of a piece, powers of two; None where programs multiply themselves: float32
    as three products of TF32, which no library has, and where L2 is small."""
    if problem.paired or problem.few or problem.dim <= problem.resident:
        return None
    size = SHARE * configs.properties(problem.device).l2
    if problem.arithmetic.kind != "half" or size < LEAST_BYTES:
        return None
    return of_bytes(size)


def of_bytes(size: float) -> tuple[int, int]:
    """The piece of float32 logits that is at most so large."""
    pairs = 1 << (int(size) // 4).bit_length() - 1
    rows = 1 << math.isqrt(pairs).bit_length() - 1
    return rows, pairs // rows


def pieces(
    piece: tuple[int, int] | None, rows: slice, columns: slice
) -> Iterator[tuple[slice, slice]]:
    """Those of a part of the matrix; the part itself without a piece."""
    if piece is None:
        yield rows, columns
        return
    for start in range(rows.start, rows.stop, piece[0]):
        for begin in range(columns.start, columns.stop, piece[1]):
            yield (
                slice(start, min(start + piece[0], rows.stop)),
                slice(begin, min(begin + piece[1], columns.stop)),
            )


def products(rows: Side, columns: Side, buffer: Tensor) -> tuple[Side, Side]:
    """The sides of a piece, for kernels with DIM = 0, which read the inner products."""
    z = buffer[: rows.size * columns.size].view(rows.size, columns.size)
    multiply(z, rows.features, columns.features.T)
    width = columns.size
    return (
        rows._replace(features=z, stride=width, inner=1),
        columns._replace(features=z, stride=width, inner=1),
    )


def multiply(out: Tensor, a: Tensor, b: Tensor, before: Tensor | None = None) -> None:
    """out = a b, or before + a b, with the sum in the type of `out`."""
    b = b.to(a.dtype)
    if not a.is_cuda:
        a, b = a.to(out.dtype), b.to(out.dtype)
    mixed: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if before is None:
        torch.mm(a, b, out=out, **mixed)
    else:
        torch.addmm(before, a, b, out=out, **mixed)
