"""The one way in which a derivative that is not there is refused, and derivatives by autograd in
full precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

P = ParamSpec("P")
T = TypeVar("T")


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


def precise(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function of tensors, the first argument one, that autograd differentiates: its
    products are those of its operands' dtype, forward and backward, inside autocast regions too."""

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        device = args[0].device.type  # type: ignore[attr-defined]
        with torch.autocast(device, enabled=False):
            made = function(*args, **options)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            given = (*args, *options.values())
            before = {t.grad_fn for t in given if isinstance(t, Tensor)}
            _guard_nodes(made, before, device)
        return made

    return call


def _guard_nodes(made: Any, before: set[Node | None], device: str) -> None:
    """Turn autocast off while any node between `before` and the results runs."""
    results = made if isinstance(made, tuple) else (made,)
    stack = [t.grad_fn for t in results if isinstance(t, Tensor)]
    modes: list[bool] = []

    def off(_grads: Any) -> None:
        modes.append(torch.is_autocast_enabled(device))
        torch.set_autocast_enabled(device, False)

    def back(_inputs: Any, _outputs: Any) -> None:
        torch.set_autocast_enabled(device, modes.pop())

    while stack:
        node = stack.pop()
        if node is None or node in before:
            continue
        before.add(node)
        if node.next_functions:  # not a leaf's
            node.register_prehook(off)
            node.register_hook(back)
            stack.extend(following for following, _ in node.next_functions)
