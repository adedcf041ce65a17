"""Correctness, time, and the machine's matrix multiply as a yardstick."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .oracle import Tensors
from .peers import Loss

MIN_ROUNDS, MAX_ROUNDS = 5, 40
MIN_SAMPLE_SECONDS = 0.01

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64,
}  # fmt: skip

# Seconds per call of so many calls.
Sample = Callable[[Callable[[], object], int], float]

# Large multiplies, and the shapes of one tile against a block of keys.
GEMM_SHAPES = ((2048, 2048, 2048), (4096, 4096, 512), (1024, 4096, 128), (256, 512, 128))


# What a step times: the forward pass under no_grad, the backward pass, or one after the other.
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Step:
    """One call of a loss on its tensors, with the backward pass if asked for."""

    loss: Loss
    tensors: Tensors
    options: dict
    backward: bool = True

    def __call__(self) -> Tensor:
        self.clear()
        with torch.set_grad_enabled(self.backward):
            value = self.loss(**self.tensors, **self.options)
        if self.backward:
            value.backward()
        return value.detach()

    def clear(self) -> None:
        for t in self.tensors.values():
            t.grad = None

    def gradients(self) -> Tensors:
        return {name: t.grad for name, t in self.tensors.items() if t.grad is not None}


@dataclass(frozen=True)
class BackwardStep(Step):
    """The backward pass alone, of a forward pass that `prepare` makes for each call."""

    graph: list[Tensor] = field(default_factory=list)

    def prepare(self) -> None:
        self.graph[:] = [self.loss(**self.tensors, **self.options)]

    def __call__(self) -> Tensor:
        if not self.graph:
            self.prepare()
        self.clear()
        value = self.graph.pop()
        value.backward()
        return value.detach()


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


def _sampled(sample: Sample, call: Callable[[], object], repeats: int) -> float:
    """Seconds per call, without what it has to prepare for each."""
    if not isinstance(call, BackwardStep):
        return sample(call, repeats)
    seconds = 0.0
    for _ in range(repeats):
        call.prepare()
        seconds += sample(call, 1)
    return seconds / repeats


def interleave(
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    progress: Callable[[str], None],
    sample: Sample = host_sample,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, Timing]:
    """Times all calls in turn, round by round, so that a change of the clock hits all alike.

    A round takes one sample of each call, in an order that rotates; a sample repeats a short call
    until it lasts 10 ms. As many rounds as fit in `budget` seconds, at least `min_rounds` and at
    most 40.
    """
    names = list(calls)
    first = {name: _sampled(sample, calls[name], 1) for name in names}
    repeats = {n: max(1, round(MIN_SAMPLE_SECONDS / seconds)) for n, seconds in first.items()}
    round_seconds = sum(first[name] * repeats[name] for name in names)
    rounds = max(min_rounds, min(MAX_ROUNDS, int(budget / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds):
        progress(f"timing {len(names)} contenders, round {done + 1} of {rounds}")
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(1e3 * _sampled(sample, calls[name], repeats[name]))
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[3], len(values))


def gemm_flops(dtype: torch.dtype) -> float:
    """The best rate of a matrix multiply on this machine, in operations per second.

    torch.mm calls MKL for float32, and oneDNN, which `cpublas::brgemm` runs on, may be faster (it
    is twice as fast on AMD): the better of both is the yardstick.
    """
    best = 0.0
    one_dnn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if dtype == torch.float64:  # which oneDNN has not
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
