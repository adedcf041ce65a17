"""What every loss shares: checks of its arguments, the reduction and the free statistics.

Options every loss has: `normalize` divides the features by their L2 norm (at least 1e-12),
`reduction` is "mean", "sum" or "none", `backend` as in `row_stats`, and `return_stats=True` returns
`(loss, LossStats)`. Features are float32, float64, bfloat16 or float16; losses and statistics are
float32, or float64 for float64 features. Every loss raises a ValueError or TypeError that names the
argument that does not fit.

With `group`, a torch.distributed process group or a DeviceMesh of one dimension, features are this
rank's part of a batch, which may have no rows, and negatives come from all ranks; what a loss takes
or gives for each row is of this rank's rows. `exchange` is "gather", "ring" or "auto"; value and
gradients are described in `distributed.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import Shards
from .ops import (
    IdPair,
    check_features,
    check_keys,
    check_pair,
    check_positive,
    statistics_dtype,
)
from .reference import SoftplusSweep, Sweep
from .sources import NegativeSource

Loss = Tensor | tuple[Tensor, "LossStats"]
REDUCTIONS = ("mean", "sum", "none")


class LossStats(NamedTuple):
    """Free statistics of a loss, all detached; None where a loss has no such number.

    A mean over pairs is nan when there is no such pair.

    accuracy: share of rows whose positive ranks first (0-d).
    rank: number of negatives with a logit above the positive's, for each row.
    positive_similarity, negative_similarity: mean similarity of the pairs (0-d).
    lse: log of the denominator of each row, EqCo margin included.
    mi_lower_bound: log(K + 1) - loss in nats (0-d), only for losses that are a bound of the mutual
        information.
    """

    accuracy: Tensor | None = None
    rank: Tensor | None = None
    positive_similarity: Tensor | None = None
    negative_similarity: Tensor | None = None
    lse: Tensor | None = None
    mi_lower_bound: Tensor | None = None


def check_views(x_name: str, x: Tensor, y_name: str, y: Tensor, *, rows: bool = True) -> int:
    """Raise unless `x` and `y` are features of one shape (N, D) that fit; return N.

    `rows=False`: there may be none.
    """
    check_features(x_name, x, (2,), rows=rows)
    check_features(y_name, y, (2,), rows=rows)
    check_pair(x, y, x_name, y_name)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{x_name} and {y_name} must have the same number of rows, "
            f"got {x.shape[0]} and {y.shape[0]}"
        )
    return x.shape[0]


def check_negatives(
    query: Tensor,
    negatives: Tensor | NegativeSource,
    dims: tuple[int, ...] = (2, 3),
    *,
    rows: bool = True,
) -> int:
    """Raise unless `negatives` (M, D) or (N, M, D) fit `query` (N, D); return M.

    `rows=False`: there may be none of M or N.
    """
    check_keys("negatives", negatives, dims, rows=rows)
    check_pair(query, negatives, "query", "negatives")
    if rows and negatives.shape[-2] == 0:
        raise ValueError(f"negatives must not be empty, got shape {tuple(negatives.shape)}")
    if len(negatives.shape) == 3 and negatives.shape[0] != query.shape[0]:
        raise ValueError(
            f"negatives of shape (N, M, D) must have N = {query.shape[0]} as query has, "
            f"got {tuple(negatives.shape)}"
        )
    return negatives.shape[-2]


def check_other_rows(name: str, rows: int) -> None:
    """Raise when a batch has no other row to take negatives from."""
    if rows < 2:
        raise ValueError(f"{name} must have at least 2 rows: a batch of one has no negatives")


def check_reduction(reduction: str) -> None:
    """Raise unless `reduction` is one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise unless `value` is a finite number with low <= value < high."""
    if not low <= value < high:  # false for nan; torch.compile cannot trace math.isfinite here
        limits = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g})"
        raise ValueError(f"{name} must be a finite number {limits}, got {value}")


def scalar(name: str, value: float | Tensor) -> float | Tensor:
    """`value` as a finite number or a 0-d tensor, of float32 or float64: what uses it several times
    then rounds its gradient once."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a tensor of one element, got shape "
                f"{tuple(value.shape)}"
            )
        return value.reshape(()).to(statistics_dtype(value))
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value


def resolve_scale(temperature: float, scale: float | Tensor | None = None) -> float | Tensor:
    """The factor on similarities: `scale` if given, else 1 / temperature."""
    if scale is not None:
        return scalar("scale", scale)
    check_positive("temperature", temperature)
    return 1.0 / temperature


def log_count(count: int | Tensor, dtype: torch.dtype) -> float | Tensor:
    """log(count) of a number or, in `dtype`, of a tensor of counts."""
    if isinstance(count, Tensor):
        return count.to(dtype).log()
    # torch.compile keeps log2 of a symbolic size symbolic, but would recompile for each log
    return math.log2(count) * math.log(2.0)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); F.softplus turns linear above 20 by default, too coarse for float64."""
    return F.softplus(x, threshold=40.0)


def own_ids(n: int, like: Tensor, shards: Shards | None = None) -> IdPair:
    """Ids that exclude the diagonal of an n x n matrix, or of that of all ranks."""
    if shards is None:
        ids = torch.arange(n, dtype=torch.int32, device=like.device)
    else:
        ids = shards.own_ids(like.device)
    return ids, ids


def total_rows(n: int, shards: Shards | None) -> int:
    """The rows of the whole batch, of which this rank has n."""
    return n if shards is None else shards.total


def count_equal_ids(row_ids: Tensor, col_ids: Tensor, shards: Shards | None = None) -> Tensor:
    """For each row (N,), the number of columns whose id equals the row's."""
    if shards is not None:
        col_ids = shards.all_ids(col_ids)
    ordered = col_ids.long().sort().values
    row_ids = row_ids.long()
    return torch.searchsorted(ordered, row_ids, right=True) - torch.searchsorted(ordered, row_ids)


def reduce_rows(rows: Tensor, reduction: str, shards: Shards | None = None) -> Tensor:
    """Apply `reduction` to the losses of the rows."""
    if reduction == "none":
        return rows
    if shards is not None:
        return shards.reduce(rows.sum(), reduction == "mean")
    return rows.mean() if reduction == "mean" else rows.sum()


def add_rows(value: Tensor, rows: Tensor, reduction: str, shards: Shards | None = None) -> Tensor:
    """The reduction of value + rows, where `value` is already the sum unless it is "none"."""
    if reduction == "none":
        return value + rows
    return reduce_total(value + rows.sum(), rows.shape[0], reduction == "mean", shards)


def reduce_total(total: Tensor, n: int, mean: bool, shards: Shards | None = None) -> Tensor:
    """The sum or mean over all rows of a sum over n of them."""
    if shards is not None:
        return shards.reduce(total, mean)
    return total / n if mean else total


def replicated(
    negatives: Tensor | NegativeSource, n: int, others: Shards | None
) -> tuple[Tensor | NegativeSource, Shards | None]:
    """Negatives (M, D) or (N, M, D) that every rank has for its n rows, and what a sweep takes as
    their shards: only without rows it needs to be told."""
    if others is None or n > 0:
        return negatives, None
    return negatives.sum(0) if len(negatives.shape) == 3 else negatives, others.alone()


def gather_only(loss: str, exchange: str) -> None:
    """Raise for an exchange that a loss without a sweep over its keys does not have."""
    if exchange == "ring":
        raise ValueError(f'exchange must be "auto" or "gather" for {loss}, got "ring"')


def sum_with_gradient(value: Tensor, shards: Shards | None) -> Tensor:
    """The sum of a tensor over the ranks, with the gradient of all ranks' losses."""
    return value if shards is None else shards.sum(value)


def all_keys(keys: Tensor, shards: Shards | None) -> Tensor:
    """The keys (n_r, D) of all ranks, each with the gradient of all ranks' losses."""
    return keys if shards is None else shards.gather_keys(keys)


def mean_of(values: Tensor, shards: Shards | None) -> Tensor:
    """The mean of a statistic over the entries of all ranks, without gradient."""
    return values.detach().mean() if shards is None else shards.mean(values)


def sum_of(values: Tensor, shards: Shards | None) -> Tensor:
    """The sum of a statistic likewise."""
    total = values.detach().sum()
    return total if shards is None else shards.total_of(total)


def pair_stats(
    dot: Tensor,
    sweeps: list[Sweep | SoftplusSweep],
    scale: float | Tensor,
    *,
    bias: float | Tensor = 0.0,
    lse: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    shards: Shards | None = None,
) -> LossStats:
    """Statistics of a loss with one positive for each row, of similarity `dot`.

    `sweeps` saw the negatives at logits scale * similarity + bias. `extra` = (rows, logits) marks
    the rows whose positive the sweeps counted too.
    """
    rank = sum(out.rank for out in sweeps)
    total = sum(out.total.sum() for out in sweeps)
    count = sum(out.count.sum() for out in sweeps)
    if extra is not None:
        total = total - (extra[0] * extra[1]).sum()
        count = count - extra[0].sum()
    if shards is not None:
        total, count = shards.total_of(torch.stack((total, count)))
    return LossStats(
        accuracy=mean_of((rank == 0).to(dot.dtype), shards),
        rank=rank,
        positive_similarity=mean_of(dot, shards),
        negative_similarity=((total / count - bias) / scale).detach(),
        lse=None if lse is None else lse.detach(),
    )
