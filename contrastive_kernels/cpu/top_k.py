"""The kernel of the largest products of each row, for ops/top_k_operators.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu  # type: ignore[attr-defined]  # compiled
from .operands import address, operands, optional


def top_k(
    x: Tensor,
    y: Tensor,
    exclude_rows: Tensor | None,
    exclude_cols: Tensor | None,
    keep_rows: Tensor | None,
    keep_cols: Tensor | None,
    threshold: Tensor | None,
    floor: Tensor | None,
    k: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    if y.dim() != 2 or k < 1:
        raise ValueError(f"top_k needs y (M, D) and k >= 1, got {list(y.shape)} and {k}")
    ids = exclude_rows, exclude_cols, keep_rows, keep_cols
    given = operands(x, y, torch.ones(()), None, *ids, normalize)
    floor = optional(floor, "floor", given.rows, given.like.dtype)
    threshold = optional(threshold, "threshold", given.rows, given.like.dtype)
    values = given.like.new_empty(given.rows, k)
    found = x.new_empty(given.rows, k, dtype=torch.int64)
    _cpu.top_k(
        given.pairs, k, address(floor), address(threshold), values.data_ptr(), found.data_ptr()
    )
    return values, found
