"""Time and peak memory of a loss alone, forward and backward, fused beside dense."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

import contrastive_kernels as ck

from .. import reference
from .processes import alone

LOSSES = {"fused": ck, "dense": reference}
TEMPERATURE = 0.2


class Case(NamedTuple):
    """One loss at one size: features (images, dim), its number of negatives, its group."""

    loss: str
    images: int
    dim: int
    negatives: int = 0
    group: int = 0


class Cost(NamedTuple):
    """What one step of a loss costs, forward and backward."""

    seconds: float
    peak: int  # bytes of resident memory beyond the inputs


class Measured(NamedTuple):
    """A case and its costs, keyed "fused" and "dense"."""

    case: Case
    costs: dict[str, Cost]


class Million(NamedTuple):
    """One step with very many negatives."""

    queries: int
    negatives: int
    dim: int
    cost: Cost
    loss: float
    expected: float  # the same loss by a plain loop over blocks of negatives, in float32


def measure(case: Case) -> Measured:
    """Time (median) and peak memory of a case, after a check that fused and dense agree."""
    steps = {name: _step(losses, case) for name, losses in LOSSES.items()}
    # The first call also loads what is loaded on first use; it is not timed.
    values = [step() for step in steps.values()]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    # In turn, so that a change in the machine's speed hits both.
    while len(times["dense"]) < 3 or (
        time.perf_counter() - start < 0.3 and len(times["dense"]) < 50
    ):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    peaks = {name: alone(_peak, name, case) for name in steps}
    return Measured(
        case, {name: Cost(statistics.median(times[name]), peaks[name]) for name in steps}
    )


def million(negatives: int = 1_000_000) -> Million:
    """InfoNCE of 256 queries against frozen bfloat16 negatives: loss and gradient of the query."""
    return alone(_million, 256, negatives, 128)


def _step(losses: ModuleType, case: Case) -> Callable[[], Tensor]:
    """Forward and backward of a case's loss on random features; the call returns the loss."""
    generator = Generator().manual_seed(0)
    n, d = case.images, case.dim

    def features(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    options: dict[str, Any]
    match case.loss:
        case "nt_xent":
            live = [features(n, d), features(n, d)]
            options = {"temperature": TEMPERATURE}
        case "info_nce" | "eqco":
            live = [features(n, d)]
            options = {
                "key": features(n, d),
                "negatives": features(case.negatives, d),
                "temperature": TEMPERATURE,
            }
        case "cacr":
            live = [features(n, d), features(n, 4, d)]
            options = {}
        case "w_mse":
            live = [features(2, n, d)]
            permutations = torch.randperm(n, generator=generator)[None]
            options = {"group_size": case.group, "permutations": permutations}
    for tensor in live:
        tensor.requires_grad_()
    function = getattr(losses, case.loss)

    def step() -> Tensor:
        loss = function(*live, **options)
        torch.autograd.grad(loss, live)
        return loss.detach()

    return step


def _peak(name: str, case: Case) -> int:
    """Growth of this process's largest resident memory during one step, in bytes."""
    # Threads, libraries and their buffers exist before the count starts.
    _step(LOSSES[name], Case(case.loss, images=32, dim=8, negatives=32, group=16))()
    matrix = torch.ones(256, 256)
    (matrix @ matrix).exp().sum()
    step = _step(LOSSES[name], case)
    before = _largest_resident()
    step()
    return _largest_resident() - before


def _million(queries: int, count: int, dim: int) -> Million:
    generator = Generator().manual_seed(0)
    query, key = torch.randn(2, queries, dim, generator=generator).bfloat16()
    negatives = torch.empty(count, dim, dtype=torch.bfloat16)
    blocks = negatives.split(16384)
    for block in blocks:
        block.copy_(torch.randn(block.shape, generator=generator))
    query.requires_grad_()
    before = _largest_resident()
    start = time.perf_counter()
    loss = ck.info_nce(query, key, negatives=negatives, temperature=TEMPERATURE)
    torch.autograd.grad(loss, query)
    seconds = time.perf_counter() - start
    peak = _largest_resident() - before

    unit = normalize(query.detach().float(), dim=1)
    positive = (unit * normalize(key.float(), dim=1)).sum(1) / TEMPERATURE
    logsumexp = positive
    for block in blocks:
        logits = unit @ normalize(block.float(), dim=1).T / TEMPERATURE
        logsumexp = torch.logaddexp(logsumexp, logits.logsumexp(1))
    expected = (logsumexp - positive).mean().item()
    return Million(queries, count, dim, Cost(seconds, peak), loss.item(), expected)


def _largest_resident() -> int:
    """The largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
