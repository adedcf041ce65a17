"""Counts what a call allocates: every block that torch's CPU allocator hands out, and what the CPU
engine takes for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_of(step: Callable[[], tuple[Tensor | None, ...]]) -> int:
    """The most bytes that were allocated at one time during a call, beyond what it returns.

    Allocations of other threads than this one are not seen: call it with one thread.
    """
    kept, changes = _changes(step)
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    memory = (t.untyped_storage() for t in kept if t is not None)  # which two may share
    return peak - sum({part.data_ptr(): part.nbytes() for part in memory}.values())


def all_of(step: Callable[[], Any]) -> int:
    """The bytes that were allocated during a call, whether at one time or not."""
    return sum(max(change, 0) for change in _changes(step)[1])


def _changes(step: Callable[[], Any]) -> tuple[Any, list[int]]:
    """(Result of a call, the bytes of each block that was taken or, below 0, given back.)"""
    with (
        _engine_counts(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found,
    ):
        kept = step()
    events = found.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return kept, [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


@contextmanager
def _engine_counts() -> Iterator[None]:
    """What a call of the engine took at most is allocated once more, for a moment, before its
    results are used."""
    from contrastive_kernels import _cpu, cpu
    from contrastive_kernels.whitening import cpu as whitening

    def counted(function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            _cpu.memory_peak()
            before = _cpu.memory_peak()  # what there is now
            made = function(*args)
            torch.empty(_cpu.memory_peak() - before, dtype=torch.uint8)
            return made

        return call

    engine = SimpleNamespace(
        **{name: counted(f) for name, f in vars(_cpu).items() if callable(f) and name[0] != "_"}
    )
    modules = (cpu, whitening)
    for module in modules:
        module._cpu = engine
    try:
        yield
    finally:
        for module in modules:
            module._cpu = _cpu
