"""The registered operators on Triton kernels; their schemas are in ops/schemas.py.

Features x and y, scale and bias of the logits, ids that exclude pairs or keep them: as in
`ops.sweep`. A result that was not asked for is an empty tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import known
from . import backward, forward, hopper_check, row_dots
from .backward import Gradients, Upstream
from .engine import COLUMNS, ROWS, Into, Needs, Problem
from .launching import device_of
from .sweep import Outputs


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
) -> tuple[Tensor, ...]:
    """(lse, mean, col_lse, col_mean, rank, total, count, attended, slope, lse_low, col_lse_low,
    mean_low, col_mean_low, partner)."""
    assert not together  # backends.can_join
    exclude, keep = (exclude_rows, exclude_cols), (keep_rows, keep_cols)
    with device_of(x):
        problem = _problem(x, y, scale, bias, exclude, keep, normalize)
        partner = problem.pack_partners(keep_rows) if aligned else None
        unit = problem.bounded and bias is None and not problem.few
        if unit and not mean and threshold is None and (columns or problem.symmetric):
            row, col = forward.two_way(problem)
            col = col if columns else Outputs()
        elif columns and problem.few:
            row, col = forward.stats_both(problem, mean, threshold)
        else:
            row = forward.stats(problem, ROWS, mean=mean, threshold=threshold, attend=attend)
            col = forward.stats(problem, COLUMNS, mean=mean) if columns else Outputs()
        statistics = (row.first, row.second, col.first, col.second)
        counts = (row.rank, row.total, row.pairs)
        return _or_empty(
            problem,
            *statistics,
            *counts,
            row.gradient,
            row.slope,
            row.low,
            col.low,
            row.second_low,
            col.second_low,
            partner,
        )


def row_stats_backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude_rows: Tensor | None,
    exclude_cols: Tensor | None,
    keep_rows: Tensor | None,
    keep_cols: Tensor | None,
    lse: Tensor,
    mean: Tensor,
    col_lse: Tensor,
    col_mean: Tensor,
    attended: Tensor,
    slope: Tensor,
    lse_low: Tensor,
    col_lse_low: Tensor,
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
    assert not together
    exclude, keep = (exclude_rows, exclude_cols), (keep_rows, keep_cols)
    wanted = Needs(*needs)
    # by an `attend` the forward pass has made the gradients of x and of the scale
    made = attended.numel() > 0
    assert not (made and grad_partner is not None)
    missing = wanted._replace(x=False, scale=False) if made else wanted
    with device_of(x):
        if any(missing):
            problem = _problem(x, y, scale, bias, exclude, keep, normalize)
            upstream = Upstream()
            half = x.dtype == torch.float16
            upstream.add(ROWS, lse, mean, grad_lse, grad_mean, half, lse_low)
            upstream.add(COLUMNS, col_lse, col_mean, grad_col_lse, grad_col_mean, half, col_lse_low)
            upstream.add_partner(grad_partner, lse, half, lse_low)
            out = backward.gradients(problem, upstream, missing, into)
        else:
            out = backward.no_gradients(x, x if y is None else y, lse.dtype)
        if made:
            grad = known(grad_lse).masked_fill(lse == -torch.inf, 0.0)
            if wanted.x:
                if into[ROWS] is None:
                    dx = torch.mul(attended, grad[:, None], out=torch.empty_like(attended))
                else:
                    dx = known(into[ROWS]).addcmul_(attended, grad[:, None])
                out = out._replace(x=dx)
            if wanted.scale:
                out = out._replace(scale=(grad * slope).sum())
        return out


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
) -> tuple[Tensor, ...]:
    """(value, rank, total, count, dx, dy, dscale, dbias, partner, low); gradients of the sum over
    the rows."""
    assert not (aligned and any(attend))
    exclude, keep = (exclude_rows, exclude_cols), (keep_rows, keep_cols)
    with device_of(x):
        problem = _problem(x, y, scale, bias, exclude, keep, normalize)
        partner = problem.pack_partners(keep_rows) if aligned else problem.empty(0)
        if any(attend):
            value, gradients = backward.summed_softplus(problem, Needs(*attend))
            row = Outputs(value.reshape(1))
        else:
            row = forward.stats(problem, ROWS, softplus=True, threshold=threshold)
            gradients = backward.no_gradients(*problem.inputs, problem.dtype)
        values = _or_empty(problem, row.first, row.rank, row.total, row.pairs)
        return *values, *gradients, partner, problem.empty(0)


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
    exclude, keep = (exclude_rows, exclude_cols), (keep_rows, keep_cols)
    with device_of(x):
        problem = _problem(x, y, scale, bias, exclude, keep, normalize)
        upstream = Upstream(softplus=True)
        upstream.add(ROWS, None, None, grad, None, x.dtype == torch.float16)
        upstream.partner = None if grad_partner is None else grad_partner.contiguous()
        return backward.gradients(problem, upstream, Needs(*needs))


def row_dot(x: Tensor, y: Tensor, ends: Tensor | None, normalize: bool) -> Tensor:
    with device_of(x):
        return row_dots.products(x, y, normalize, ends)


def row_dot_backward(
    x: Tensor, y: Tensor, ends: Tensor | None, grad: Tensor, normalize: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    with device_of(x):
        return row_dots.products_backward(
            x, y, grad.contiguous(), normalize, needs[0], needs[1], ends
        )


def _problem(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude: tuple[Tensor | None, Tensor | None],
    keep: tuple[Tensor | None, Tensor | None],
    normalize: bool,
) -> Problem:
    hopper_check.on_request(x.device)
    products = None
    if y is not None and y.dim() == 3:  # keys of their own
        products = row_dots.products(x, y, normalize)
    return Problem(x, y, scale, bias, exclude, keep, normalize, products)


def _or_empty(problem: Problem, *results: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(problem.empty(0) if t is None else t for t in results)
