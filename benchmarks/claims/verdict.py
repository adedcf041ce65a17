"""Is a claim seen? The rule, written down before the run; nothing here looks at a picture.

A claim is one condition or several, each about a difference that is paired by seed and holds where
the whole 95 % interval of its mean (Student's t) lies above a bound: above 0 for "more", above
minus a margin for "no less"; "level" is bounded on both sides. All hold: seen. None: not seen.
Else: in part. A condition with fewer than two seeds says nothing, and neither does its claim.
"""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from scipy.stats import t

SEEN, PART, NOT, OPEN = "seen", "in part", "not seen", "not run"
MARGIN = 0.02  # of accuracies that count as no less: two points, about what five seeds can tell
BETWEEN = 0.95


class Interval(NamedTuple):
    """The mean of differences, and its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int


def interval(differences: list[float]) -> Interval | None:
    """None of fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    mean = statistics.fmean(differences)
    half = t.ppf(0.5 + BETWEEN / 2, n - 1) * statistics.stdev(differences) / n**0.5
    return Interval(mean, mean - float(half), mean + float(half), n)


Series = Mapping[int, float]  # by seed


def minus(first: Series, second: Series) -> dict[int, float]:
    """Paired by seed; of the seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def mean(*series: Series) -> dict[int, float]:
    """Of several measures of each seed, of the seeds that all have."""
    seeds = set(series[0]).intersection(*series[1:])
    return {seed: statistics.fmean(one[seed] for one in series) for seed in sorted(seeds)}


class Condition(NamedTuple):
    """That the mean of differences lies above `least`, and where given below `most`."""

    text: str
    differences: Series
    least: float = 0.0
    most: float = math.inf
    unit: str = "points"

    @property
    def interval(self) -> Interval | None:
        return interval(list(self.differences.values()))

    def holds(self) -> bool | None:
        """None: there is nothing to tell it from."""
        if (found := self.interval) is None:
            return None
        return self.least < found.low and found.high < self.most

    def asked(self) -> str:
        """In words."""
        if self.most < math.inf:
            return f"within {100 * self.most:g} {self.unit}"
        return f"> {100 * self.least:g}" if self.least else "> 0"


class Claim(NamedTuple):
    """What a paper says, its own figure, and the conditions that would show it here."""

    text: str
    paper: str
    conditions: list[Condition]

    def verdict(self) -> str:
        found = [condition.holds() for condition in self.conditions]
        if None in found or not found:
            return OPEN
        return SEEN if all(found) else PART if any(found) else NOT
