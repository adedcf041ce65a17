"""In which order the points of the grid are measured: the whole of it early, if coarsely."""

from math import ceil, log
from typing import NamedTuple

from ..cases.case import Case


class Grid(NamedTuple):
    """The rows, the features and the dtypes of all losses."""

    n: tuple[int, ...]
    d: tuple[int, ...]
    dtype: tuple[str, ...]


WHOLE = Grid(
    (256, 1024, 4096, 16384),
    (64, 128, 256, 512, 1024, 2048, 4096),
    ("float32", "bfloat16", "float16"),
)
QUICK = Grid((256, 1024), (64, 512), ("float32",))

# What a point is thought to take before any is measured: seconds to compile the dense form, calls
# of all implementations, and a pair of a row and a column costs as much as so many features.
COMPILE_SECONDS, CALLS, PAIR_FEATURES, RATE = 8.0, 12, 500, 1e11
# A point that takes longer than this comes a level later, and another one for every factor.
LONG_SECONDS, FACTOR = 60.0, 8.0


def levels(values: set[int]) -> dict[int, int]:
    """0 for the middle one, 1 for both ends, and then the middle of every gap in turn."""
    places = sorted(values)
    last = len(places) - 1
    found = {places[last // 2]: 0}
    for end in (0, last):
        found.setdefault(places[end], 1)
    level = 2
    while len(found) < len(places):
        known = sorted(places.index(value) for value in found)
        for left, right in zip(known, known[1:], strict=False):
            if right - left > 1:
                found[places[(left + right) // 2]] = level
        level += 1
    return found


def coarse_first(cases: list[Case]) -> list[Case]:
    """By the larger of the levels of rows and features, cheap ones first within a level; long ones
    come later."""
    rows = levels({case.sizes.n for case in cases})
    features = levels({case.sizes.d for case in cases})

    def place(case: Case) -> tuple[int, float]:
        seconds = guess(case)
        later = ceil(log(max(1.0, seconds / LONG_SECONDS), FACTOR))
        return max(rows[case.sizes.n], features[case.sizes.d]) + later, seconds

    return sorted(cases, key=place)


def guess(case: Case) -> float:
    """Seconds, roughly: they order points, and are scaled by what others took."""
    sizes = case.sizes
    operations = 6.0 * sizes.n * sizes.m * (sizes.d + PAIR_FEATURES)
    compiling = any(baseline.compiles for baseline in case.baselines)
    return COMPILE_SECONDS * compiling + CALLS * operations / RATE


class Clock:
    """How long points take, from what those of the same dtype took."""

    def __init__(self) -> None:
        self._took: dict[str, tuple[float, float]] = {}

    def add(self, case: Case, seconds: float) -> None:
        took, guessed = self._took.get(str(case.dtype), (0.0, 0.0))
        self._took[str(case.dtype)] = took + seconds, guessed + guess(case)

    def estimate(self, case: Case) -> float:
        took, guessed = self._took.get(str(case.dtype), (0.0, 0.0))
        return guess(case) * (took / guessed if guessed else 1.0)
