"""One point of the grid: ours checked, then timed beside the dense forms in turn."""

import time
from collections.abc import Iterable
from dataclasses import replace

import torch

from ..cases.case import Case
from ..cases.grid import dense_bytes
from ..cases.oracle import Truth
from ..harness import memory_limit
from ..harness.check import BASELINE_ON_CPU, TOLERANCE, checked_baselines, first_line, reason
from ..harness.console import Progress
from ..harness.implementations import OURS
from ..harness.measure import Effort, add_ratios
from ..harness.timing import interleave
from .verdict import DENSE_FORMS

FULL, QUICK = Effort(2.0, 3), Effort(0.2, 3)
# float64 takes long: ours is compared with it on so many rows, and baselines on all with ours.
CHECKED_ROWS = 512
# Of the memory that is free, what the dense form may take; without a number, of so many bytes.
DENSE_SHARE, DEFAULT_BYTES = 0.5, 8 * 10**9
# A dense form that smaller points show to take longer than this, and more than three times as
# long as ours, is left out: torch multiplies float16 number by number where nothing is faster.
SLOW_SECONDS, SLOW_RATIO = 20.0, 3.0


def measure(case: Case, earlier: Iterable[dict], effort: Effort, count: str = "") -> dict:
    """The JSON record of a point; whatever goes wrong is in it.

    Args:
        earlier: records of other points.
        count: how far the run is, for the progress.
    """
    record, start = case.record(), time.perf_counter()
    progress = Progress(f"{count}{case.name} {record['dtype']} {case.sizes.n} x {case.sizes.d}")
    try:
        with memory_limit.limited():
            record |= _timed(case, earlier, effort, progress)
    except Exception as failure:
        record["failed"] = first_line(failure)
    finally:
        progress.close()
    return record | {"seconds": time.perf_counter() - start}


def _timed(case: Case, earlier: Iterable[dict], effort: Effort, progress: Progress) -> dict:
    progress(f"checking {OURS}")
    few = case.resized(case.sizes.with_rows(min(case.sizes.n, CHECKED_ROWS)))
    tensors = few.tensors()
    wrong = reason(few.step(few.under_test, tensors), few.truth(tensors), TOLERANCE[case.dtype])
    if wrong:
        return {"failed": wrong}
    torch._dynamo.reset()  # which compiles a function for no more than eight shapes
    tensors = case.tensors()
    ours = case.step(case.under_test, tensors)
    start = time.perf_counter()
    value = ours().item()
    seconds = time.perf_counter() - start
    truth = Truth(value, ours.gradients())
    left_out = _left_out(case, earlier, seconds)
    kept = replace(case, baselines=tuple(b for b in case.baselines if b.name not in left_out))
    records, steps = checked_baselines(kept, tensors, truth, BASELINE_ON_CPU[case.dtype], progress)
    steps = {OURS: ours} | steps
    progress(f"timing {len(steps)} implementations")
    timings = interleave(steps, effort.seconds, progress.passing, min_rounds=effort.rounds)
    add_ratios(records, timings)
    records += [{"name": name} | why for name, why in left_out.items()]
    return {"ours": {"milliseconds": timings[OURS]._asdict()}, "peers": records}


def _left_out(case: Case, earlier: Iterable[dict], ours: float) -> dict[str, dict]:
    """Which baselines do not run, and why."""
    free = memory_limit.free_bytes()
    limit = DEFAULT_BYTES if free is None else int(DENSE_SHARE * free)
    needed = dense_bytes(case)
    found = {}
    for name in (each.name for each in case.baselines):
        if name in DENSE_FORMS and needed > limit:
            text = f"about {needed / 1e9:.1f} GB, at most {limit / 1e9:.1f}"
            found[name] = {"fits": False, "reason": f"dense does not fit: {text}"}
            continue
        seconds = expected_seconds(case, name, earlier)
        if seconds > max(SLOW_SECONDS, SLOW_RATIO * ours):
            found[name] = {"slow": True, "reason": f"left out: about {seconds:.0f} s expected"}
    return found


def expected_seconds(case: Case, name: str, earlier: Iterable[dict]) -> float:
    """What a baseline takes for one call, from smaller points, rather too little; 0: unknown.

    The time of a pair of a row and a column is that of the most features measured, on a line
    through the two that are nearest.
    """
    pairs: dict[int, tuple[int, float]] = {}
    for record in earlier:
        sizes = record["sizes"]
        if (record["name"], record["dtype"]) != (case.name, _dtype(case)):
            continue
        if sizes["d"] > case.sizes.d or sizes["n"] > case.sizes.n:
            continue
        for peer in record.get("peers", ()):
            if peer["name"] == name and "milliseconds" in peer:
                pair = peer["milliseconds"]["median"] / 1e3 / (sizes["n"] * sizes["m"])
                # the most rows say most
                pairs[sizes["d"]] = max(pairs.get(sizes["d"], (0, 0.0)), (sizes["n"], pair))
    if not pairs:
        return 0.0
    features = sorted(pairs)[-2:]
    last = pairs[features[-1]][1]
    if len(features) == 2:
        rise = (last - pairs[features[0]][1]) / (features[1] - features[0])
        last += max(0.0, rise) * (case.sizes.d - features[1])
    return last * case.sizes.n * case.sizes.m


def _dtype(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")
