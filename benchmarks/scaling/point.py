"""One point of a scaling study: each part of it runs in a process of its own."""

import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import contrastive_kernels as ck

from ..baselines import dense
from ..baselines.baseline import Loss
from ..cases.oracle import Tensors, Truth
from ..cases.step import Step
from ..harness.check import BASELINE_ON_CPU, TOLERANCE, error
from ..harness.implementations import OURS
from ..harness.memory import peak_of, unsupported
from ..harness.timing import interleave
from .studies import STUDIES, Point

# The one call that is checked is also the time of a point that takes longer.
LONG_SECONDS = 4.0


@dataclass(frozen=True)
class Task:
    """A point, by its place among those of its study, and what it needs of the run.

    Attributes:
        study, index, quick: which point; cases themselves cannot be sent to a process.
        threads: of torch.
        bytes: that a process may have.
        keys: the file of negatives, float32 of unit length.
        truth: the file with the oracle's answer.
    """

    study: str
    index: int
    quick: bool
    threads: int
    bytes: int
    keys: Path
    truth: Path

    @property
    def point(self) -> Point:
        return STUDIES[self.study].points(self.quick)[self.index]

    def prepare(self) -> None:
        torch.set_num_threads(self.threads)
        resource.setrlimit(resource.RLIMIT_DATA, (self.bytes, self.bytes))

    def tensors(self, name: str) -> Tensors:
        """Negatives of a file stay there for ours, and are read for a baseline."""
        case = self.point.case
        if not self.point.streamed:
            return case.tensors()
        tensors = replace(case, sizes=replace(case.sizes, m=1)).tensors()
        first = First(ck.FileNegatives(self.keys, case.sizes.d, torch.float32), case.sizes.m)
        return tensors | {"negatives": first if name == OURS else first.read()}

    def loss(self, name: str) -> Loss:
        case = self.point.case
        if name == OURS:
            return case.loss
        return case.baseline(name).load()


class First:
    """The first rows of a source."""

    def __init__(self, source: ck.NegativeSource, rows: int) -> None:
        self.source, self.shape, self.dtype = source, (rows, source.shape[1]), source.dtype

    def __iter__(self) -> Iterator[Tensor]:
        left = self.shape[0]
        for chunk in self.source:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return

    def read(self) -> Tensor:
        """All of them in one tensor; chunks share a buffer."""
        out, start = torch.empty(self.shape, dtype=self.dtype), 0
        for chunk in self:
            out[start : start + len(chunk)] = chunk
            start += len(chunk)
        return out


class Once:
    """A step that runs when it is first called, and afterwards gives what came then."""

    def __init__(self, step: Step) -> None:
        self.step, self.value, self.seconds = step, None, math.nan

    def __call__(self) -> Tensor:
        if self.value is None:
            start = time.perf_counter()
            self.value = self.step()
            self.seconds = time.perf_counter() - start
        return self.value

    def gradients(self) -> Tensors:
        return self.step.gradients()


def write_keys(path: Path, rows: int, dim: int) -> dict:
    """A file of random unit vectors."""
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        for start in range(0, rows, 2**18):
            part = torch.randn(min(2**18, rows - start), dim, generator=generator)
            part /= part.norm(dim=1, keepdim=True)
            file.write(part.numpy())
    return {}


def find_truth(task: Task) -> dict:
    """Leaves the oracle's answer in the file."""
    torch.set_num_threads(task.threads)
    case = task.point.case
    truth = case.truth(task.tensors(OURS))
    torch.save(tuple(truth), task.truth)
    return {}


def attempt(task: Task, name: str) -> dict:
    """One call of an implementation, checked: {"mb", "seconds"}, or "reason"."""
    task.prepare()
    case = task.point.case
    loss = task.loss(name)
    tiny = [torch.randn(64, 128, requires_grad=True) for _ in range(2)]
    dense.info_nce(*tiny, temperature=0.1).backward()
    if name != OURS:
        few = replace(case, sizes=replace(case.sizes, n=64, m=64))
        few.step(loss, few.tensors())()
    once = Once(case.step(loss, task.tensors(name)))
    mb = peak_of(once) if unsupported() is None else None
    truth = Truth(*torch.load(task.truth))
    wrong = error(once, truth, (TOLERANCE if name == OURS else BASELINE_ON_CPU)[case.dtype])
    return {"reason": f"differs from float64: {wrong}"} if wrong else {
        "mb": mb, "seconds": once.seconds,
    }  # fmt: skip


def timings(task: Task, names: list[str], budget: float) -> dict:
    """The times of those that are known to run, in turn."""
    task.prepare()
    case = task.point.case
    steps = {name: case.step(task.loss(name), task.tensors(name)) for name in names}
    measured = interleave(steps, budget, lambda text: None, min_rounds=2)
    return {name: timing._asdict() for name, timing in measured.items()}
