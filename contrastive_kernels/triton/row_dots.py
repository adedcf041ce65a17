"""Products of paired vectors, <x_i, y_ik>."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import statistics_dtype
from . import engine
from . import row_dot_kernels as kernels
from .configs import INTERPRETED, arithmetic
from .engine import Into, cdiv, next_power_of_2

# Pairs (x_i, y_ik) of a program.
PROGRAM_PAIRS = 1024 if INTERPRETED else 64
SHORTEST_RUN = 8  # that a tile is made for: more rows at once take too many registers


class Pairing(NamedTuple):
    """The pairs (x_i, y_ik) as the kernels see them.

    keys: of each row, or about as many. ends (N,), owners (T,): where the keys of each row end, and
    the row of each key, of y (T, D); None for y (N, K, D).
    """

    rows: int
    keys: int
    total: int
    strides: tuple[int, ...]
    ends: Tensor | None
    owners: Tensor | None
    constants: dict[str, Any]


def pairing(x: Tensor, y: Tensor, ends: Tensor | None) -> Pairing:
    n, dim = x.shape
    acc = arithmetic(x, y).sum
    # of twice the features at once long vectors would spill
    constants = {"DIM": dim, "ACC": acc, "BLOCK_K": min(64, next_power_of_2(dim))}
    if ends is None:
        keys, strides = y.shape[1], (*x.stride(), *y.stride())
        return Pairing(n, keys, n * keys, strides, None, None, constants)
    total = y.shape[0]
    owners = torch.searchsorted(ends, torch.arange(total, device=x.device), right=True)
    owners.clamp_(max=n - 1)
    strides, keys = (*x.stride(), 0, *y.stride()), max(SHORTEST_RUN, cdiv(total, n))
    return Pairing(n, keys, total, strides, ends, owners, constants)


def products(x: Tensor, y: Tensor, normalize: bool, ends: Tensor | None = None) -> Tensor:
    """<x_i, y_ik>, (N, K), or (T,) with `ends`."""
    of = pairing(x, y, ends)
    out = torch.empty(y.shape[:-1], dtype=statistics_dtype(x), device=x.device)
    engine.launch(
        kernels.row_dot_kernel, (cdiv(of.total, PROGRAM_PAIRS),), x, y, of.owners, out, of.total,
        of.keys, *of.strides, NORMALIZE=normalize, BLOCK=PROGRAM_PAIRS, **of.constants,
    )  # fmt: skip
    return out


def products_backward(
    x: Tensor,
    y: Tensor,
    grad: Tensor,
    normalize: bool,
    needs_x: bool,
    needs_y: bool,
    ends: Tensor | None = None,
    into: Into = (None, None),
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y from those of <x_i, y_ik>; `into`: contiguous ones, to which they are
    added. A key whose product has the gradient 0 is not read: NaN in one that is left out goes
    nowhere."""
    of = pairing(x, y, ends)
    dx, dy = (
        torch.empty(t.shape if need else (0,), dtype=t.dtype, device=t.device) if there is None
        else there for t, need, there in ((x, needs_x, into[0]), (y, needs_y, into[1]))
    )  # fmt: skip
    add_x, add_y = (there is not None for there in into)
    if of.keys == 1 and ends is None:
        engine.launch(
            kernels.row_dot_backward_kernel, (cdiv(of.rows, PROGRAM_PAIRS),), x, y, grad,
            dx if needs_x else None, dy if needs_y else None, of.rows, *of.strides,
            ADD_X=add_x, ADD_Y=add_y, NORMALIZE=normalize, BLOCK=PROGRAM_PAIRS, **of.constants,
        )  # fmt: skip
        return dx, dy
    weights = along = None
    if needs_x:
        weights, along = torch.empty_like(grad), torch.empty_like(grad)
    engine.launch(
        kernels.row_dot_keys_kernel, (cdiv(of.total, PROGRAM_PAIRS),), x, y, of.owners, grad,
        dy if needs_y else None, weights, along, of.total, of.keys, *of.strides,
        ADD=add_y, NORMALIZE=normalize, BLOCK=PROGRAM_PAIRS, **of.constants,
    )  # fmt: skip
    if needs_x:
        block_n = min(PROGRAM_PAIRS, next_power_of_2(of.keys))
        block_m = PROGRAM_PAIRS // block_n
        grid = (cdiv(of.rows, block_m), cdiv(of.constants["DIM"], of.constants["BLOCK_K"]))
        engine.launch(
            kernels.row_dot_queries_kernel, grid, x, y, ends, weights, along, dx, of.rows, of.keys,
            *of.strides, ADD=add_x, NORMALIZE=normalize, BLOCK_M=block_m, BLOCK_N=block_n,
            **of.constants,
        )  # fmt: skip
    return dx, dy
