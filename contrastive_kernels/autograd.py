"""The one way in which a derivative that is not there is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def no_second_order(ctx: Any = None, *_: Any) -> Any:
    """The backward of what has no second derivative."""
    raise NotImplementedError(
        'second-order gradients need backend="reference", without group and chunks: this backward '
        "has no derivative"
    )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd.Function: what it gives is refused a derivative in what
    it is made of, the gradients from above and the saved tensors.

    torch's decorator of this name does not tie the result to these, so that a second derivative
    could be 0 in silence.
    """

    @wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            made = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return made  # torch.compile refuses second derivatives itself; or no create_graph=True
        of = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        if not of:
            return made
        if isinstance(made, Tensor):
            return _Refuse.apply(made, *of)
        return tuple(t if t is None else _Refuse.apply(t, *of) for t in made)

    return call


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, *of: Tensor) -> Tensor:
        return made.view_as(made)

    backward = staticmethod(no_second_order)
