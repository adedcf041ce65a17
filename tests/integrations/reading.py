"""What a function of a package reads, found in its source: attributes and methods of its object,
those of the object's parts, and functions of the package."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import nn


@functools.cache
def tree(function: FunctionType) -> ast.FunctionDef:
    """Without decorators and hints."""
    found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    found.decorator_list, found.returns = [], None
    for argument in ast.walk(found):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return found


def package(function: Any) -> str:
    return function.__globals__["__name__"].partition(".")[0]


def chains(node: ast.AST, root: str) -> Iterator[list[str]]:
    """[b, c] for each root.b.c, and ["super()", b] for super().b."""
    for part in ast.walk(node):
        names, inner = [], part
        while isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
            inner = inner.value
        if not names or (isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)):
            continue
        if isinstance(inner, ast.Name) and inner.id == root:
            yield names
        elif isinstance(inner, ast.Call) and getattr(inner.func, "id", "") == "super":
            yield ["super()", *names]


def package_functions(function: FunctionType) -> Iterator[tuple[str, FunctionType]]:
    """The functions of its own package that a function names, as "module:name"."""
    scope, home = function.__globals__, package(function)
    if home == "torch":
        return
    for part in ast.walk(tree(function)):
        found, holder = None, function.__globals__["__name__"]
        if isinstance(part, ast.Name):
            name, found = part.id, scope.get(part.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            module = scope.get(part.value.id)
            if isinstance(module, ModuleType):
                name, holder, found = part.attr, module.__name__, getattr(module, part.attr, None)
        found = inspect.unwrap(found) if callable(found) else None
        if isinstance(found, FunctionType) and package(found) == home:
            yield f"{holder}:{name}", found


class Reads:
    """names: all that `function` reads of `thing` and of its package, but of what is in `closed`
    no more than the name."""

    def __init__(self, function: Callable, thing: Any, closed: tuple[str, ...] = ()) -> None:
        self.names: set[str] = set()
        self.closed = closed
        self._seen: set[tuple] = set()
        self._visit(function, thing, "")

    def _visit(self, function: Callable, thing: Any, path: str) -> None:
        function = inspect.unwrap(function)
        if (function, path) in self._seen:
            return
        self._seen.add((function, path))
        for name, found in package_functions(function):
            self.names.add(name)
            if name.partition(":")[2] not in self.closed:
                self._visit(found, None, path)
        arguments = tree(function).args.args
        if thing is None or not arguments:
            return
        for first, *more in chains(tree(function), arguments[0].arg):
            if first == "super()":
                self._visit(self._next(function, thing, more[0]), thing, path)
                continue
            self.names.add(path + first)
            if first in self.closed:
                continue
            method = inspect.getattr_static(type(thing), first, None)
            if isinstance(method, staticmethod | FunctionType):
                static = isinstance(method, staticmethod)
                self._visit(getattr(type(thing), first), None if static else thing, path)
                continue
            part = getattr(thing, first, None)
            if inspect.ismethod(part):  # an attribute that holds a method
                self._visit(part.__func__, thing, path)
            elif isinstance(part, nn.Module):
                read = more[0] if more else "forward"
                self.names.add(f"{path}{first}.{read}")
                if hasattr(type(part), read):
                    self._visit(getattr(type(part), read), part, f"{path}{first}.")

    @staticmethod
    def _next(function: FunctionType, thing: Any, name: str) -> Callable:
        """super().name in a method."""
        order = type(thing).__mro__
        here = next(i for i, c in enumerate(order) if function in vars(c).values())
        return next(vars(c)[name] for c in order[here + 1 :] if name in vars(c))


def attributes_of(function: Callable) -> set[str]:
    """All attribute names that one of our functions reads, and those of this package it calls."""
    names, seen, waiting = set(), set(), [inspect.unwrap(function)]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        names |= {part.attr for part in ast.walk(tree(current)) if isinstance(part, ast.Attribute)}
        waiting += [
            found for name, found in package_functions(current)
            if ".integrations." in found.__module__
        ]  # fmt: skip
    return names


def named(own: Any, path: str = "") -> set[str]:
    """All that an `Own` names, as `Reads` does."""
    of_module = isinstance(own.owner, ModuleType)
    prefix = f"{own.owner.__name__}:" if of_module else path
    names = {prefix + name for name in (*own.functions, *own.options) if name != "__call__"}
    for name, part in own.parts.items():
        names |= {path + name} | named(part, f"{path}{name}.")
    for beside in own.beside:
        names |= named(beside)
    return names
