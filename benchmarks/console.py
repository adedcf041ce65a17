"""What a run prints as it goes."""

import sys
import time

from .measure import Timing


class Progress:
    """One line that is overwritten on a terminal, and left out elsewhere."""

    def __init__(self, title: str):
        self.title = title
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            seconds = time.perf_counter() - self.start
            line = f"{self.title}: {text}, {seconds:.0f} s"
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def judged(ratio: float, at_most: float | None) -> str:
    if at_most is None:
        return f"{ratio:.3f}"
    return f"{ratio:.3f} (at most {at_most:.2f}: {'met' if ratio <= at_most else 'NOT MET'})"


def line(name: str, timing: Timing, rest: str) -> None:
    spread = f"[{timing.p20:.2f} .. {timing.p80:.2f}]"
    print(f"  {name:40s} {timing.median:10.2f} ms  {spread:24s} {rest}", flush=True)
