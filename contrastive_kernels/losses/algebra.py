"""Algebra that losses share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from operator import add
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import in_transform
from ..distributed import Batch, GroupCall, GroupLike, RankSource, Shards
from ..ops import count_own
from ..reference import masked_softmax_stats
from ..sources import NegativeSource, is_source
from ..types import OwnKeys, statistics_dtype

Keys = TypeVar("Keys", bound=Tensor | NegativeSource | OwnKeys)

SHORTEST = 1e-12  # what F.normalize divides shorter rows by
BLOCK_PAIRS = 2**20  # of a block of rows, where a matrix is made piece by piece: 4 MiB of float32


def unit(x: Tensor, normalize: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Features in `dtype`, by default that of the statistics, normalised on request."""
    x = x.to(statistics_dtype(x) if dtype is None else dtype)
    return F.normalize(x, dim=-1) if normalize else x


def may_look(x: Tensor) -> bool:
    """Whether numbers may decide what is computed: those of a GPU would be waited for."""
    if torch.compiler.is_compiling() or in_transform():
        return False
    return x.device.type == "cpu" and not torch._C._len_torch_dispatch_stack()  # real numbers


def cleared(features: Tensor, dropped: Tensor) -> Tensor:
    """Features (N, D) of which no sum is to hold those that are dropped (N,), whatever they are:
    their copy with zeros, where it is not known that 0 times them is 0."""
    if may_look(features) and _all_small(features.detach(), dropped.nonzero().flatten()):
        return features
    return features.masked_fill(dropped.unsqueeze(1), 0.0)


def _all_small(features: Tensor, which: Tensor) -> bool:
    """Whether squares of these rows, too, are far from infinite; not of NaN."""
    bound = torch.finfo(statistics_dtype(features)).max ** 0.25
    blocks = (which[rows] for rows in row_blocks(len(which), features.shape[1]))
    return all(bool(features[rows].abs().amax() <= bound) for rows in blocks)


def weighted(weight: float, rows: Tensor) -> Tensor:
    """weight * rows, where a weight is most often 1."""
    return rows if weight == 1 else weight * rows


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Blocks of rows that make about BLOCK_PAIRS pairs with the columns."""
    size = max(1, BLOCK_PAIRS // max(1, columns))
    count = (rows + size - 1) // size  # a graph of torch.compile keeps it
    return [slice(i * size, min((i + 1) * size, rows)) for i in range(count)]


def log_count(count: int | Tensor, dtype: torch.dtype) -> float | Tensor:
    """log(count) of a number or, in `dtype`, of a tensor of counts."""
    if isinstance(count, Tensor):
        return count.to(dtype).log()
    # torch.compile keeps log2 of a symbolic size symbolic, but would recompile for each log
    return math.log2(count) * math.log(2.0)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); F.softplus turns linear above 20 by default, too coarse for float64."""
    return F.softplus(x, threshold=40.0)


def add_up(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, of at least one."""
    return reduce(add, parts)


def log_add(total: Tensor, *parts: Tensor) -> Tensor:
    """log(exp(total) + sum exp(parts)), exact for parts far below, and unlike torch.logaddexp twice
    differentiable where a part is -inf."""
    for part in parts:
        total = total + softplus(part - total)
    return total


def masked_logsumexp(z: Tensor, mask: Tensor | None) -> Tensor:
    """logsumexp over the columns of z (N, K) where the mask is True, -inf where it nowhere is."""
    return z.logsumexp(1) if mask is None else masked_softmax_stats(z, mask)[0]


def count_equal_ids(row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """For each row (N,), the number of columns whose id equals the row's."""
    ordered = col_ids.long().sort().values
    row_ids = row_ids.long()
    return torch.searchsorted(ordered, row_ids, right=True) - torch.searchsorted(ordered, row_ids)


def add_rows(value: Tensor, rows: Tensor, reduction: str, batch: Batch) -> Tensor:
    """The reduction of value + rows, where `value` is already the sum unless it is "none"."""
    if reduction == "none":
        return value + rows
    return batch.reduce(value + rows.sum(), reduction == "mean")


def number_of(negatives: Tensor | NegativeSource | OwnKeys) -> int | Tensor:
    """The number of negatives of a row; (N,) where rows have not equally many."""
    return count_own(negatives) if isinstance(negatives, OwnKeys) else negatives.shape[-2]


def shared_number(negatives: Tensor | NegativeSource | OwnKeys) -> int:
    """The number of negatives on which ranks must agree."""
    if isinstance(negatives, OwnKeys):
        return 0 if negatives.mask is None else negatives.mask.shape[1]
    return negatives.shape[-2]


def replicated(negatives: Keys, n: int, others: Batch) -> tuple[Keys, Batch | None]:
    """Negatives that every rank has for its n rows, and what a sweep takes as their batch: only
    without rows it needs to be told."""
    if isinstance(others, Shards) and is_source(negatives):
        return cast(Keys, RankSource(negatives, others, shared=False)), None
    if n > 0 or isinstance(negatives, OwnKeys) or not isinstance(others, Shards):
        return negatives, None
    flat = negatives.sum(0) if isinstance(negatives, Tensor) and negatives.dim() == 3 else negatives
    return cast(Keys, flat), others.alone()


def own_part(
    negatives: Tensor | NegativeSource, group: GroupLike
) -> tuple[Tensor | NegativeSource, slice | None]:
    """(This rank's part of sharded negatives, which of those that were passed it is). A source with
    `part(start, stop)`, a file, is passed whole by every rank; all else is a part already, None."""
    part = getattr(negatives, "part", None)
    if isinstance(negatives, Tensor) or part is None:
        return negatives, None
    m, ranks = negatives.shape[0], cast(GroupCall, group).ranks
    rank, world = ranks.rank(), ranks.size()
    own = slice(rank * m // world, (rank + 1) * m // world)
    return part(own.start, own.stop), own


def cut(candidates: Tensor, start: int, own: slice | None) -> Tensor:
    """What belongs to candidates, of the first `start` and of the `own` of the negatives behind."""
    return candidates if own is None else torch.cat((candidates[:start], candidates[start:][own]))


def sharded(
    negatives: Tensor | NegativeSource, batch: Batch, others: Batch
) -> Tensor | NegativeSource:
    """This rank's part of the negatives, as a sweep of the rows of `batch` takes it."""
    if isinstance(negatives, Tensor) or not isinstance(others, Shards):
        return negatives
    return RankSource(negatives, cast(Shards, batch), shared=True)


def gather_only(loss: str, exchange: str) -> None:
    """Raise for an exchange that a loss without a sweep over its keys does not have."""
    if exchange == "ring":
        raise ValueError(f'exchange must be "auto" or "gather" for {loss}, got "ring"')
