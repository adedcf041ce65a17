"""The table of cases on a CPU under pytest-benchmark: pytest benchmarks/ --sizes quick

Every contender is compared with float64 before it is timed. `python -m contrastive_kernels bench`
interleaves its contenders, and measures memory; this keeps results of its own, and compares them:
--benchmark-autosave, --benchmark-compare, --benchmark-compare-fail=median:10%.
"""

from functools import lru_cache

import pytest

from . import headroom
from .case import Case
from .cases import CASES
from .check import PEER_ON_CPU, TOLERANCE, reason
from .contenders import OURS
from .measure import MAX_ROUNDS, MIN_ROUNDS, MIN_SAMPLE_SECONDS, host_sample
from .oracle import Tensors, Truth
from .peers import Peer, PeerUnavailable

BUDGET = 3.0  # seconds for the rounds of one contender
PAIRS = [
    pytest.param(name, peer, id=f"{name}-{peer.name if peer else OURS}")
    for name, case in CASES.items()
    for peer in (None, *(rival.peer for rival in case.rivals if not rival.on_request))
]
# Our median time, for the ratios of the peers, which come after.
our_seconds: dict[str, float] = {}


@lru_cache(maxsize=1)
def prepared(name: str, sizes: str) -> tuple[Case, Tensors, Truth]:
    """A case at these sizes, its inputs, and what float64 says."""
    case = CASES[name]
    if sizes != "table":
        case = case.resized(getattr(case.sizes, sizes)())
    tensors = case.tensors()
    return case, tensors, case.truth(tensors)


@pytest.mark.parametrize(("name", "peer"), PAIRS)
def test_case(name: str, peer: Peer | None, benchmark, request) -> None:
    with headroom.limited():
        case, tensors, truth = prepared(name, request.config.getoption("--sizes"))
        try:
            step = case.step(case.under_test if peer is None else peer.load(), tensors)
        except PeerUnavailable as unavailable:
            pytest.skip(str(unavailable))
        wrong = reason(step, truth, (PEER_ON_CPU if peer else TOLERANCE)[case.dtype])
        if wrong and peer:
            pytest.skip(wrong)
        assert wrong is None
        seconds = host_sample(step, 1)
        repeats = max(1, round(MIN_SAMPLE_SECONDS / seconds))
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(BUDGET / (seconds * repeats))))
        benchmark.group = name
        benchmark.pedantic(step, rounds=rounds, iterations=repeats)
    benchmark.extra_info |= case.record() | {"contender": peer.name if peer else OURS}
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    if peer is None:
        our_seconds[name] = median
        if case.operations() is not None:
            benchmark.extra_info["flops"] = case.operations()
            benchmark.extra_info["gflops"] = case.operations() / median / 1e9
    elif name in our_seconds:
        benchmark.extra_info["ratio"] = our_seconds[name] / median
