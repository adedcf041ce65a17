"""The largest products of each row on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import statistics_dtype
from . import engine, top_k_kernels
from .engine import COLUMNS, ROWS, Problem, cdiv, next_power_of_2
from .launching import device_of

LEAST = 8  # of a list, which is sorted whole


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
) -> tuple[Tensor, Tensor] | None:
    """Lists (N, L >= k) of products and keys, those of each part of the keys in their order; None:
    of such long lists, and of float64, there is no kernel."""
    with device_of(x):
        exclude, keep = (exclude_rows, exclude_cols), (keep_rows, keep_cols)
        dtype = statistics_dtype(x)
        problem = Problem(x, y, x.new_ones((), dtype=dtype), None, exclude, keep, normalize)
        chosen = problem.tile("stats")
        length = max(LEAST, next_power_of_2(k))
        if dtype != torch.float32 or length > chosen.block_n:
            return None
        rows, keys = problem.side(ROWS), problem.side(COLUMNS)
        parts, each = problem.parts(rows.size, keys.size, chosen, False)
        values = problem.empty(parts, rows.size, k)
        ids = problem.empty(parts, rows.size, k, dtype=torch.int64)
        threshold, floor = (t if t is None else t.contiguous() for t in (threshold, floor))
        engine.launch(
            top_k_kernels.top_k_kernel, (cdiv(rows.size, chosen.block_m), parts), rows, keys,
            threshold, floor, values, ids, each, k, K=length, **problem.constants(chosen),
        )  # fmt: skip
        values, ids = (t.transpose(0, 1).reshape(rows.size, parts * k) for t in (values, ids))
        return values, ids
