"""float64 oracles of sizes too large for `oracle.by_rows`: some rows of the first gradient.

Blocks of logits and no graph, since dL/dz is a softmax less the positive.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels import NegativeSource

from ..cases.oracle import BLOCK, Oracle, Tensors, Truth

SAMPLE = 16
# Of a block that stays in the cache.
KEYS = 4096


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.detach().double(), dim=1)


def _sample(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SAMPLE]


def _of_raw(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of features before normalisation, from that of unit vectors."""
    leaf = x.detach().double().requires_grad_()
    F.normalize(leaf, dim=1).backward(gradient)
    return leaf.grad


def directions(first: str, second: str, *, symmetric: bool = False) -> Oracle:
    """Of the InfoNCE loss of pairs; or of the mean of both directions, which takes the log-sum-exps
    of all columns, so that the value is known too."""

    @torch.no_grad()
    def evaluate(tensors: Tensors, options: dict, backward: bool = True) -> Truth:
        x, y = _unit(tensors[first]), _unit(tensors[second])
        scale = 1 / options["temperature"] if options else tensors["logit_scale"].item()
        rows = _sample(len(x))
        wanted = torch.arange(len(x)) if symmetric else rows
        columns = torch.full((len(y),), -torch.inf, dtype=torch.float64)
        lse = []
        for part in wanted.split(max(1, BLOCK // len(y))):
            logits = scale * x[part] @ y.T
            lse.append(logits.logsumexp(1))
            if symmetric:
                columns = torch.logaddexp(columns, logits.logsumexp(0))
        lse, value = torch.cat(lse), math.nan
        logits = scale * x[rows] @ y.T
        if symmetric:
            value = ((lse + columns) / 2 - scale * (x * y).sum(1)).mean().item()
            p = ((logits - lse[rows, None]).exp() + (logits - columns).exp()) / 2
        else:
            p = (logits - lse[:, None]).exp()
        gradient = scale / len(x) * (p @ y - y[rows])
        with torch.enable_grad():
            return Truth(value, {first: _of_raw(tensors[first][rows], gradient)}, rows)

    return evaluate


@torch.no_grad()
def negatives(tensors: Tensors, options: dict, backward: bool = True) -> Truth:
    """Of info_nce with negatives, in one tensor or in chunks."""
    given, scale = tensors["negatives"], 1 / options["temperature"]
    count = len(tensors["query"])
    rows = _sample(count)
    x, key = _unit(tensors["query"][rows]), _unit(tensors["key"][rows])
    # of what came so far: log-sum-exp, and the mean of the keys with the weights exp(z - lse)
    total, mean = scale * (x * key).sum(1), key
    for y in _units(given):
        logits = scale * x @ y.T
        both = torch.logaddexp(total, logits.logsumexp(1))
        part = (logits - both[:, None]).exp() @ y
        total, mean = both, (total - both).exp()[:, None] * mean + part
    gradient = scale / count * (mean - key)
    with torch.enable_grad():
        return Truth(math.nan, {"query": _of_raw(tensors["query"][rows], gradient)}, rows)


def _units(keys: Tensor | NegativeSource) -> Iterator[Tensor]:
    for chunk in [keys] if isinstance(keys, Tensor) else keys:
        yield from map(_unit, chunk.split(KEYS))
