"""A package's own function, with its products of features held back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor


class Product:
    """scale x y^T + bias of features x (N, D) and y (M, D), which is not made.

    Whatever is done with it but to transpose, scale and shift it by numbers is done with the
    matrix.
    """

    def __init__(
        self, x: Tensor, y: Tensor, scale: float | Tensor = 1.0, bias: float | Tensor = 0.0
    ) -> None:
        self.x, self.y, self.scale, self.bias = x, y, scale, bias

    def matrix(self) -> Tensor:
        return torch.matmul(self.x, self.y.t()) * self.scale + self.bias

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def T(self) -> Product:
        return Product(self.y, self.x, self.scale, self.bias)

    def t(self) -> Product:
        return self.T

    def __mul__(self, factor: Any) -> Any:
        if not _is_number(factor):
            return self.matrix() * factor
        return Product(self.x, self.y, self.scale * factor, self.bias * factor)

    def __truediv__(self, divisor: Any) -> Any:
        return self * (1 / divisor)

    def __add__(self, shift: Any) -> Any:
        if not _is_number(shift):
            return self.matrix() + shift
        return Product(self.x, self.y, self.scale, self.bias + shift)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.matrix(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        def made(value: Any) -> Any:
            return value.matrix() if isinstance(value, Product) else value

        named = {name: made(value) for name, value in (kwargs or {}).items()}
        return function(*map(made, args), **named)


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor | Product) or (
        isinstance(value, Tensor) and value.numel() == 1
    )


def _matmul(x: Any, y: Any) -> Any:
    both = isinstance(x, Tensor) and isinstance(y, Tensor)
    return Product(x, y.t()) if both and x.dim() == y.dim() == 2 else torch.matmul(x, y)


def _module(name: str, contents: dict[str, Any], **others: Any) -> ModuleType:
    """A module that torch.compile finds again by its name."""
    module = ModuleType(name)
    vars(module).update(contents, **others, __name__=name)
    sys.modules[name] = module
    return module


_torch = _module(f"{__name__}.torch", vars(torch), matmul=_matmul)


def with_products(function: FunctionType, name: str) -> FunctionType:
    """A copy of `function` that gets a `Product` from torch.matmul of two matrices.

    It has globals of its own, copied now: those of a module, as torch.compile wants them.
    """
    home = _module(name, function.__globals__, torch=_torch)
    copied = (vars(home), function.__name__, function.__defaults__, function.__closure__)
    return FunctionType(function.__code__, *copied)
