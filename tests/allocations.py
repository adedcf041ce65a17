"""Counts what a call allocates: every block that torch's CPU allocator hands out, by C++ too."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_of(step: Callable[[], tuple[Tensor | None, ...]]) -> int:
    """The most bytes that were allocated at one time during a call, beyond what it returns.

    Allocations of other threads than this one are not seen: call it with one thread.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        kept = step()
    live = peak = 0
    for event in sorted(_allocations(found), key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    memory = (t.untyped_storage() for t in kept if t is not None)  # which two may share
    return peak - sum({part.data_ptr(): part.nbytes() for part in memory}.values())


def _allocations(found: profile) -> list:
    events = found.profiler.kineto_results.events()
    return [event for event in events if event.name() == "[memory]"]
