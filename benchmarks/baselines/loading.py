"""Imports of other packages, which are all optional: one that cannot be imported says why."""

import importlib
import importlib.util
import types
from collections.abc import Callable

import torch
from torch import Tensor

from .baseline import Loss


class Unavailable(Exception):
    """Why a baseline cannot run here."""


class Lazy:
    """A loss that is imported when it is first called, or by `load`.

    Raises:
        Unavailable: then, if it cannot be imported.
    """

    def __init__(self, module: str, build: Callable[[types.ModuleType], Loss]) -> None:
        self._module, self._build = module, build
        self._loss: Loss | None = None

    def load(self) -> "Lazy":
        if self._loss is None:
            declare_torchvision()
            try:
                self._loss = self._build(importlib.import_module(self._module))
            except ImportError as error:
                raise Unavailable(str(error)) from error
        return self

    def __call__(self, **tensors: Tensor) -> Tensor:
        return self.load()._loss(**tensors)


def missing(distribution: str) -> Unavailable:
    return Unavailable(f"not installed: pip install {distribution}")


# Operators stay declared only as long as their library is referred to.
_declared: list[torch.library.Library] = []


def declare_torchvision() -> None:
    """Lets a torchvision be imported whose compiled operators this build of torch cannot load, as a
    CPU build of torch beside torchvision's release: its Python part wants them declared."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


def load_class(distribution: str, module: str, name: str) -> type:
    """`name` out of `module`.

    Raises:
        Unavailable: the package is not installed, or cannot be imported.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise missing(distribution)
    declare_torchvision()
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Unavailable(f"{distribution} {module} cannot be imported: {error}") from error
