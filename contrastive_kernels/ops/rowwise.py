"""What is made row by row of the operands of a sweep: the products of the positives, norms.

Its gradients have the size of the features, beside those that the sweep gives. `tied` hands the
operands on, so that both meet in one node of the graph, which adds its own to the sweep's in place,
a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..autograd import in_forward_mode, in_transform, once_differentiable
from ..types import known

BLOCK_ELEMENTS = 2**20  # of the features of a block of rows


class Local(Protocol):
    """A function of each row x_i and its own y_i, ... (N, ...)."""

    def values(self, x: Tensor, y: Tensor | None) -> Tensor:
        """(N,) or (N, K) of x (N, D) and y (N, K, D), in the type of the statistics."""

    def gradients(
        self, x: Tensor, y: Tensor | None, values: Tensor, grad: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of x and y, where they are needed."""


def by_rows(x: Tensor, y: Tensor) -> Tensor:
    """y (K N, D), K blocks of a vector for each row of x, as (N, K, D); one of three axes is so."""
    return y if y.dim() == 3 else y.view(-1, *x.shape).transpose(0, 1)


def can_tie(backend: str, features: Tensor, smallest: int | None = None) -> bool:
    """Whether `tied` may be used: not where autograd has to see through it, nor without rows, nor
    for fewer elements than `smallest`, by default those of a block: a node costs time, too."""
    if backend == "reference" or torch.compiler.is_compiling():
        return False
    if in_transform() or in_forward_mode():
        return False
    return features.numel() > (BLOCK_ELEMENTS if smallest is None else smallest)


def tied(
    local: Local, x: Tensor, y: Tensor | None = None, which: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values of `local`, x, y): what sweeps are to take in the place of x and y, and nothing else.

    y is (N, K, D) or (K N, D); with `which` (N,) it is (M, D), of which that one is the row's.
    """
    needs = (_needs_grad(x), _needs_grad(y))
    if not any(needs):
        return _values(local, x, y, which), x, y
    values, tied_x, tied_y = _Tied.apply(local, x, y, which)
    return values, tied_x if needs[0] else x, tied_y if needs[1] else y


def _needs_grad(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad and torch.is_grad_enabled()


def _row_blocks(x: Tensor, each: int) -> list[slice | None]:
    """Blocks of rows, which have `each` vectors of y; None: all of them."""
    size = max(1, BLOCK_ELEMENTS // (x[0].numel() * max(1, each)))
    if size >= x.shape[0]:
        return [None]
    return [slice(i, i + size) for i in range(0, x.shape[0], size)]


def _of(rows: slice | None, *tensors: Tensor | None) -> tuple[Any, ...]:
    """A block of rows of tensors."""
    return tensors if rows is None else tuple(t if t is None else t[rows] for t in tensors)


def _blocks(
    x: Tensor, y: Tensor | None, which: Tensor | None
) -> Iterator[tuple[slice | None, Tensor, Tensor | None, Tensor | None]]:
    """(rows, x of these, their own y (n, K, D), which y they are) of one block after another."""
    own = None if y is None or which is not None else by_rows(x, y)
    for rows in _row_blocks(x, 1 if own is None else own.shape[1]):
        of_x, of_own, index = _of(rows, x, own, which)
        if index is not None:
            of_own = known(y)[index].unsqueeze(1)
        yield rows, of_x, of_own, index


def _values(local: Local, x: Tensor, y: Tensor | None, which: Tensor | None) -> Tensor:
    parts = [local.values(of_x, own) for _, of_x, own, _ in _blocks(x, y, which)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local: Local, x: Tensor, y: Tensor | None, which: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        values = _values(local, x, y, which)
        ctx.local = local
        ctx.save_for_backward(x, y, which, values)
        ctx.set_materialize_grads(False)
        _, of_x, of_y, _ = ctx.needs_input_grad
        tied_y = y.view_as(y) if y is not None and of_y else None
        return values, x.view_as(x) if of_x else None, tied_y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_x: Tensor | None, grad_y: Tensor | None
    ) -> tuple[None, Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, grad_x, grad_y, None
        x, y, which, values = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[1:3])
        grad_x = own_gradient(x, grad_x, grad) if needs[0] else None
        grad_y = own_gradient(y, grad_y, grad) if needs[1] else None
        to_own = None if grad_y is None or which is not None else by_rows(x, grad_y)
        for rows, of_x, own, index in _blocks(x, y, which):
            given = _of(rows, values, grad)
            of_rows, of_own = ctx.local.gradients(of_x, own, *given, needs)
            total_x, total_own = _of(rows, grad_x, to_own)
            if of_rows is not None:
                total_x += of_rows
            if of_own is not None and index is not None:
                known(grad_y).index_add_(0, index, of_own.squeeze(1))
            elif of_own is not None:
                total_own += of_own
        return None, grad_x, grad_y, None


def own_gradient(features: Tensor, of_sweeps: Tensor | None, grad: Tensor) -> Tensor:
    """Where a gradient is added that comes of `grad`: sweeps make theirs anew, and no one else
    holds it."""
    if of_sweeps is None:  # no sweep has used what was handed on
        return grad.new_zeros(features.shape, dtype=features.dtype)
    if torch._C._has_storage(of_sweeps) and not torch._C._has_storage(grad):  # several at once
        return of_sweeps + grad.new_zeros(features.shape, dtype=features.dtype)
    return of_sweeps.clone() if of_sweeps.requires_grad else of_sweeps
