"""One view of the records of a CPU and of a GPU: what each implementation of a case took."""

from collections.abc import Iterator
from typing import NamedTuple

OURS, OURS_BFLOAT16 = "ours", "ours, bfloat16"
DENSE = "dense eager torch"


class Implementation(NamedTuple):
    """Ours or a baseline: one row of a case.

    Attributes:
        milliseconds: median, p20, p80 and samples; None where there is no time, for `reason`.
        ratio: our time over this one; for our own bfloat16, its time over ours.
        at_most: the bound of the ratio.
        memory_mb: peak beyond inputs and gradients.
        rate: operations per second of the schedule.
        gemm_fraction: its share of the rate of a matrix product.
    """

    name: str
    milliseconds: dict | None
    ratio: float | None
    at_most: float | None
    reason: str | None
    memory_mb: float | None
    rate: float | None
    gemm_fraction: float | None


def implementations(record: dict) -> Iterator[Implementation]:
    """Ours first, then the baselines; nothing of a case that failed."""
    if "failed" in record:
        return
    entries = [(OURS, record["ours"])]
    if "bfloat16" in record:
        entries.append((OURS_BFLOAT16, record["bfloat16"]))
    entries += [(peer["name"], peer) for peer in record["peers"]]
    for name, entry in entries:
        memory = record.get("memory", {}).get(name, {}).get("mb", entry.get("memory_mb"))
        rate = 1e9 * entry["gflops"] if "gflops" in entry else None
        rate = 1e12 * entry["tflops"] if "tflops" in entry else rate
        yield Implementation(
            name,
            entry.get("milliseconds"),
            entry.get("ratio"),
            entry.get("at_most"),
            entry.get("reason", entry.get("failed")),
            memory,
            rate,
            entry.get("gemm_fraction"),
        )
