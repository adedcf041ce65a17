"""The parts, and what their trainings will cost."""

from collections.abc import Iterable
from typing import Any

from . import cacr, eqco, infomin, wmse
from .part import Part, Task

PARTS: dict[str, Part] = {
    "eqco": eqco.PART,
    "cacr": cacr.PART,
    "infomin": infomin.PART,
    "wmse": wmse.PART,
}
CORES, HOURS, SPARE = 2, 2, 0.25  # what a full run may take, and what of it stays free


def measure(name: str, task: Task, settings: dict[str, Any], chosen: dict) -> dict:
    """One training of a part: names and numbers go in and come out, for another process."""
    return PARTS[name].measure(task, settings, chosen)


def planned(name: str, quick: bool) -> list[tuple[str, int, float]]:
    """Of a part, by kind: how many trainings, and the seconds of one thread they all take."""
    part = PARTS[name]
    settings = part.quick if quick else part.full
    kinds: dict[str, list[float]] = {}
    for task in part.tasks(settings):
        kinds.setdefault(task["kind"], []).append(part.seconds(task, settings))
    return [(kind, len(each), sum(each)) for kind, each in kinds.items()]


def lines(names: Iterable[str], quick: bool = False) -> list[str]:
    """The plan as a table, and whether it keeps to what a run may take."""
    rows, total = [], 0.0
    for name in names:
        for kind, count, seconds in planned(name, quick):
            rows.append(f"{name:10s} {kind:24s} {count:4d} trainings {seconds / 60:7.1f} min")
            total += seconds
    allowed = CORES * HOURS * 60 * (1 - SPARE)
    inside = "within" if total / 60 <= allowed else "BEYOND"
    return [
        *rows,
        f"one thread: {total / 60:.0f} min, {inside} the {allowed:.0f} that {CORES} cores have in"
        f" {HOURS} hours less {SPARE:.0%}; about {total / 60 / CORES:.0f} min on {CORES} cores",
    ]
