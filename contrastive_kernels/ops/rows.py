"""Rows taken by index, and rows summed by index in one order: each is the derivative of the other.

On a GPU torch's index_add, which is the backward of index_select too, adds by atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..autograd import precise
from .registration import NAMESPACE


def take_rows(x: Tensor, which: Tensor, backend: str) -> Tensor:
    """x[which] (N, D), for x (M, D) and indices (N,)."""
    if adds_in_order(x):
        return x.index_select(0, which)
    if backend == "reference":
        return precise(reference.take_rows)(x, which)
    return _take_rows(x, which)


def sum_rows(x: Tensor, which: Tensor, count: int, backend: str) -> Tensor:
    """(count, D): for every index the sum of the rows of x (M, D) that `which` (M,) gives it."""
    if adds_in_order(x):
        return x.new_zeros(count, x.shape[1]).index_add(0, which, x)
    if backend == "reference":
        return precise(reference.sum_rows)(x, which, count)
    return _sum_rows(x, which, count)


def add_rows(total: Tensor, which: Tensor, x: Tensor, backend: str) -> None:
    """Adds the rows of x (M, D) in place to those of `total` (N, D) that `which` (M,) names."""
    if adds_in_order(x):
        total.index_add_(0, which, x)
    else:
        total += sum_rows(x, which, len(total), backend)


def adds_in_order(x: Tensor) -> bool:
    """Whether index_add goes from row to row, as it does on CPUs."""
    return x.device.type == "cpu"


@torch.library.custom_op(f"{NAMESPACE}::take_rows", mutates_args=())
def _take_rows(x: Tensor, which: Tensor) -> Tensor:
    return x.index_select(0, which)


@torch.library.custom_op(f"{NAMESPACE}::sum_rows", mutates_args=())
def _sum_rows(x: Tensor, which: Tensor, count: int) -> Tensor:
    """Sums of neighbours, once rows are in the order of their indices."""
    ordered, order = which.sort(stable=True)
    ends = torch.arange(count + 1, device=x.device, dtype=which.dtype)
    offsets = torch.searchsorted(ordered, ends)
    return torch.segment_reduce(
        x.index_select(0, order), "sum", offsets=offsets, initial=0, unsafe=True
    )


def _setup_take(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, which = inputs
    ctx.count = x.shape[0]
    ctx.save_for_backward(which)


def _setup_sum(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


_take_rows.register_fake(lambda x, which: x.new_empty(which.shape[0], x.shape[1]))
_sum_rows.register_fake(lambda x, which, count: x.new_empty(count, x.shape[1]))
_take_rows.register_autograd(
    lambda ctx, grad: (_sum_rows(grad, *ctx.saved_tensors, ctx.count), None),
    setup_context=_setup_take,
)
_sum_rows.register_autograd(
    lambda ctx, grad: (_take_rows(grad, *ctx.saved_tensors), None, None), setup_context=_setup_sum
)
