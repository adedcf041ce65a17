"""The registered operators on Triton kernels; their arguments and results are in registration.py.

The first eight arguments of those on pairs are x, y, scale, bias and the ids.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import backward, forward, pairs
from .backward import Upstream
from .engine import COLUMNS, ROWS, Problem
from .sweep import Outputs


def row_stats(*arguments) -> tuple[Tensor, ...]:
    threshold, mean, normalize, columns, attend = arguments[8:]
    with _device(arguments[0]):
        problem = _problem(arguments[:8], normalize)
        empty = [problem.empty(0) for _ in range(9)]
        if problem.unit and not mean and threshold is None and (columns or problem.symmetric):
            lse, col_lse = forward.two_way(problem)
            return (lse, empty[0], col_lse if columns else empty[1], *empty[2:8])
        if threshold is not None:
            threshold = threshold.contiguous()
        out = forward.stats(problem, ROWS, mean=mean, threshold=threshold, attend=attend)
        col = forward.stats(problem, COLUMNS, mean=mean) if columns else Outputs()
        results = (*out[:2], *col[:2], *out[2:5], out.gradient, out.slope)
        return tuple(e if t is None else t for t, e in zip(results, empty, strict=True))


def row_stats_backward(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse, mean, col_lse, col_mean, attended, slope, *grads, normalize, needs = arguments[8:]
    x, y = arguments[:2]
    with _device(x):
        dx = dscale = None
        if attended.numel() > 0:
            grad = grads[0].masked_fill(lse == -torch.inf, 0.0)
            if needs[0]:
                dx = torch.mul(attended, grad[:, None], out=torch.empty_like(attended))
            if needs[2]:
                dscale = (grad * slope).sum()
            needs = [False, needs[1], False, needs[3]]
        if any(needs):
            problem = _problem(arguments[:8], normalize)
            upstream = Upstream()
            half = x.dtype == torch.float16
            upstream.add(ROWS, lse, mean, *grads[:2], half)
            upstream.add(COLUMNS, col_lse, col_mean, *grads[2:], half)
            out = backward.gradients(problem, upstream, needs)
        else:
            out = tuple(t.new_empty(0) for t in (x, x if y is None else y, lse, lse))
        return out[0] if dx is None else dx, out[1], out[2] if dscale is None else dscale, out[3]


def row_softplus(*arguments) -> tuple[Tensor, ...]:
    threshold, normalize, attend = arguments[8:]
    with _device(arguments[0]):
        problem = _problem(arguments[:8], normalize)
        if any(attend):
            value, *made = backward.summed_softplus(problem, attend)
            return value.reshape(1), *(problem.empty(0) for _ in range(3)), *made
        if threshold is not None:
            threshold = threshold.contiguous()
        out = forward.stats(problem, ROWS, softplus=True, threshold=threshold)
        values = (out.first, out.rank, out.total, out.count)
        dtypes = (*(t.dtype for t in problem.inputs), problem.dtype, problem.dtype)
        absent = (problem.empty(0, dtype=dtype) for dtype in dtypes)
        return *(problem.empty(0) if t is None else t for t in values), *absent


def row_softplus_backward(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, normalize, needs = arguments[8:]
    x = arguments[0]
    with _device(x):
        upstream = Upstream(softplus=True)
        upstream.add(ROWS, None, None, grad, None, x.dtype == torch.float16)
        return backward.gradients(_problem(arguments[:8], normalize), upstream, needs)


def row_dot(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    with _device(x):
        return pairs.products(x, y, normalize)


def row_dot_backward(
    x: Tensor, y: Tensor, grad: Tensor, normalize: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    with _device(x):
        return pairs.products_backward(x, y, grad.contiguous(), normalize, needs)


def _problem(arguments: tuple, normalize: bool) -> Problem:
    x, y, scale, bias, exclude_rows, exclude_columns, keep_rows, keep_columns = arguments
    products = None
    if y is not None and y.dim() == 3:
        products = pairs.products(x, y, normalize)
    ids = (exclude_rows, exclude_columns), (keep_rows, keep_columns)
    return Problem(x, y, scale, bias, *ids, normalize, products)


def _device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: makes that the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
