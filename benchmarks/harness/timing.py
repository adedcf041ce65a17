"""Time, and the machine's matrix multiply as a yardstick."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from ..cases.step import BackwardStep

MIN_ROUNDS, MAX_ROUNDS = 5, 40
MIN_SAMPLE_SECONDS = 0.01

Timed = TypeVar("Timed")
# Seconds per call of so many calls.
Sample = Callable[[Callable[[], object], int], float]

# Large multiplies, and the shapes of one tile against a block of keys.
GEMM_SHAPES = ((2048, 2048, 2048), (4096, 4096, 512), (1024, 4096, 128), (256, 512, 128))


class Timing(NamedTuple):
    """Milliseconds per call: median, 20th and 80th percentile, over so many samples."""

    median: float
    p20: float
    p80: float
    samples: int


def host_sample(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call by the host's clock."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def sampled(sample: Sample, call: Callable[[], object], repeats: int) -> float:
    """Seconds per call, without what it has to prepare for each."""
    if not isinstance(call, BackwardStep):
        return sample(call, repeats)
    seconds = 0.0
    for _ in range(repeats):
        call.prepare()
        seconds += sample(call, 1)
    return seconds / repeats


def interleave(
    calls: Mapping[str, Timed],
    budget: float,
    progress: Callable[[str], None],
    sample: Callable[[Timed, int], float] = host_sample,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, Timing]:
    """Times all calls in turn, round by round, so that a change of the clock hits all alike.

    A round takes one sample of each call, in an order that rotates; a sample repeats a short call
    until it lasts 10 ms. As many rounds as fit in `budget` seconds, at least `min_rounds` and at
    most 40. The calls that find this out are the first round where all are so long that more do
    not fit.
    """
    names = list(calls)
    first = {name: sampled(sample, calls[name], 1) for name in names}
    repeats = {n: max(1, round(MIN_SAMPLE_SECONDS / seconds)) for n, seconds in first.items()}
    round_seconds = sum(first[name] * repeats[name] for name in names)
    rounds = max(min_rounds, min(MAX_ROUNDS, int(budget / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    slow = round_seconds * min_rounds > budget and set(repeats.values()) == {1}
    if slow:
        samples = {name: [1e3 * seconds] for name, seconds in first.items()}
    for done in range(int(slow), rounds):
        progress(f"timing {len(names)} implementations, round {done + 1} of {rounds}")
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(1e3 * sampled(sample, calls[name], repeats[name]))
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[3], len(values))


def gemm_flops(dtype: torch.dtype) -> float:
    """The best rate of a matrix multiply on this machine, in operations per second.

    torch.mm calls MKL for float32, and oneDNN, which `cpublas::brgemm` runs on, may be faster (it
    is twice as fast on AMD): the better of both is the yardstick.
    """
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        dtype = torch.float32  # it is widened, where torch.mm goes number by number
    best = 0.0
    one_dnn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if dtype == torch.float64:  # which oneDNN has not
        one_dnn = None
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        one_dnn = None
    for m, n, k in GEMM_SHAPES:
        x, y, out = (torch.rand(s, dtype=dtype) for s in ((m, k), (n, k), (m, n)))
        calls = [partial(torch.mm, x, y.T, out=out)]
        if one_dnn is not None and torch.backends.mkldnn.is_available():
            calls.append(partial(one_dnn, x, y, None, "none", [], ""))
        operations = 2.0 * m * n * k
        repeats = max(1, int(2e9 / operations))
        for call in calls * 7:
            best = max(best, operations / host_sample(call, repeats))
    return best
