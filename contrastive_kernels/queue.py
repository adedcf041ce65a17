"""Stores of past features: MoCo's queue and the per-sample memory bank."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_features, check_ids
from .distributed import GroupCall, KeptGroup, Shards, join
from .types import Group, statistics_dtype


class FeatureQueue(nn.Module):
    """The last `size` features seen, as negatives (MoCo, He et al. 2020, sec. 3.2).

    It starts with random unit vectors, as MoCo's does, so `negatives` always has `size` rows;
    `filled` tells how many are features. Everything is in the state_dict, the position too, and
    nothing is read back from the device.

    `negatives` is the buffer itself, not a copy, and `enqueue` writes into it: call `enqueue`
    after `loss.backward()`. When a loss still needs the old rows, its backward raises PyTorch's
    error of a tensor "modified by an inplace operation".

    With a `group` every rank calls `enqueue` with its own features, of any number, and the features
    of all ranks, in the order of the ranks, enter the queue. It stays equal on every rank; or with
    `sharded=True` each rank keeps only its part, of size / W rows, for losses with a `group` and
    `sharded_negatives=True`. Features of one step go to the ranks in turn, so that all parts hold
    what one queue of `size` rows would.

    Args:
        size, dim: shape of the queue, of all ranks together if it is sharded.
        dtype, device: of the random start; later the queue follows the enqueued features.
        generator: source of the random start; each rank draws as much as the whole queue, so that
            equal seeds give equal queues.
        group: a torch.distributed process group, a DeviceMesh of one dimension, or "world"; it must
            be there by now.
        sharded: each rank keeps 1 / W of the queue; W divides `size`.
    """

    features: Tensor
    position: Tensor
    seen: Tensor

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
        super().__init__()
        self.group = None if group is None else KeptGroup(group)
        ranks = None if self.group is None else self.group.find()
        self.rank, self.world = 0, 1  # of those that share the rows
        if sharded:
            if ranks is None:
                raise ValueError("sharded needs a group")
            self.rank, self.world = ranks.rank(), ranks.size()
            if size % self.world != 0:
                raise ValueError(f"size must be a multiple of the {self.world} ranks, got {size}")
        features = _random_unit(size, dim, dtype, device, generator)
        if ranks is not None and generator is None:
            from torch.distributed import broadcast

            broadcast(features, group=ranks, group_src=0)
        # row i of the queue is row i // W of rank i % W
        self.register_buffer("features", features[self.rank :: self.world].clone())
        counter = torch.zeros((), dtype=torch.long, device=device)
        self.register_buffer("position", counter)
        self.register_buffer("seen", counter.clone())

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
        rows, dim = self.features.shape
        context: AbstractContextManager[GroupCall | None] = nullcontext()
        if self.group is not None:
            context = GroupCall(self.group, "enqueue", [features])
        with context as group:
            check_features("features", features, (2,), whole=group is None)
            if features.shape[1] != dim:
                raise ValueError(
                    f"features must have shape (N, {dim}), got {tuple(features.shape)}"
                )
            batch, _ = join(group, features.shape[0], features=features.detach())
            if isinstance(batch, Shards):
                features = batch.gather(features.detach())
        _convert(self.features, features.dtype, features.device)
        for counter in (self.position, self.seen):
            _convert(counter, counter.dtype, features.device)
        size, count = rows * self.world, features.shape[0]
        kept = features[-size:]
        first = self.position + (count - kept.shape[0])
        places = (torch.arange(kept.shape[0], device=features.device) + first) % size
        if self.world > 1:
            mine = places % self.world == self.rank
            kept, places = kept[mine], places[mine] // self.world
        self.features.index_copy_(0, places, kept)
        self.position.add_(count).remainder_(size)
        self.seen.add_(count).clamp_(max=size)

    def extra_repr(self) -> str:
        size, dim = self.world * self.features.shape[0], self.features.shape[1]
        return f"size={size}, dim={dim}" + ", sharded=True" * (self.world > 1)


class MemoryBank(nn.Module):
    """One feature for each sample of a data set (InstDis, Wu et al. 2018, sec. 3.1).

    It starts with random unit vectors. `update` writes in place: call it after `loss.backward()`.

    Args:
        num_data, dim: shape of the bank.
        momentum: m in bank[i] <- normalize(m bank[i] + (1 - m) feature), in [0, 1].
        dtype, device, generator: of the random start. The bank is float32 for features of half
            precision, in which an average over time would stand still, and follows others.
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
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.momentum = momentum
        features = _random_unit(num_data, dim, dtype, device, generator)
        self.register_buffer("features", features.to(statistics_dtype(features)))

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

        Of an index that occurs twice, one of its features is used, which one is not defined.
        """
        check_features("features", features, (2,))
        check_ids("indices", indices, features.shape[:1])
        if features.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"features must have shape (N, {self.features.shape[1]}), "
                f"got {tuple(features.shape)}"
            )
        # a moving average in half precision would stand still
        _convert(self.features, statistics_dtype(features), features.device)
        fresh = F.normalize(features.to(self.features.dtype), dim=-1)
        mixed = torch.lerp(fresh, self.features[indices], self.momentum)
        self.features[indices] = F.normalize(mixed, dim=-1)

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
    for name, value in (("the number of rows", rows), ("dim", dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    source = device if generator is None else generator.device
    features = torch.randn(rows, dim, generator=generator, device=source)
    return F.normalize(features, dim=-1).to(device=device, dtype=dtype)
