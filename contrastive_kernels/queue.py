"""Stores of past features: MoCo's queue and the per-sample memory bank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_features, check_ids
from .distributed import GroupCall, KeptGroup, Rows, Shards, join
from .types import Group, statistics_dtype


class FeatureQueue(Rows):
    """The last `size` features seen, as negatives (MoCo, He et al. 2020, sec. 3.2).

    It starts with random unit vectors, as MoCo's does, so `negatives` always has `size` rows;
    `filled` tells how many are features. Everything is in the state_dict, the position too, and
    nothing is read back from the device. `reset_parameters` starts anew.

    `negatives` is the buffer itself, not a copy, and `enqueue` writes into it: call `enqueue`
    after `loss.backward()`. When a loss still needs the old rows, its backward raises PyTorch's
    error of a tensor "modified by an inplace operation".

    With a `group` every rank calls `enqueue` with its own features, of any number, and the features
    of all ranks, in the order of the ranks, enter the queue. It stays equal on every rank; or with
    `sharded=True` each rank keeps only its part, of size / W rows, for losses with a `group` and
    `sharded_negatives=True`: rank r has rows r size / W and following of one queue of `size` rows.

    A part is no buffer, which DistributedDataParallel would overwrite by rank 0's. In a state_dict
    it is a DTensor, and its row numbers are beside it in `rows`. Save it by all ranks, with
    torch.distributed.checkpoint, or gathered (docs/distributed.md); then it loads on any number
    of ranks, sharded or not. Rows that a state does not have are missing keys when it is loaded,
    and stay as they were with `strict=False`.

    Args:
        size, dim: shape of the queue, of all ranks together if it is sharded.
        dtype, device: of the random start; later the queue follows the enqueued features.
        generator: source of the random start; each rank draws as much as the whole queue, so that
            equal seeds give equal queues.
        group: a torch.distributed process group, a DeviceMesh of one dimension, or "world"; it must
            be there by now.
        sharded: each rank keeps 1 / W of the queue; W divides `size`.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        group: Group | None = None,
        sharded: bool = False,
    ) -> None:
        kept = None if group is None else KeptGroup(group)
        rank, world = 0, 1  # of those that share the rows
        if sharded:
            if kept is None:
                raise ValueError("sharded needs a group")
            rank, world = _place(kept)
            if size % world != 0:
                raise ValueError(f"size must be a multiple of the {world} ranks, got {size}")
        _check_sizes(size, dim)
        super().__init__(size, rank * (size // world), kept, sharded)
        self.rank, self.world = rank, world
        self.keep(torch.empty(size // world, dim, dtype=dtype, device=device))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As at construction: random unit vectors, none seen. With a group every rank calls it."""
        self.position.zero_()
        self.seen.zero_()
        part = self.features
        if part.is_meta:
            return
        drawn = _random_unit(self.size, part.shape[1], part.dtype, part.device, generator)
        if self.group is not None and generator is None:
            _from_rank_0(drawn, self.group)
        part.copy_(drawn[self.start :][: len(part)])

    @property
    def negatives(self) -> Tensor:
        """(size, dim), or this rank's (size / W, dim); without gradient, in no particular order."""
        return self.features

    @property
    def filled(self) -> int:
        """How many rows are features rather than random (reads one number from the device), of all
        ranks together if the queue is sharded."""
        return int(self.seen)

    @torch.no_grad()
    def enqueue(self, features: Tensor) -> None:
        """Overwrite the oldest rows by `features` (N, dim), of any N; stored as they are.

        With a group: the features of all ranks, of which some may have none.
        """
        if self.group is None:
            self._check(features)
            features = features.detach()  # no_grad lets tangents of forward mode through
        else:
            features = self._gather(self.group, features)
        _convert(self.features, features.dtype, features.device)
        for counter in (self.position, self.seen):
            _convert(counter, counter.dtype, self.host or features.device)
        count = features.shape[0]
        kept = features[-self.size :]
        first = self.position + (count - kept.shape[0])
        places = (torch.arange(kept.shape[0], device=features.device) + first) % self.size
        if self.world > 1:
            places -= self.start
            mine = (places >= 0) & (places < self.features.shape[0])
            kept, places = kept[mine], places[mine]
        self.features.index_copy_(0, places, kept)
        self.position.add_(count).remainder_(self.size)
        self.seen.add_(count).clamp_(max=self.size)

    @torch._disable_dynamo  # collectives break a graph, here at once
    def _gather(self, group: KeptGroup, features: Tensor) -> Tensor:
        """The features of all ranks."""
        with GroupCall(group, "enqueue", [features]) as call:
            self._check(features, whole=False)
            features = features.detach()
            state = None
            if self.sharded:
                self._check_place(group)
                state = f"position {int(self.position)}, seen {int(self.seen)}"
            batch, _ = join(call, features.shape[0], features=features, state=state)
            assert isinstance(batch, Shards)
            return batch.gather(features)

    def _check(self, features: Tensor, whole: bool = True) -> None:
        check_features("features", features, (2,), whole=whole)
        dim = self.features.shape[1]
        if features.shape[1] != dim:
            raise ValueError(f"features must have shape (N, {dim}), got {tuple(features.shape)}")

    def _check_place(self, group: KeptGroup) -> None:
        """A part belongs to one rank; a copy of it on another one would be there twice."""
        place = _place(group)
        if place != (self.rank, self.world):
            raise ValueError(
                f"a sharded queue made on rank {self.rank} of {self.world} is used on rank "
                f"{place[0]} of {place[1]}: make it anew and load its state_dict"
            )

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.features.shape[1]}" + ", sharded=True" * self.sharded


class MemoryBank(nn.Module):
    """One feature for each sample of a data set (InstDis, Wu et al. 2018, sec. 3.1).

    It starts with random unit vectors. `update` writes in place: call it after `loss.backward()`.
    With a `group` every rank calls `update` with its own samples, of any number, and the bank stays
    equal on every rank. Without one DistributedDataParallel, which copies buffers of rank 0, loses
    what other ranks have seen.

    Args:
        num_data, dim: shape of the bank.
        momentum: m in bank[i] <- normalize(m bank[i] + (1 - m) feature), in [0, 1].
        dtype, device, generator: of the random start. The bank is float32 for features of half
            precision, in which an average over time would stand still, and follows others.
        group: a torch.distributed process group, a DeviceMesh of one dimension, or "world"; it must
            be there by now.
    """

    features: Tensor

    def __init__(
        self,
        num_data: int,
        dim: int,
        momentum: float = 0.5,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        group: Group | None = None,
    ) -> None:
        super().__init__()
        self.group = None if group is None else KeptGroup(group)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.momentum = momentum
        features = _random_unit(num_data, dim, dtype, device, generator)
        features = features.to(statistics_dtype(features))
        if self.group is not None and generator is None:
            _from_rank_0(features, self.group)
        self.register_buffer("features", features)

    def lookup(self, indices: Tensor) -> Tensor:
        """Features of the samples `indices` (any shape): (..., dim), a copy without gradient."""
        return self.features[indices]

    def sample(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """Features of uniform random samples, drawn with replacement: (*shape, dim).

        `sample(m)` gives negatives all queries share, `sample(n, m)` m for each of n queries.
        """
        source = self.features.device if generator is None else generator.device
        rows = self.features.shape[0]
        drawn = torch.randint(rows, shape, generator=generator, device=source)
        return self.lookup(drawn.to(self.features.device))

    @torch.no_grad()
    def update(self, indices: Tensor, features: Tensor) -> None:
        """Mix `features` (N, dim), first normalised, into the rows `indices` (N,).

        Of an index that occurs twice, the last feature is used. With a group: the samples of all
        ranks, in the order of the ranks, of which some may have none.
        """
        if self.group is None:
            self._check(indices, features)
        else:
            indices, features = self._gather(self.group, indices, features)
        indices = indices.long()
        # a moving average in half precision would stand still
        _convert(self.features, statistics_dtype(features), features.device)
        fresh = F.normalize(features.detach().to(self.features.dtype), dim=-1)
        mixed = torch.lerp(fresh, self.features[indices], self.momentum)
        # rows that are written twice are written alike, in whatever order
        ordered, order = indices.sort(stable=True)
        last = order[torch.searchsorted(ordered, indices, right=True) - 1]
        self.features[indices] = F.normalize(mixed, dim=-1)[last]

    @torch._disable_dynamo  # collectives break a graph, here at once
    def _gather(self, group: KeptGroup, indices: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of all ranks."""
        with GroupCall(group, "update", [features]) as call:
            self._check(indices, features, whole=False)
            features = features.detach()
            batch, _ = join(call, features.shape[0], features=features)
            assert isinstance(batch, Shards)
            return batch.gather(indices.long()), batch.gather(features)

    def _check(self, indices: Tensor, features: Tensor, whole: bool = True) -> None:
        check_features("features", features, (2,), whole=whole)
        check_ids("indices", indices, features.shape[:1])
        if features.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"features must have shape (N, {self.features.shape[1]}), "
                f"got {tuple(features.shape)}"
            )

    def extra_repr(self) -> str:
        num_data, dim = self.features.shape
        return f"num_data={num_data}, dim={dim}, momentum={self.momentum}"


def _convert(buffer: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a buffer another type or device in place: DDP, optimisers and checkpoints keep it, in
    whatever mode the call runs."""
    if (buffer.dtype, buffer.device) != (dtype, device):
        with torch.inference_mode(False):
            buffer.data = torch.empty_like(buffer, dtype=dtype, device=device).copy_(buffer)


def _random_unit(
    rows: int,
    dim: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    _check_sizes(rows, dim)
    source = device if generator is None else generator.device
    features = torch.randn(rows, dim, generator=generator, device=source)
    return F.normalize(features, dim=-1).to(device=device, dtype=dtype)


def _check_sizes(rows: int, dim: int) -> None:
    for name, value in (("the number of rows", rows), ("dim", dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _place(group: KeptGroup) -> tuple[int, int]:
    """(this rank, how many there are)"""
    ranks = group.find()
    return ranks.rank(), ranks.size()


def _from_rank_0(t: Tensor, group: KeptGroup) -> None:
    """Fills a tensor of every rank with that of the first one."""
    from torch.distributed import broadcast

    broadcast(t, group=group.find(), group_src=0)
