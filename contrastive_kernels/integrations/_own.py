"""What a fused form takes for granted of an object, and whether the object is still so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


class Own:
    """What a fused form computes itself, and what therefore must be as the package has it.

    Args:
        owner: a class, or a module.
        names: methods of the class, or functions of the module, as they are now.
        functions: attributes that must be one of the given functions, bound or not.
        options: attributes that must have one of the given values.
        parts: attributes that are objects, with what must be so of each.
        beside: modules whose functions are replaced too.
        called: the object is called, which a fused form is not: hooks would not run.
    """

    def __init__(
        self,
        owner: type | ModuleType,
        *names: str,
        functions: Mapping[str, Iterable[Callable]] | None = None,
        options: Mapping[str, tuple] | None = None,
        parts: Mapping[str, Own] | None = None,
        beside: Iterable[Own] = (),
        called: bool = False,
    ) -> None:
        self.owner, self.called = owner, called
        methods: dict[str, tuple[Any, ...]] = {n: (own_function(owner, n),) for n in names}
        if called:
            methods["__call__"] = (nn.Module.__call__,)
        self.held = {name: tuple(allowed) for name, allowed in (functions or {}).items()}
        self.functions = methods | self.held
        self._unchanged = _Unchanged(owner, methods)
        self.options, self.parts = dict(options or {}), dict(parts or {})
        self.beside = tuple(beside)

    def replaced(self, thing: Any, path: str = "") -> str | None:
        """What of `thing` is not the package's own, as a reason to run unfused, or None."""
        quick = not torch.compiler.is_compiling() and self._unchanged(thing)
        for name, allowed in (self.held if quick else self.functions).items():
            found = getattr(thing, name, None)
            if getattr(found, "__func__", found) not in allowed or (
                getattr(found, "__self__", thing) is not thing
            ):
                return f"{path}{name} is overridden"
        for name, values in self.options.items():
            value = getattr(thing, name)
            if isinstance(value, Tensor) or value not in values:
                shown = "a tensor" if isinstance(value, Tensor) else repr(value)
                return f"{path}{name} is {shown}"
        if self.called and _has_any_global_hook():
            return "torch has hooks of all modules"
        if self.called and (
            thing._forward_hooks
            or thing._forward_pre_hooks
            or thing._backward_hooks
            or thing._backward_pre_hooks
        ):
            return f"{path.rstrip('.')} has hooks"
        for name, own in self.parts.items():
            part = getattr(thing, name)
            if not isinstance(part, own.owner):  # type: ignore[arg-type]
                return f"the {path}{name} is {getattr(part, '__name__', type(part).__name__)}"
            reason = own.replaced(part, f"{path}{name}.")
            if reason is not None:
                return reason
        for own in self.beside:
            reason = own.replaced(own.owner)
            if reason is not None:
                return reason
        return None

    def holds(self, thing: Any) -> bool:
        """Whether `thing` is of the class, and all that is named is so."""
        return isinstance(thing, self.owner) and self.replaced(thing) is None  # type: ignore


class _Unchanged:
    """A quick look, which decides most calls: whether the functions of an object are the only ones
    allowed by its type, and none is an attribute of its own."""

    def __init__(self, owner: type | ModuleType, functions: Mapping[str, tuple]) -> None:
        self.of_module = isinstance(owner, ModuleType)
        self.names = frozenset(functions)
        self.get = attrgetter(*functions, "__name__")  # a name more: always a tuple
        self.wanted = tuple(allowed[0] for allowed in functions.values())

    def __call__(self, thing: Any) -> bool:
        if self.of_module:
            return self.get(thing)[:-1] == self.wanted
        if not self.names.isdisjoint(thing.__dict__):
            return False
        return self.get(type(thing))[:-1] == self.wanted


def own_function(owner: type | ModuleType, name: str) -> Any:
    """The function `owner.name`, or None where somebody else's is there already."""
    function = getattr(owner, name)
    module = owner.__module__ if isinstance(owner, type) else owner.__name__
    for layer in _layers(function):
        origin = getattr(layer, "__globals__", {"__name__": module})["__name__"]
        if origin.partition(".")[0] not in ("torch", module.partition(".")[0]):
            return None
    return function


def _layers(function: Any) -> Iterable[Any]:
    """A function, and those that its decorators wrap."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def cross_entropy(*reductions: str, label_smoothing: bool = False) -> Own:
    """torch's cross entropy of labels that all count alike, in one of the reductions."""
    options: dict[str, tuple] = {"weight": (None,), "ignore_index": (-100,)}
    options["reduction"] = reductions
    if not label_smoothing:
        options["label_smoothing"] = (0.0,)
    return Own(nn.CrossEntropyLoss, "forward", options=options, called=True)


def one_entry(**scalars: Any) -> str | None:
    """Which of the named numbers is a tensor of another size than 1, as a reason, or None."""
    for name, value in scalars.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            return f"{name} has more than one entry"
    return None
