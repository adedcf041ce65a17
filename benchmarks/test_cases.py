"""The table of cases on a CPU under pytest-benchmark: pytest benchmarks/ --sizes quick

Every implementation is compared with float64 before it is timed. The command `python -m
contrastive_kernels bench` interleaves them, and measures memory; this keeps results of its own, and
compares them: --benchmark-autosave, --benchmark-compare, --benchmark-compare-fail=median:10%.
"""

from functools import lru_cache

import pytest

from .baselines.baseline import Baseline
from .baselines.loading import Unavailable
from .cases.case import Case
from .cases.oracle import Tensors, Truth
from .cases.table import CASES
from .harness import memory_limit
from .harness.check import BASELINE_ON_CPU, TOLERANCE, reason
from .harness.implementations import OURS
from .harness.timing import MAX_ROUNDS, MIN_ROUNDS, MIN_SAMPLE_SECONDS, host_sample

BUDGET = 3.0  # seconds for the rounds of one implementation
PARAMETERS = [
    pytest.param(name, baseline, id=f"{name}-{baseline.name if baseline else OURS}")
    for name, case in CASES.items()
    for baseline in (None, *(each for each in case.baselines if not each.on_request))
]
# Our median time, for the ratios of the baselines, which come after.
our_seconds: dict[str, float] = {}


@lru_cache(maxsize=1)
def prepared(name: str, sizes: str) -> tuple[Case, Tensors, Truth]:
    """A case at these sizes, its inputs, and what float64 says."""
    case = CASES[name]
    if sizes != "table":
        case = case.resized(getattr(case.sizes, sizes)())
    tensors = case.tensors()
    return case, tensors, case.truth(tensors)


@pytest.mark.parametrize(("name", "baseline"), PARAMETERS)
def test_case(name: str, baseline: Baseline | None, benchmark, request) -> None:
    with memory_limit.limited():
        case, tensors, truth = prepared(name, request.config.getoption("--sizes"))
        try:
            step = case.step(case.under_test if baseline is None else baseline.load(), tensors)
        except Unavailable as unavailable:
            pytest.skip(str(unavailable))
        wrong = reason(step, truth, (BASELINE_ON_CPU if baseline else TOLERANCE)[case.dtype])
        if wrong and baseline:
            pytest.skip(wrong)
        assert wrong is None
        seconds = host_sample(step, 1)
        repeats = max(1, round(MIN_SAMPLE_SECONDS / seconds))
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(BUDGET / (seconds * repeats))))
        benchmark.group = name
        benchmark.pedantic(step, rounds=rounds, iterations=repeats)
    benchmark.extra_info |= case.record() | {"implementation": baseline.name if baseline else OURS}
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    if baseline is None:
        our_seconds[name] = median
        if case.operations() is not None:
            benchmark.extra_info["flops"] = case.operations()
            benchmark.extra_info["gflops"] = case.operations() / median / 1e9
    elif name in our_seconds:
        benchmark.extra_info["ratio"] = our_seconds[name] / median
