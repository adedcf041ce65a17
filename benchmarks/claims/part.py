"""What a part of the claims is made of: its trainings, and what is asked of their records."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from .verdict import Claim

Task = dict[str, Any]  # of one training: what is trained ("kind", "seed", ...), as JSON keeps it
TUNING_SEED = 1000  # no seed of a result: what is tuned is not tested with the same draws


class Study:
    """The records of a part, each what was trained (a task) with what was measured."""

    def __init__(self, records: list[dict]):
        self.records = records

    def find(self, **where: Any) -> list[dict]:
        return [r for r in self.records if all(r.get(k) == v for k, v in where.items())]

    def series(self, field: str, **where: Any) -> dict[int, float]:
        """One value of each seed."""
        return {r["seed"]: r[field] for r in self.find(**where) if field in r}

    def best(self, field: str, name: str, options: list, **where: Any) -> Any:
        """The option with the highest mean; the first where nothing was measured."""
        means = {
            option: statistics.fmean(values.values())
            for option in options
            if (values := self.series(field, **{name: option}, **where))
        }
        return max(means, key=lambda option: means[option]) if means else options[0]


class Part(NamedTuple):
    """One paper.

    `tasks` are the trainings of some settings; those of kind "tuning" come first, and `choose`
    makes of their records what the others are trained with. `measure` does one task.
    """

    title: str
    full: dict[str, Any]
    quick: dict[str, Any]
    tasks: Callable[[dict], list[Task]]
    choose: Callable[[dict, Study], dict]
    measure: Callable[[Task, dict, dict], dict]
    seconds: Callable[[Task, dict], float]  # one thread's, as pilots measured it
    claims: Callable[[Study, dict], list[Claim]]
    command: str
