"""Values of several seeds."""

import statistics


def spread(values: list[float]) -> float:
    """The standard deviation, 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
