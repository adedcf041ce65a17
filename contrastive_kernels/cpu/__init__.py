"""The registered operators on the CPU engine; their schemas are in ops/schemas.py.

Import it only where `backends.CPU_ERROR` is None. `_cpu` knows no torch: it takes addresses, sizes
and strides. What it reads is checked and brought into its types here, and what it writes is
allocated here. A statistic that was not asked for is None, a gradient that was not an empty tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu  # type: ignore[attr-defined]  # compiled
from ..backends import check_aligned
from .operands import Operands, address, contiguous, operands, optional, own_rows, vector

LSE, LSE_MEAN, SOFTPLUS = range(3)  # Fold in csrc/cpu/tile.h
_NO_COUNTS = (0, 0, 0, 0)
NOWHERE = (0, 0, 0, 0, 0)  # neither statistics nor what came for them

Results = tuple[Tensor | None, ...]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
Into = tuple[Tensor | None, Tensor | None]


def row_stats(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude_rows: Tensor | None,
    exclude_cols: Tensor | None,
    keep_rows: Tensor | None,
    keep_cols: Tensor | None,
    threshold: Tensor | None,
    mean: bool,
    normalize: bool,
    columns: bool,
    attend: bool,
    together: bool,
    aligned: bool,
) -> Results:
    """(lse, mean, col_lse, col_mean, rank, total, count, attended, slope, lse_low, col_lse_low,
    mean_low, col_mean_low, partner)."""
    given = operands(
        x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, normalize, together
    )
    if columns and (y is None or given.own_keys or together):
        raise ValueError("columns need keys (M, D)")
    if attend and (together or given.own_keys):
        raise ValueError("attend needs shared keys")
    partner = _partner(given, x, y, keep_rows, aligned)
    keep = may_be_differentiated(x, y, scale, bias)
    rows, keys, like = given.rows, given.keys, given.like
    lse, low = like.new_empty(rows), like.new_empty(rows)
    means = mean_low = col_lse = col_low = col_means = col_mean_low = None
    if mean:
        means, mean_low = like.new_empty(rows), like.new_empty(rows)
    if columns:
        col_lse, col_low = like.new_empty(keys), like.new_empty(keys)
    if columns and mean:
        col_means, col_mean_low = like.new_empty(keys), like.new_empty(keys)
    attended = like.new_empty(rows, x.shape[1]) if attend else None
    counts, addresses, _held = _counts(threshold, given)
    keeper = _cpu.forward(
        given.pairs,
        LSE_MEAN if mean else LSE,
        keep and not attend,
        tuple(map(address, (lse, low, means, mean_low, attended))),
        (*map(address, (col_lse, col_low, col_means, col_mean_low)), 0) if columns else NOWHERE,
        addresses,
        address(partner),
    )
    return (
        lse, means, col_lse, col_means, *counts, attended, None, kept(keeper, low), col_low,
        mean_low, col_mean_low, partner,
    )  # fmt: skip


def row_stats_backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude_rows: Tensor | None,
    exclude_cols: Tensor | None,
    keep_rows: Tensor | None,
    keep_cols: Tensor | None,
    lse: Tensor | None,
    mean: Tensor | None,
    col_lse: Tensor | None,
    col_mean: Tensor | None,
    attended: Tensor | None,
    slope: Tensor | None,
    lse_low: Tensor | None,
    col_lse_low: Tensor | None,
    grad_lse: Tensor | None,
    grad_mean: Tensor | None,
    grad_col_lse: Tensor | None,
    grad_col_mean: Tensor | None,
    grad_partner: Tensor | None,
    normalize: bool,
    needs: list[bool],
    together: bool,
    into: Into = (None, None),
) -> Gradients:
    """`into`: contiguous gradients of x and y, where these are added to what is there."""
    given = operands(
        x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, normalize, together
    )
    rows = _upstream(given.rows, given.like.dtype, lse, lse_low, mean, grad_lse, grad_mean)
    columns = _upstream(
        given.keys, given.like.dtype, col_lse, col_lse_low, col_mean, grad_col_lse, grad_col_mean
    )
    attended = None if attended is None else attended.contiguous()
    return _backward(given, x, y, scale, bias, rows, columns, attended, grad_partner, needs, into)


def row_softplus(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude_rows: Tensor | None,
    exclude_cols: Tensor | None,
    keep_rows: Tensor | None,
    keep_cols: Tensor | None,
    threshold: Tensor | None,
    normalize: bool,
    attend: list[bool],
    aligned: bool,
) -> Results:
    """(value, rank, total, count, dx, dy, dscale, dbias, partner, low)."""
    if y is None:
        raise ValueError("row_softplus needs y")
    if any(attend):
        raise ValueError("the sum over rows is not offered here")
    given = operands(x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, normalize)
    value, low = given.like.new_empty(given.rows), given.like.new_empty(given.rows)
    counts, addresses, _held = _counts(threshold, given)
    partner = _partner(given, x, y, keep_rows, aligned)
    keeper = _cpu.forward(
        given.pairs, SOFTPLUS, may_be_differentiated(x, y, scale, bias),
        (value.data_ptr(), low.data_ptr(), 0, 0, 0), NOWHERE, addresses, address(partner),
    )  # fmt: skip
    return value, *counts, None, None, None, None, partner, kept(keeper, low)


def row_softplus_backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude_rows: Tensor | None,
    exclude_cols: Tensor | None,
    keep_rows: Tensor | None,
    keep_cols: Tensor | None,
    low: Tensor | None,
    grad: Tensor,
    grad_partner: Tensor | None,
    normalize: bool,
    needs: list[bool],
) -> Gradients:
    given = operands(x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, normalize)
    rows = _upstream(given.rows, given.like.dtype, None, low, None, grad, None)
    return _backward(given, x, y, scale, bias, rows, None, None, grad_partner, needs, (None, None))


def row_dot(x: Tensor, y: Tensor, ends: Tensor | None, normalize: bool) -> Tensor:
    rows = own_rows(x, y, ends, normalize)
    out = x.new_empty(y.shape[:-1], dtype=rows.dtype)
    _cpu.row_dot(*rows.arguments, out.data_ptr())
    return out


def row_dot_backward(
    x: Tensor, y: Tensor, ends: Tensor | None, grad: Tensor, normalize: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    rows = own_rows(x, y, ends, normalize)
    if grad.shape != y.shape[:-1]:
        raise ValueError(f"grad must have shape {list(y.shape[:-1])}, got {list(grad.shape)}")
    grad = contiguous(grad, rows.dtype)
    dx = x.new_empty(x.shape) if needs[0] else x.new()
    dy = y.new_empty(y.shape) if needs[1] else y.new()
    _cpu.row_dot_backward(*rows.arguments, grad.data_ptr(), dx.data_ptr(), dy.data_ptr())
    return dx, dy


def may_be_differentiated(*inputs: Tensor | None) -> bool:
    """Whether a backward sweep may follow: this runs below autograd, which leaves the mode on where
    it records."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def kept(keeper: _cpu.Keeper | None, low: Tensor) -> Tensor:
    """`low`, or what stands for it and for logits that are kept, which live as long as it does."""
    return low if keeper is None else torch.frombuffer(keeper, dtype=low.dtype).view_as(low)


def _partner(
    given: Operands, x: Tensor, y: Tensor | None, keep_rows: Tensor | None, aligned: bool
) -> Tensor | None:
    """Where the logits of the rows that belong together go."""
    if not aligned:
        return None
    rows, keys = x.shape[0], 0 if y is None or y.dim() != 2 else y.shape[0]
    check_aligned(rows, keys, keep_rows, equal=given.together)
    return given.like.new_empty(given.rows)


def _counts(
    threshold: Tensor | None, given: Operands
) -> tuple[Results, tuple[int, ...], Tensor | None]:
    """(rank, total, count), what `_cpu` takes for them, and what it has the address of."""
    if threshold is None:
        return (None, None, None), _NO_COUNTS, None
    threshold = vector(threshold, "threshold", given.rows, given.like.dtype)
    counts = tuple(given.like.new_empty(given.rows) for _ in range(3))
    return counts, (threshold.data_ptr(), *map(address, counts)), threshold


def _upstream(
    size: int,
    dtype: torch.dtype,
    lse: Tensor | None,
    low: Tensor | None,
    mean: Tensor | None,
    grad_lse: Tensor | None,
    grad_mean: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Statistics of one side and their gradients, as `_cpu` reads them."""
    return (
        _statistic(lse, "lse", size, dtype),
        _statistic(low, "lse_low", size, dtype),
        _statistic(mean, "mean", size, dtype),
        optional(grad_lse, "grad_lse", size, dtype),
        optional(grad_mean, "grad_mean", size, dtype),
    )


def _statistic(t: Tensor | None, name: str, size: int, dtype: torch.dtype) -> Tensor | None:
    return None if t is None or not t.numel() else vector(t, name, size, dtype)


def _backward(
    given: Operands,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    rows: tuple[Tensor | None, ...],
    columns: tuple[Tensor | None, ...] | None,
    attended: Tensor | None,
    grad_partner: Tensor | None,
    needs: list[bool],
    into: Into,
) -> Gradients:
    grad_partner = optional(grad_partner, "grad_partner", given.rows, given.like.dtype)
    need_x, need_y, need_scale, need_bias = needs
    if given.together:  # dx is of the rows of both
        need_x, need_y = need_x or need_y, False
    into_x, into_y = into
    dx, dy = into_x, into_y
    if dx is None:
        dx = x.new_empty(given.rows, x.shape[1]) if need_x else x.new()
    if dy is None:
        dy = y.new_empty(y.shape) if need_y and y is not None else x.new()
    dbias = given.like.new_empty(given.keys) if need_bias else given.like.new()
    slope = _cpu.backward(
        given.pairs,
        columns is None,  # of softplus
        tuple(map(address, rows)),
        NOWHERE if columns is None else tuple(map(address, columns)),
        address(attended),
        address(grad_partner),
        (
            dx.data_ptr(),
            dy.data_ptr(),
            need_scale,
            dbias.data_ptr(),
            into_x is not None,
            into_y is not None,
        ),
    )
    dscale = scale.new_full((), slope) if need_scale else scale.new()
    return dx, dy, dscale, dbias.to(bias.dtype) if need_bias and bias is not None else dbias
