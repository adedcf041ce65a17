"""The kernels of sweeps at several prefixes of the features, for ops/nested.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu  # type: ignore[attr-defined]  # compiled
from ..backends import check_aligned, check_ends
from . import LSE, NOWHERE, SOFTPLUS, Gradients, Results, kept, may_be_differentiated
from .operands import Operands, address, contiguous, operands


def nested_stats(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude_rows: Tensor | None,
    exclude_cols: Tensor | None,
    keep_rows: Tensor | None,
    keep_cols: Tensor | None,
    ends: list[int],
    softplus: bool,
    normalize: bool,
    columns: bool,
    together: bool,
    aligned: bool,
) -> Results:
    """(lse, col_lse, partner, lse_low, col_lse_low)."""
    given = operands(
        x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, normalize, together
    )
    _check(given, ends, x)
    if (columns or softplus) and (y is None or together or (columns and softplus)):
        raise ValueError("columns, and softplus without them, need keys (M, D)")
    if aligned:
        keys = 0 if y is None else y.shape[0]
        check_aligned(x.shape[0], keys, keep_rows, equal=together)
    count, like = len(ends), given.like
    lse, low = (like.new_empty(count, given.rows) for _ in range(2))
    col_lse, col_low = (like.new_empty(count, given.keys) if columns else None for _ in range(2))
    partner = like.new_empty(count, given.rows) if aligned else None
    keeper = _cpu.forward_nested(
        given.pairs,
        ends,
        SOFTPLUS if softplus else LSE,
        may_be_differentiated(x, y, scale, bias),
        (lse.data_ptr(), low.data_ptr(), 0, 0, 0),
        (*map(address, (col_lse, col_low)), 0, 0, 0) if columns else NOWHERE,
        address(partner),
    )
    return lse, col_lse, partner, kept(keeper, low), col_low


def nested_stats_backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude_rows: Tensor | None,
    exclude_cols: Tensor | None,
    keep_rows: Tensor | None,
    keep_cols: Tensor | None,
    lse: Tensor,
    col_lse: Tensor | None,
    lse_low: Tensor,
    col_lse_low: Tensor | None,
    grad_lse: Tensor | None,
    grad_col_lse: Tensor | None,
    grad_partner: Tensor | None,
    ends: list[int],
    softplus: bool,
    normalize: bool,
    needs: list[bool],
    together: bool,
) -> Gradients:
    given = operands(
        x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, normalize, together
    )
    _check(given, ends, x)
    count, dtype = len(ends), given.like.dtype
    of_rows, of_keys = (count, given.rows), (count, given.keys)
    rows = (
        None if softplus else _vectors(lse, "lse", of_rows, dtype),
        _vectors(lse_low, "lse_low", of_rows, dtype),
        None,
        _vectors(grad_lse, "grad_lse", of_rows, dtype),
        None,
    )
    columns = None
    if grad_col_lse is not None:
        columns = (
            _vectors(col_lse, "col_lse", of_keys, dtype),
            _vectors(col_lse_low, "col_lse_low", of_keys, dtype),
            None,
            _vectors(grad_col_lse, "grad_col_lse", of_keys, dtype),
            None,
        )
    grad_partner = _vectors(grad_partner, "grad_partner", of_rows, dtype)
    need_x, need_y, need_scale, need_bias = needs
    if together:  # dx is of the rows of both
        need_x, need_y = need_x or need_y, False
    dx = x.new_empty(given.rows, x.shape[1]) if need_x else x.new()
    dy = y.new_empty(y.shape) if need_y and y is not None else x.new()
    dbias = given.like.new_empty(given.keys) if need_bias else given.like.new()
    slope = _cpu.backward_nested(
        given.pairs,
        ends,
        softplus,
        tuple(map(address, rows)),
        NOWHERE if columns is None else tuple(map(address, columns)),
        address(grad_partner),
        (dx.data_ptr(), dy.data_ptr(), need_scale, dbias.data_ptr(), False, False),
    )
    dscale = scale.new_full((), slope) if need_scale else scale.new()
    return dx, dy, dscale, dbias.to(bias.dtype) if need_bias and bias is not None else dbias


def _check(given: Operands, ends: list[int], x: Tensor) -> None:
    if given.own_keys:
        raise ValueError("prefixes need shared keys (M, D)")
    check_ends(ends, x.shape[1])


def _vectors(
    t: Tensor | None, name: str, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor | None:
    """Values of each prefix, one after the other, in a type that `_cpu` reads."""
    if t is None:
        return None
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    return contiguous(t, dtype)
