"""Registered operators of rows and what belongs to each, beside `row_dot`: squared distances to
keys of their own, and products with the other rows of a class. Only "cpu" has kernels of them; with
other backends they are plain torch, where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..autograd import no_second_order, reaches_kernel, register_rules
from ..backends import CPU_ERROR
from .registration import NAMESPACE
from .schemas import empty_gradients, empty_stats

_SCHEMAS = {
    "row_distance": "(Tensor x, Tensor y, bool normalize) -> Tensor",
    "row_distance_backward": (
        "(Tensor x, Tensor y, Tensor distance, Tensor grad, bool normalize, bool[2] needs) -> "
        "(Tensor dx, Tensor dy)"
    ),
    "class_dot": "(Tensor x, Tensor place, bool normalize) -> Tensor",
    "class_dot_backward": "(Tensor x, Tensor place, Tensor grad, bool normalize) -> Tensor",
}


def has_row_kernels(backend: str) -> bool:
    """Whether the operators here have kernels."""
    return backend == "cpu"


def row_distance(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    """|y_ik - x_i|^2 (N, K) of x (N, D) and y (N, K, D); with `normalize` of rows that are first
    divided by their norms (at least 1e-12)."""
    return _CALLS["row_distance"](x, y, normalize)


def row_distance_gradients(
    x: Tensor, y: Tensor, distance: Tensor, grad: Tensor, normalize: bool, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Its gradients by x and y, where they are needed."""
    made = _CALLS["row_distance_backward"](x, y, distance, grad, normalize, list(needs))
    return made[0] if needs[0] else None, made[1] if needs[1] else None


def class_dot(x: Tensor, place: Tensor, normalize: bool) -> Tensor:
    """<x_i, the sum of the other rows of the class of i> (N,); rows as in `row_distance`.

    place: (N,), int32, how many rows are of a class before that of row i.
    """
    return _CALLS["class_dot"](x, place, normalize)


def add_class_dot_gradient(
    total: Tensor, x: Tensor, place: Tensor, grad: Tensor, normalize: bool
) -> None:
    """Adds the gradient of `class_dot` by x to `total`, in place."""
    given = (x, place, grad, normalize)
    if total.is_contiguous() and reaches_kernel((total, *given)):
        _KERNELS["class_dot_backward"](*given, total)
    else:
        total += _CALLS["class_dot_backward"](*given)


def _setup_distance(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, y, ctx.normalize = inputs
    ctx.save_for_backward(x, y, output)


def _differentiate_distance(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, y, distance = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    return *row_distance_gradients(x, y, distance, grad, ctx.normalize, needs), None


def _setup_class_dot(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, place, ctx.normalize = inputs
    ctx.save_for_backward(x, place)


def _differentiate_class_dot(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    x, place = ctx.saved_tensors
    return _CALLS["class_dot_backward"](x, place, grad, ctx.normalize), None, None


def _setup_nothing(_ctx: Any, _inputs: tuple, _output: Any) -> None:
    pass


# fake, backward, context
_RULES: dict[str, tuple[Callable, Callable, Callable]] = {
    "row_distance": (
        lambda x, y, normalize: empty_stats(x, *y.shape[:-1]),
        _differentiate_distance, _setup_distance,
    ),
    "row_distance_backward": (
        lambda x, y, distance, grad, normalize, needs: empty_gradients(needs, x, y),
        no_second_order, _setup_nothing,
    ),
    "class_dot": (
        lambda x, place, normalize: empty_stats(x, x.shape[0]),
        _differentiate_class_dot, _setup_class_dot,
    ),
    "class_dot_backward": (
        lambda x, place, grad, normalize: x.new_empty(x.shape), no_second_order, _setup_nothing,
    ),
}  # fmt: skip
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_CALLS: dict[str, Callable] = {}
_KERNELS: dict[str, Callable] = {}


def _register() -> None:
    kernels = None if CPU_ERROR is not None else import_module("..cpu.rows", __package__)
    for name, schema in _SCHEMAS.items():
        _library.define(f"{name}_cpu{schema}")
        op = getattr(getattr(torch.ops, NAMESPACE), f"{name}_cpu").default
        kernel = getattr(kernels, name, None)
        if kernel is not None:
            _KERNELS[name] = kernel
        _CALLS[name] = register_rules(_library, op, *_RULES[name], kernel)


_register()
