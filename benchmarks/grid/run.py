"""The run of `bench --grid`: point after point, into a file that a later run goes on with."""

import json
import os
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from ..cases.case import Case
from ..harness.environment import file_name, save
from ..harness.implementations import OURS, implementations
from ..harness.measure import Effort
from ..harness.paths import RESULTS
from .order import Clock
from .point import measure
from .verdict import verdict

FOLDER = RESULTS / "grid"
# torch's own kernels and ours follow the first, its libraries the others.
ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def isa(environment: dict) -> dict:
    """The instruction set: torch's choice, and what the libraries were told."""
    return {name: os.environ[name] for name in ISA_VARIABLES if name in os.environ} | {
        "capability": environment["capability"]
    }


def result_path(environment: dict) -> Path:
    """A file for each processor, number of threads, instruction set and torch."""
    return FOLDER / file_name(" ".join(identity(environment)))


def identity(environment: dict) -> tuple[str, ...]:
    """What results of one file have in common."""
    told = [
        f"{name} {value}"
        for name, value in sorted(environment["isa"].items())
        if name not in ("capability", "ATEN_CPU_CAPABILITY")  # which says the same
    ]
    return (
        environment["device"],
        f"{environment['threads']} threads",
        environment["capability"],
        *told,
        f"torch {environment['versions']['torch']}",
    )


def begun(path: Path | None, head: dict) -> dict:
    """The commands and the points that a file has.

    Raises:
        ValueError: they were measured on something else.
    """
    if path is None or not path.exists():
        return {"commands": [], "points": []}
    known = json.loads(path.read_text())
    before, now = (identity(each["environment"]) for each in (known, head))
    if before != now:
        raise ValueError(f"{path} is of {', '.join(before)}, not of {', '.join(now)}")
    return known


class Run:
    """The points of a result, of which those are measured that it has not.

    Attributes:
        result: the JSON, written to path after each point.
        left: the cases to measure, in order.
        skipped: how many are in the result.
    """

    def __init__(self, cases: list[Case], path: Path | None, head: dict, *, again: bool) -> None:
        self.path = path
        known = begun(path, head)
        self._points = {key(record): record for record in known["points"]}
        commands = list(dict.fromkeys([*known["commands"], head["command"]]))
        self.result = head | {"commands": commands, "points": list(self._points.values())}
        self.left = [case for case in cases if again or not self._has(case)]
        self.skipped = len(cases) - len(self.left)

    def _has(self, case: Case) -> bool:
        """Whether a point is there, with every baseline that is asked for; one that failed is
        not."""
        record = self._points.get(key(case.record()))
        if record is None or "failed" in record:
            return False
        return {b.name for b in case.baselines} <= {peer["name"] for peer in record["peers"]}

    def measure(self, effort: Effort, seconds: float | None) -> Iterator[tuple[dict, float]]:
        """The record of each case, and how many seconds the others will take.

        Args:
            seconds: a case begins if the clock says that it ends within them; None: all do.
        """
        start, clock = time.monotonic(), Clock()
        left = list(self.left)
        while left:
            case = left.pop(0)
            before = time.monotonic()
            if seconds is not None and before - start + clock.estimate(case) > seconds:
                continue
            count = f"[{len(self.left) - len(left)}/{len(self.left)}] "
            record = measure(case, self._points.values(), effort, count)
            record |= {
                "date": date.today().isoformat(),
                "commit": self.result["environment"]["commit"],
            }
            self._points[key(record)] = record
            self.result["points"] = list(self._points.values())
            clock.add(case, time.monotonic() - before)
            if self.path is not None:
                save(self.path, self.result)
            rest = sum(map(clock.estimate, left))
            if seconds is not None:
                rest = min(rest, max(0.0, seconds - (time.monotonic() - start)))
            yield record, rest


def key(record: dict) -> tuple:
    sizes = tuple(record["sizes"].items())
    return record["name"], record["dtype"], sizes, record["pass"], record["backend"]


def row(record: dict, seconds_left: float) -> str:
    """A point in one line."""
    sizes = record["sizes"]
    minutes, seconds = divmod(round(seconds_left), 60)
    text = f"{minutes:4}:{seconds:02} left  {record['name']:16s} {record['dtype']:9s}"
    text += f"{sizes['n']:>6} x {sizes['d']:<5}"
    if "failed" in record:
        return f"{text} FAILED: {record['failed']}"
    found = verdict(record)
    ratio = "" if found.ratio is None else f"{found.ratio:.2f} of "
    times = [
        f"{one.name} {one.milliseconds['median']:.4g}"
        if one.milliseconds
        else f"{one.name}: {one.reason}"
        for one in implementations(record)
    ]
    return f"{text} {ratio + found.text:20s} ms: " + ", ".join(times)


def told(records: list[dict]) -> str:
    """How many points ours wins."""
    verdicts = [verdict(record) for record in records]
    compared = [each for each in verdicts if each.won is not None]
    if not compared:
        return f"{OURS}: nothing to compare with"
    won, alone = (
        sum(map(bool, flags))
        for flags in ([v.won for v in compared], [v.ratio is None for v in compared])
    )
    text = f"Ours is faster at {won} of {len(compared)} points"
    if alone:
        text += f", at {alone} of them because the dense form does not fit or takes too long"
    return text + "."
