"""One case on a CPU: checked first, then time and peak memory beside its baselines."""

from dataclasses import replace
from typing import NamedTuple

import torch

from ..cases.case import Case
from ..cases.step import Step
from . import memory, memory_limit
from .check import BASELINE_ON_CPU, TOLERANCE, checked_baselines, first_line, reason
from .console import Progress
from .implementations import OURS, OURS_BFLOAT16
from .timing import MIN_ROUNDS, Timing, interleave


class Effort(NamedTuple):
    """Seconds for the rounds of one case, and the least number of rounds."""

    seconds: float
    rounds: int


FULL, QUICK = Effort(15.0, MIN_ROUNDS), Effort(0.5, 3)


def measure(
    case: Case,
    gemm: dict[str, float],
    threads: int,
    *,
    effort: Effort = FULL,
    with_memory: bool = True,
    count: str = "",
) -> dict:
    """The JSON record of a case; whatever goes wrong is in it.

    Args:
        gemm: operations per second of the best matrix product in each dtype.
        with_memory: whether peak memory is measured where the case wants it.
        count: how far the run is, for the progress.
    """
    record = case.record()
    progress = Progress(f"{count}{case.name}")
    try:
        with memory_limit.limited():
            record |= _timed(case, gemm, effort, progress)
        if with_memory and case.memory and "failed" not in record:
            record["memory"] = _memory(case, threads, progress)
    except Exception as failure:
        record["failed"] = first_line(failure)
    finally:
        progress.close()
    return record


def _timed(case: Case, gemm: dict[str, float], effort: Effort, progress: Progress) -> dict:
    progress("float64 oracle")
    tensors = case.tensors()
    truth = case.truth(tensors)
    progress(f"checking {OURS}")
    ours = case.step(case.under_test, tensors)
    wrong = reason(ours, truth, TOLERANCE[case.dtype])
    if wrong:
        return {"failed": wrong}
    records, steps = checked_baselines(case, tensors, truth, BASELINE_ON_CPU[case.dtype], progress)
    steps = {OURS: ours} | steps
    result: dict = {"peers": records}
    if case.bfloat16_at_most is not None:
        progress(f"checking {OURS_BFLOAT16}")
        half, wrong = _in_bfloat16(case)
        result["bfloat16"] = {"failed": wrong} if wrong else {}
        if not wrong:
            steps[OURS_BFLOAT16] = half
    progress(f"timing {len(steps)} implementations")
    timings = interleave(steps, effort.seconds, progress.passing, min_rounds=effort.rounds)
    return _with_timings(case, result, timings, gemm)


def _in_bfloat16(case: Case) -> tuple[Step, str | None]:
    """Our step on the same inputs, rounded, and why it cannot be timed, or None."""
    half = replace(case, dtype=torch.bfloat16)
    tensors = half.tensors()
    step = half.step(half.under_test, tensors)
    return step, reason(step, half.truth(tensors), TOLERANCE[half.dtype])


def _with_timings(
    case: Case, result: dict, timings: dict[str, Timing], gemm: dict[str, float]
) -> dict:
    """Puts the timings, their rates and their ratios in the records."""

    def entry(name: str, dtype: torch.dtype) -> dict:
        found: dict = {"milliseconds": timings[name]._asdict()}
        operations = case.operations()
        if operations is not None:
            rate = operations / (1e-3 * timings[name].median)
            fraction = rate / gemm[str(dtype).removeprefix("torch.")]
            found |= {"gflops": rate / 1e9, "gemm_fraction": fraction}
        return found

    ours = timings[OURS]
    result["ours"] = entry(OURS, case.dtype)
    if OURS_BFLOAT16 in timings:
        at_most = case.bfloat16_at_most if case.bounded else None
        ratio = timings[OURS_BFLOAT16].median / ours.median
        result["bfloat16"] |= entry(OURS_BFLOAT16, torch.bfloat16)
        result["bfloat16"] |= {"at_most": at_most, "ratio": ratio}
    add_ratios(result["peers"], timings)
    return result


def add_ratios(records: list[dict], timings: dict[str, Timing]) -> None:
    """Puts the times of baselines, and ours over them, in their records."""
    for record in records:
        if record["name"] in timings:
            timing = timings[record["name"]]
            ratio = timings[OURS].median / timing.median
            record |= {"milliseconds": timing._asdict(), "ratio": ratio}


def _memory(case: Case, threads: int, progress: Progress) -> dict:
    """Peak memory of the case in its dtypes, and of its baselines: {name: {"mb" or "reason"}}."""
    results = {}
    asked = [(OURS, OURS, case)]
    in_table = case.bounded or case.bfloat16_at_most is not None
    if in_table and case.dtype != torch.bfloat16:
        asked.append((OURS_BFLOAT16, OURS, replace(case, dtype=torch.bfloat16)))
    asked += [(baseline.name, baseline.name, case) for baseline in case.baselines]
    for title, name, variant in asked:
        progress(f"memory of {title}")
        results[title] = memory.measure(variant, name, threads)
    return results
