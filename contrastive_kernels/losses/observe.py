"""What a loss says of a call to whoever looks on: its statistics, its time and its memory.

Callbacks of trainers look on in the steps that they log; in all others a loss costs what it does.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..autograd import in_forward_mode, in_transform
from ..types import LossStats
from ..workspace import engine_peak

P = ParamSpec("P")
R = TypeVar("R")

_NUMBERS = ("accuracy", "positive_similarity", "negative_similarity", "mi_lower_bound")


class Observation:
    """One call of a loss.

    name: of the function.
    stats: `LossStats`, None of a loss that has none.
    forward_seconds, backward_seconds: the latter nan until there was a backward pass.
    peak_bytes: the most memory in its forward and backward pass: on a GPU all that torch allocated
        beyond what there was before; on a CPU the buffers of the engine.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.stats: LossStats | None = None
        self.forward_seconds = self.backward_seconds = float("nan")
        self.peak_bytes = 0
        self._base = _restart_peak(device)
        self._start = _now(device)

    def end_forward(self) -> None:
        self.forward_seconds = _now(self.device) - self._start
        self._note_peak()

    def start_backward(self, _grad: Tensor) -> None:
        self._start = _now(self.device)

    def end_backward(self, _grad: Tensor) -> None:
        """Called for each gradient; the last one counts."""
        self.backward_seconds = _now(self.device) - self._start
        self._note_peak()

    def numbers(self) -> dict[str, float]:
        """What there is to log, by name; reads from the device."""
        stats = self.stats or LossStats()
        found = {name: getattr(stats, name) for name in _NUMBERS}
        numbers = {name: float(value) for name, value in found.items() if value is not None}
        numbers["forward_ms"] = 1e3 * self.forward_seconds
        if self.backward_seconds == self.backward_seconds:
            numbers["backward_ms"] = 1e3 * self.backward_seconds
        numbers["memory_mb"] = self.peak_bytes / 2**20
        return numbers

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, _peak(self.device) - self._base)


class _Watch:
    """Where calls are reported; None: nobody looks on."""

    into: list[Observation] | None = None


@contextmanager
def observed() -> Iterator[list[Observation]]:
    """Every call of a loss within is reported in the list, with its statistics; those in a
    transform, a graph of torch.compile or a CUDA graph that is captured are not.

    Ranks that call losses with a group must look on together. On a GPU every call waits for the
    device, and torch's peak of allocated memory starts again.
    """
    before, calls = _Watch.into, []  # type: ignore[var-annotated]
    _Watch.into = calls
    try:
        yield calls
    finally:
        _Watch.into = before


def observable(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a loss, which is reported where somebody looks on."""
    has_stats = "return_stats" in inspect.signature(function).parameters

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _Watch.into is None or _cannot_look():
            return function(*args, **options)
        calls, _Watch.into = _Watch.into, None  # what this loss calls is part of it
        try:
            return _report(function, has_stats, calls, args, options)
        finally:
            _Watch.into = calls

    return call


def _report(
    function: Callable[..., Any],
    has_stats: bool,
    calls: list[Observation],
    args: tuple,
    options: dict[str, Any],
) -> Any:
    features = next(_tensors((*args, *options.values())), torch.empty(0))
    asked = options.get("return_stats", False)
    seen = Observation(function.__name__, features.device)
    aliases: dict[int, Tensor] = {}
    args = _replaced(args, aliases)
    options = {name: _replaced(value, aliases) for name, value in options.items()}
    if has_stats:
        options["return_stats"] = True
    result = function(*args, **options)
    loss, seen.stats = result if has_stats else (result, None)
    seen.end_forward()
    if loss.requires_grad:
        loss.register_hook(seen.start_backward)
        for alias in aliases.values():
            alias.register_hook(seen.end_backward)
    calls.append(seen)
    return result if asked else loss


def _replaced(value: Any, aliases: dict[int, Tensor]) -> Any:
    """`value` with each tensor that gets a gradient as an alias, whose gradient is that of this
    loss alone."""
    if isinstance(value, Tensor):
        if not (value.requires_grad and torch.is_grad_enabled()):
            return value
        return aliases.setdefault(id(value), value.view_as(value))
    if type(value) in (list, tuple):
        return type(value)(_replaced(each, aliases) for each in value)
    return value


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from _tensors(value)


def _cannot_look() -> bool:
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return capturing or in_transform() or in_forward_mode()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _restart_peak(device: torch.device) -> int:
    """What there is now of others, from which a peak starts."""
    if device.type != "cuda":
        engine_peak()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    if device.type != "cuda":
        return engine_peak()
    return torch.cuda.max_memory_allocated(device)
