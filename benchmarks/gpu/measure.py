"""One case on a GPU: checked first, then time and peak memory beside its baselines.

Caches are not flushed between calls: behind an encoder, too, small features lie in them.
"""

from collections.abc import Callable

import torch

from ..cases.case import Case
from ..cases.oracle import Truth
from ..harness.check import BASELINE_ON_GPU, TOLERANCE, checked_baselines, first_line, reason
from ..harness.console import Progress, judged, line, title
from ..harness.implementations import OURS
from ..harness.timing import Timing, interleave
from .cases import memory_limit_mb
from .instruments import GraphStep, peak_mb, sampler

# Seconds for the rounds of one case, and their least number.
FULL_BUDGET, QUICK_BUDGET, MIN_ROUNDS = 3.0, 0.2, 3


def measure(
    case: Case,
    device: str,
    gemm: float,
    *,
    budget: float = FULL_BUDGET,
    may_compile: bool = True,
    may_begin: bool = True,
) -> dict:
    """The JSON record of a case; whatever goes wrong is in it.

    Args:
        gemm: operations per second of a large matrix product.
        budget: seconds for the rounds.
        may_compile, may_begin: whether there is time for baselines that compile, and for the case.
    """
    record = case.record()
    print(title(record), flush=True)
    if not may_begin:
        record["failed"] = "left out: the run took too long"
    else:
        try:
            record |= _measured(case, device, gemm, budget, may_compile)
        except Exception as failure:
            # even an error that leaves the device unusable must not lose the cases before
            record["failed"] = first_line(failure)
    if "failed" in record:
        print(f"  FAILED: {record['failed']}", flush=True)
    return record


def _measured(case: Case, device: str, gemm: float, budget: float, may_compile: bool) -> dict:
    if device != "cpu":
        torch.cuda.empty_cache()
    progress = Progress(case.name)
    progress("float64 oracle")
    tensors = case.tensors(device)
    truth = case.truth(tensors)
    progress(f"checking {OURS}")
    step = case.step(case.under_test, tensors)
    wrong = reason(step, truth, TOLERANCE[case.dtype])
    if wrong:
        return {"failed": wrong}
    records, steps = checked_baselines(
        case,
        tensors,
        truth,
        BASELINE_ON_GPU[case.dtype],
        progress,
        may_compile=may_compile,
    )
    steps = {OURS: step} | steps
    memory = {name: peak_mb(one, device) for name, one in steps.items()}
    graphs, captured = [], {}
    if device != "cpu":
        graphs, captured = _graphs(case, truth, progress)
    progress(f"timing {len(steps) + len(captured)} implementations")
    timings = interleave(
        steps | captured,
        budget,
        progress.passing,
        sampler(device, host_bound=case.group == "small"),
        MIN_ROUNDS,
    )
    progress.close()
    ours = _ours(case, timings[OURS], memory[OURS], gemm)
    for record in records:
        name = record["name"]
        if name in timings:
            ratio = timings[OURS].median / timings[name].median
            record |= {"ratio": ratio, "memory_mb": memory[name]}
        _add_timing(record, timings)
    for graph in graphs:
        if graph["name"] in timings and case.baselines[0].name in timings:
            dense = timings[case.baselines[0].name]
            graph["ratio"] = timings[graph["name"]].median / dense.median
        _add_timing(graph, timings)
    return {"ours": ours, "peers": records, "graphs": graphs}


def _graphs(
    case: Case, truth: Truth, progress: Callable[[str], None]
) -> tuple[list[dict], dict[str, GraphStep]]:
    """The records of the CUDA graphs that the case has bounds of, and those that can be timed:
    ours, and beside a share of its first baseline's time that baseline."""
    records, steps = [], {}
    share, milliseconds = case.graph_at_most, case.graph_at_most_ms
    asked = []
    if share is not None or milliseconds is not None:
        bounds = {"at_most": share, "at_most_ms": milliseconds} if case.bounded else {}
        asked.append((OURS, case.under_test, TOLERANCE[case.dtype], bounds))
    if share is not None:
        first = case.baselines[0]
        asked.append((first.name, first.load(), BASELINE_ON_GPU[case.dtype], {}))
    for name, loss, tolerance, bounds in asked:
        record = {"name": f"{name}, CUDA graph", "at_most": None, "at_most_ms": None} | bounds
        records.append(record)
        progress(f"checking {record['name']}")
        try:
            # its own: a replay overwrites gradients
            graph = GraphStep(case.step(loss, case.tensors("cuda")))
            why_not = reason(graph, truth, tolerance)
        except Exception as failure:
            why_not = first_line(failure)
        if why_not:
            record["reason"] = why_not
        else:
            steps[record["name"]] = graph
    return records, steps


def _ours(case: Case, timing: Timing, memory_mb: float | None, gemm: float) -> dict:
    """The record of our own time, rate and memory, which it prints."""
    rate = case.operations() / (1e-3 * timing.median)
    at_most = case.at_most_ms if case.bounded else None
    note = f"{rate / 1e12:.3g} TFLOP/s, {rate / gemm:.0%} of GEMM"
    if at_most is not None:
        note += f" ({_met(timing.median, at_most, 'ms')})"
    if memory_mb is not None:
        note += f"{_megabytes(memory_mb)} ({_met(memory_mb, memory_limit_mb(case.sizes), 'MB')})"
    line(OURS, timing, note)
    return {
        "milliseconds": timing._asdict(),
        "at_most_ms": at_most,
        "tflops": rate / 1e12,
        "gemm_fraction": rate / gemm,
        "memory_mb": memory_mb,
        "memory_at_most_mb": memory_limit_mb(case.sizes),
    }


def _add_timing(record: dict, timings: dict[str, Timing]) -> None:
    """Puts the time of a baseline or graph in its record, and prints it."""
    name = record["name"]
    if name not in timings:
        print(f"  {name:40s} {record['reason']}")
        return
    record["milliseconds"] = timings[name]._asdict()
    note = judged(record["ratio"], record["at_most"]) if "ratio" in record else ""
    at_most_ms = record.get("at_most_ms")
    if at_most_ms is not None:
        note += f" ({_met(timings[name].median, at_most_ms, 'ms')})"
    line(name, timings[name], note + _megabytes(record.get("memory_mb")))


def _met(value: float, at_most: float, unit: str) -> str:
    return f"at most {at_most:g} {unit}: {'met' if value <= at_most else 'NOT MET'}"


def _megabytes(memory_mb: float | None) -> str:
    return "" if memory_mb is None else f", {memory_mb:.0f} MB"
