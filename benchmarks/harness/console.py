"""What a run prints: progress on stderr, and the table on stdout."""

import statistics
import sys
import time
from collections.abc import Iterable

from .implementations import DENSE, OURS, Implementation, implementations
from .markdown import asked_for
from .timing import Timing

NAME = 52
HEAD = (
    f"  {'implementation':{NAME}s} {'median':>11s}  {'p20 .. p80':^22s} {'ours/theirs':>11s}"
    f" {'peak memory':>11s} {'GFLOP/s':>8s} {'of GEMM':>7s}"
)


class Progress:
    """What is being done: one line that is overwritten on a terminal, a plain log elsewhere."""

    def __init__(self, title: str):
        self.title = title
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        """The next thing."""
        if sys.stderr.isatty():
            self.passing(text)
        else:
            print(f"  ... {self._line(text)}", file=sys.stderr, flush=True)

    def passing(self, text: str) -> None:
        """What a log leaves out."""
        if sys.stderr.isatty():
            print(f"\r\033[K{self._line(text)}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _line(self, text: str) -> str:
        return f"{self.title}: {text}, {time.perf_counter() - self.start:.0f} s"


def judged(ratio: float, at_most: float | None) -> str:
    if at_most is None:
        return f"{ratio:.3f}"
    return f"{ratio:.3f} (at most {at_most:.2f}: {'met' if ratio <= at_most else 'NOT MET'})"


def line(name: str, timing: Timing, rest: str) -> None:
    spread = f"[{timing.p20:.2f} .. {timing.p80:.2f}]"
    print(f"  {name:{NAME}s} {timing.median:10.2f} ms  {spread:24s} {rest}", flush=True)


def title(record: dict) -> str:
    """Name, sizes and what else tells a case from others."""
    sizes = " ".join(f"{name.upper()}={value}" for name, value in record["sizes"].items())
    text = f"{record['name']}  {sizes}  {record['dtype']}"
    if record["pass"] != "both":
        text += f"  {record['pass']} alone"
    return text + ("" if record["backend"] == "auto" else f"  on {record['backend']}")


def rows(record: dict, memory_limit: float | None) -> list[str]:
    """A case in the table; None: our memory has no bound there."""
    lines = [title(record)]
    if "failed" in record:
        return [*lines, f"  FAILED: {record['failed']}"]
    lines += [_row(one, memory_limit) for one in implementations(record)]
    reasons = {name: m["reason"] for name, m in record.get("memory", {}).items() if "reason" in m}
    absent = {one.name for one in implementations(record) if one.reason}
    return lines + [
        f"  {name:{NAME}s} no peak memory: {brief(reason)}"
        for name, reason in reasons.items()
        if name not in absent
    ]


def brief(reason: str) -> str:
    asked = asked_for(reason)
    return reason if asked is None else f"OOM: asked for {asked / 1e9:.1f} GB"


def _row(one: Implementation, memory_limit: float | None) -> str:
    memory = "" if one.memory_mb is None else f"{one.memory_mb:.1f} MB"
    if one.milliseconds is None:
        return f"  {one.name:{NAME}s} {brief(one.reason)}" + (memory and f"; peak memory {memory}")
    times = one.milliseconds
    spread = f"[{times['p20']:.2f} .. {times['p80']:.2f}]"
    ratio = "" if one.ratio is None else f"{one.ratio:.3f}"
    rate = "" if one.rate is None else f"{one.rate / 1e9:.0f}"
    fraction = "" if one.gemm_fraction is None else f"{one.gemm_fraction:.0%}"
    text = f"  {one.name:{NAME}s} {times['median']:8.2f} ms  {spread:22s} {ratio:>11s}"
    text += f" {memory:>11s} {rate:>8s} {fraction:>7s}"
    if one.at_most is not None:
        text += f"  at most {one.at_most:.2f}: {_met(one.ratio, one.at_most)}"
    if None not in (memory_limit, one.memory_mb) and one.name.startswith(OURS):
        text += f"  at most {memory_limit:.0f} MB: {_met(one.memory_mb, memory_limit)}"
    return text


def _met(value: float, at_most: float) -> str:
    return "met" if value <= at_most else "NOT MET"


def summary(records: Iterable[dict]) -> str | None:
    """How ours compares with dense torch, in a sentence; None if nothing was compared."""
    ratios, memories = [], []
    for record in records:
        by_name = {one.name: one for one in implementations(record)}
        dense = by_name.get(DENSE)
        if dense is None or dense.ratio is None:
            continue
        ratios.append(dense.ratio)
        pair = by_name[OURS].memory_mb, dense.memory_mb
        if None not in pair:
            memories.append(pair)
    if not ratios:
        return None
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else f"{ratios[0]:.2f}"
    text = f"Ours took {spread} of the time of dense eager torch"
    if len(ratios) > 1:
        text += f" (median {statistics.median(ratios):.2f} of {len(ratios)} cases)"
    if memories:
        ours, theirs = (max(values) for values in zip(*memories, strict=True))
        text += (
            f", and at most {ours:.0f} MB beyond inputs and gradients where it took {theirs:.0f}"
        )
    return text + "."
