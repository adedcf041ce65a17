"""The registered operators on Triton kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import engine
from .engine import COLUMNS, ROWS, Problem, Upstream


def row_stats(
    x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, threshold, mean, normalize,
    columns, attend,
) -> tuple[Tensor, ...]:  # fmt: skip
    with _device(x):
        problem = Problem(
            x, y, scale, bias, (exclude_rows, exclude_cols), (keep_rows, keep_cols), normalize
        )  # fmt: skip
        empty = [problem.empty(0) for _ in range(9)]
        if problem.unit and not mean and threshold is None and (columns or problem.symmetric):
            lse, col_lse = engine.two_way(problem)
            return (lse, empty[0], col_lse if columns else empty[1], *empty[2:8])
        if threshold is not None:
            threshold = threshold.contiguous()
        out = engine.stats(problem, ROWS, mean=mean, threshold=threshold, attend=attend)
        col = engine.stats(problem, COLUMNS, mean=mean) if columns else engine.Outputs()
        results = (out[:2], col[:2], out[2:5], (out.gradient, out.slope))
        flat = [t for group in results for t in group]
        return tuple(e if t is None else t for t, e in zip(flat, empty, strict=True))


def row_stats_backward(
    x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, lse, mean, col_lse,
    col_mean, attended, slope, grad_lse, grad_mean, grad_col_lse, grad_col_mean, normalize, needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with _device(x):
        dx = dscale = None
        if attended.numel() > 0:
            grad = grad_lse.masked_fill(lse == -torch.inf, 0.0)
            if needs[0]:
                dx = torch.mul(attended, grad[:, None], out=torch.empty_like(attended))
            if needs[2]:
                dscale = (grad * slope).sum()
            needs = [False, needs[1], False, needs[3]]
        if any(needs):
            problem = Problem(
                x, y, scale, bias, (exclude_rows, exclude_cols), (keep_rows, keep_cols), normalize
            )  # fmt: skip
            upstream = Upstream()
            half = x.dtype == torch.float16
            upstream.add(ROWS, lse, mean, grad_lse, grad_mean, half)
            upstream.add(COLUMNS, col_lse, col_mean, grad_col_lse, grad_col_mean, half)
            out = engine.gradients(problem, upstream, needs)
        else:
            out = tuple(t.new_empty(0) for t in (x, x if y is None else y, lse, lse))
        return out[0] if dx is None else dx, out[1], out[2] if dscale is None else dscale, out[3]


def row_softplus(
    x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, threshold, normalize,
    attend,
) -> tuple[Tensor, ...]:  # fmt: skip
    with _device(x):
        problem = Problem(
            x, y, scale, bias, (exclude_rows, exclude_cols), (keep_rows, keep_cols), normalize
        )  # fmt: skip
        empty = problem.empty(0)
        if any(attend):
            value, *made = engine.summed_softplus(problem, attend)
            return value.reshape(1), empty, empty.clone(), empty.clone(), *made
        if threshold is not None:
            threshold = threshold.contiguous()
        out = engine.stats(problem, ROWS, softplus=True, threshold=threshold)
        values = (out.first, out.rank, out.total, out.count)
        absent = (problem.empty(0, dtype=t.dtype) for t in (x, y, scale, scale))
        return *(problem.empty(0) if t is None else t for t in values), *absent


def row_softplus_backward(
    x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, grad, normalize, needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with _device(x):
        problem = Problem(
            x, y, scale, bias, (exclude_rows, exclude_cols), (keep_rows, keep_cols), normalize
        )  # fmt: skip
        upstream = Upstream(softplus=True)
        upstream.add(ROWS, None, None, grad, None, x.dtype == torch.float16)
        return engine.gradients(problem, upstream, needs)


def row_dot(x, y, normalize) -> Tensor:
    with _device(x):
        return engine.paired_products(x, y, normalize)


def row_dot_backward(x, y, grad, normalize, needs) -> tuple[Tensor, Tensor]:
    with _device(x):
        return engine.paired_products_backward(x, y, grad.contiguous(), normalize, needs)


def _device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: makes that the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
