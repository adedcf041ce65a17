"""The rows of one call of a loss, here or on the ranks of a `torch.distributed` group.

Losses ask a `Batch` for what depends on all of its rows (their number, ids, sums, means). In one
process that is plain torch; `Shards` is the batch of which rank r holds n_r of the
N = n_0 + ... + n_(W-1) rows. `call.py` makes them, sweeps over several ranks are in
`ops/sharded.py`.

The convention of every loss: its value is that of one process with the whole batch, the same on
every rank; its gradient on rank r is W / N times that of the sum of the rank's own rows (of all
ranks, through the features they share). After DDP's mean over the ranks, gradients of features,
scale and bias are those of one process. reduction="none" gives the rank's own rows.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..autograd import once_differentiable
from .collectives import all_gather, all_reduce, all_to_all

if TYPE_CHECKING:  # not there in a torch without torch.distributed
    from torch.distributed import ProcessGroup


class Batch:
    """All rows of a call, `total` of them, in this process."""

    def __init__(self, total: int) -> None:
        self.total = total

    @property
    def own(self) -> slice:
        """This process' rows among those of all."""
        return slice(0, self.total)

    def times(self, count: int) -> Batch:
        """A batch with `count` rows for each row."""
        return Batch(count * self.total)

    def own_ids(self, device: torch.device, repeat: int = 1) -> Tensor:
        """Ids of this process' rows; `repeat`: rows come in so many runs, with equal ids."""
        ids = torch.arange(self.total // repeat, dtype=torch.int32, device=device)
        return ids if repeat == 1 else ids.repeat(repeat)

    def all_ids(self, ids: Tensor) -> Tensor:
        """The ids of all processes."""
        return ids

    def gather_keys(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in their order, with the gradient of all losses."""
        return rows

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes, with the gradient of all losses."""
        return value

    def logsumexp(self, rows: Tensor) -> Tensor:
        """logsumexp over the rows of all processes, 0-d, with the gradient of all losses."""
        return rows.logsumexp(0)

    def softmax(self, rows: Tensor) -> Tensor:
        """softmax over the rows of all processes, with the gradient of all losses."""
        return rows.softmax(0)

    def total_of(self, value: Tensor) -> Tensor:
        """The sum of a statistic over the processes; no gradient."""
        return value.detach()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a statistic over the entries of all processes, 0-d; no gradient."""
        return value.detach().mean()

    def reduce(self, total: Tensor, mean: bool) -> Tensor:
        """The sum or mean over all rows, of the sum over those of this process."""
        return total / self.total if mean else total

    def reduce_rows(self, rows: Tensor, reduction: str) -> Tensor:
        """`reduction` of the losses of the rows of this process."""
        if reduction == "none":
            return rows
        return rows.mean() if reduction == "mean" else rows.sum()


class Shards(Batch):
    """A batch whose rows the ranks of a group share: sizes[r] of them are on rank r, starts[r] on
    all ranks below it."""

    def __init__(self, group: ProcessGroup, rank: int, sizes: list[int], exchange: str) -> None:
        self.group, self.rank, self.sizes, self.exchange = group, rank, sizes, exchange
        self.world = len(sizes)
        *self.starts, total = accumulate(sizes, initial=0)
        super().__init__(total)
        self._gathered: dict[int, tuple[Tensor, Tensor]] = {}
        self._repeats: dict[int, tuple[Tensor, int]] = {}

    @property
    def own(self) -> slice:
        start = self.starts[self.rank]
        return slice(start, start + self.sizes[self.rank])

    def times(self, count: int) -> Shards:
        sizes = [count * size for size in self.sizes]
        return Shards(self.group, self.rank, sizes, self.exchange)

    def alone(self) -> Shards:
        """This rank's rows as all there are: nothing is exchanged."""
        return Shards(self.group, 0, self.sizes[self.rank : self.rank + 1], "gather")

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (n_r, ...) of all ranks, in their order, (N, ...); no gradient."""
        if self.world == 1:
            return rows
        largest = max(self.sizes)
        rows = rows.contiguous()
        if rows.shape[0] < largest:  # an all-gather takes equal sizes
            rows = torch.cat((rows, rows.new_zeros(largest - rows.shape[0], *rows.shape[1:])))
        everything = all_gather(rows, self.group)
        if min(self.sizes) == largest:
            return everything
        parts = everything.view(self.world, largest, *rows.shape[1:])
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def home(self, rows: Tensor) -> Tensor:
        """(W, n_r, ...): what each rank has for this rank's rows, of what (N, ...) each has for the
        rows of all; no gradient."""
        own = self.sizes[self.rank]
        if self.world > 1:
            rows = all_to_all(rows, [own] * self.world, self.sizes, self.group)
        return rows.view(self.world, own, *rows.shape[1:])

    def to_owners(self, rows: Tensor) -> Tensor:
        """`home`, with the gradient of all losses."""
        return _ToOwners.apply(rows, self)

    def own_ids(self, device: torch.device, repeat: int = 1) -> Tensor:
        ids = self._numbered(self.rank, repeat).to(device)
        self._repeats[id(ids)] = (ids, repeat)
        return ids

    def all_ids(self, ids: Tensor) -> Tensor:
        """Of `own_ids` and of ids seen before without a collective."""
        key = id(ids)
        if key not in self._gathered:
            if key in self._repeats:
                repeat = self._repeats[key][1]
                parts = [self._numbered(rank, repeat) for rank in range(self.world)]
                everything = torch.cat(parts).to(ids.device)
            else:
                everything = self.gather(ids.detach())
            self._gathered[key] = (ids, everything)  # with the ids: another tensor may get their id
        return self._gathered[key][1]

    def _numbered(self, rank: int, repeat: int) -> Tensor:
        start, size = self.starts[rank], self.sizes[rank]
        return torch.arange(start, start + size // repeat, dtype=torch.int32).repeat(repeat)

    def gather_keys(self, rows: Tensor) -> Tensor:
        return rows if self.world == 1 else _GatherKeys.apply(rows, self)

    def sum(self, value: Tensor) -> Tensor:
        return _Sum.apply(value, self)

    def logsumexp(self, rows: Tensor) -> Tensor:
        return _LogSumExp.apply(rows.logsumexp(0), self)

    def softmax(self, rows: Tensor) -> Tensor:
        return torch.exp(rows - self.logsumexp(rows))

    def total_of(self, value: Tensor) -> Tensor:
        """The same bits on every rank."""
        return _ordered_sum(value.detach(), self)

    def mean(self, value: Tensor) -> Tensor:
        count = value.new_full((), value.numel(), dtype=torch.float64)
        both = self.total_of(torch.stack((value.detach().double().sum(), count)))
        return (both[0] / both[1]).to(value.dtype)

    def reduce(self, total: Tensor, mean: bool) -> Tensor:
        """By the module's convention."""
        return _Reduce.apply(total, self, self.total if mean else 1)

    def reduce_rows(self, rows: Tensor, reduction: str) -> Tensor:
        return rows if reduction == "none" else self.reduce(rows.sum(), reduction == "mean")


def _ordered_sum(value: Tensor, shards: Shards) -> Tensor:
    """The sum in the order of the ranks: an all-reduce might round differently on each."""
    if shards.world == 1:
        return value
    return all_gather(value.unsqueeze(0), shards.group).sum(0)


def _all_reduce(value: Tensor, shards: Shards) -> Tensor:
    return value.clone() if shards.world == 1 else all_reduce(value, shards.group)


class _Reduce(torch.autograd.Function):
    """The sum over all ranks divided by `count`; the gradient is W / count of the rank's sum."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, shards: Shards, count: int) -> Tensor:
        ctx.factor = shards.world / count
        return _ordered_sum(total, shards) / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return shards.gather(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.home(grad).sum(0), None


class _ToOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return shards.home(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shards = ctx.shards
        own = shards.sizes[shards.rank]
        grad = grad.flatten(0, 1)
        return all_to_all(grad, shards.sizes, [own] * shards.world, shards.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return _all_reduce(value, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.shards), None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        total = all_gather(part.unsqueeze(0), shards.group).logsumexp(0)
        ctx.save_for_backward(part, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        part, total = ctx.saved_tensors
        return _ordered_sum(grad, ctx.shards) * (part - total).exp(), None
