"""Products of paired vectors, <x_i, y_ik>."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import statistics_dtype
from . import engine
from . import row_dot_kernels as kernels
from .configs import INTERPRETED, arithmetic
from .engine import cdiv, next_power_of_2

# Pairs (x_i, y_ik) of a program.
PROGRAM_PAIRS = 1024 if INTERPRETED else 64


def arguments(x: Tensor, y: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Sizes, strides and constants of the kernels for <x_i, y_ik>."""
    dim = x.shape[1]
    sizes = (*y.shape[:2], x.stride(0), x.stride(1), *y.stride())
    acc = arithmetic(x, y).sum
    return sizes, {"DIM": dim, "ACC": acc, "BLOCK_K": min(128, next_power_of_2(dim))}


def products(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    """<x_i, y_ik>, (N, K)."""
    (n, keys, *strides), constants = arguments(x, y)
    out = torch.empty((n, keys), dtype=statistics_dtype(x), device=x.device)
    engine.launch(
        kernels.row_dot_kernel, (cdiv(n * keys, PROGRAM_PAIRS),), x, y, out, n * keys, keys,
        *strides, NORMALIZE=normalize, BLOCK=PROGRAM_PAIRS, **constants,
    )  # fmt: skip
    return out


def products_backward(
    x: Tensor, y: Tensor, grad: Tensor, normalize: bool, needs_x: bool, needs_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y from those of <x_i, y_ik>."""
    (n, keys, *strides), constants = arguments(x, y)
    dx, dy = (torch.empty(t.shape if need else (0,), dtype=t.dtype, device=t.device)
              for t, need in ((x, needs_x), (y, needs_y)))  # fmt: skip
    if keys == 1:
        engine.launch(
            kernels.row_dot_backward_kernel, (cdiv(n, PROGRAM_PAIRS),), x, y, grad,
            dx if needs_x else None, dy if needs_y else None, n, *strides, NORMALIZE=normalize,
            BLOCK=PROGRAM_PAIRS, **constants,
        )  # fmt: skip
        return dx, dy
    weights = along = None
    if needs_x:
        weights, along = torch.empty_like(grad), torch.empty_like(grad)
    engine.launch(
        kernels.row_dot_keys_kernel, (cdiv(n * keys, PROGRAM_PAIRS),), x, y, grad,
        dy if needs_y else None, weights, along, n * keys, keys, *strides, NORMALIZE=normalize,
        BLOCK=PROGRAM_PAIRS, **constants,
    )  # fmt: skip
    if needs_x:
        block_n = min(PROGRAM_PAIRS, next_power_of_2(keys))
        block_m = PROGRAM_PAIRS // block_n
        grid = (cdiv(n, block_m), cdiv(constants["DIM"], constants["BLOCK_K"]))
        engine.launch(
            kernels.row_dot_queries_kernel, grid, x, y, weights, along, dx, n, keys, *strides,
            NORMALIZE=normalize, BLOCK_M=block_m, BLOCK_N=block_n, **constants,
        )  # fmt: skip
    return dx, dy
