"""Time, peak memory, CUDA graphs and the matrix multiply as a yardstick, on a GPU.

Every function that takes the device runs, and is tested, on a CPU too.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..cases.oracle import Tensors
from ..cases.step import Step
from ..harness.timing import Sample, host_sample

GEMM_SIZE, GEMM_CALLS, GEMM_SAMPLES = 8192, 10, 7
GRAPH_WARM_UP = 3


def event_sample(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call on the device, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / repeats


def wall_sample(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call by the host's clock, until the device is done with all of them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def sampler(device: str, *, host_bound: bool) -> Sample:
    """How to time: events would not see the host, which small cases wait for."""
    if device == "cpu":
        return host_sample
    return wall_sample if host_bound else event_sample


def gemm_flops(device: str, size: int = GEMM_SIZE) -> float:
    """The rate of a bfloat16 matrix product of random numbers, in operations per second."""
    x, y = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    sample = sampler(device, host_bound=False)
    call = partial(torch.mm, x, y)
    sample(call, GEMM_CALLS)
    seconds = min(sample(call, GEMM_CALLS) for _ in range(GEMM_SAMPLES))
    return 2.0 * size**3 / seconds


def peak_mb(step: Step, device: str) -> float | None:
    """Peak beyond inputs and gradients of one call, in MB (10^6 bytes); None on a CPU.

    The step has run before: a workspace that torch keeps for good does not count.
    """
    if device == "cpu":
        return None
    step.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    kept = sum(g.nbytes for g in step.gradients().values())
    return (torch.cuda.max_memory_allocated() - before - kept) / 1e6


class GraphStep:
    """A step captured as a CUDA graph; its value and gradients lie where the capture put them."""

    def __init__(self, step: Step):
        self.step = step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        # the capture must allocate the gradients, in the pool of the graph
        step.clear()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):
            self.value = step()

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.value

    def gradients(self) -> Tensors:
        return self.step.gradients()
