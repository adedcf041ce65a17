"""A batch that is spread over the ranks of a `torch.distributed` group.

Rank r holds n_r rows of a batch of N = n_0 + ... + n_(W-1). `join` tells every rank all sizes, and
what the losses need of the other ranks is on the `Shards` it returns; the pairs of rows of
different ranks are in `sharded.py`.

The convention of every loss: its value is that of one process with the whole batch, the same on
every rank; its gradient on rank r is W / N times that of the sum of the rank's own rows (of all
ranks, through the features they share). After DDP's mean over the ranks, gradients of features,
scale and bias are those of one process. reduction="none" gives the rank's own rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sources import is_source

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
Group = "ProcessGroup | DeviceMesh"  # neither is there in a torch without torch.distributed

P, R = ParamSpec("P"), TypeVar("R")

EXCHANGES = ("auto", "gather", "ring")
# "auto" gathers up to this many bytes of keys: every rank holds them from forward to backward
GATHERED_BYTES = 2**28
FAILED = -1  # in place of a fingerprint, which is not negative


class Shards:
    """How many rows each rank of a group has, and the few collectives that losses need.

    sizes[r] is the number of rows of rank r, starts[r] that of all ranks below it.
    """

    def __init__(self, group: ProcessGroup, rank: int, sizes: list[int], exchange: str) -> None:
        self.group, self.rank, self.sizes, self.exchange = group, rank, sizes, exchange
        self.world = len(sizes)
        *self.starts, self.total = accumulate(sizes, initial=0)
        self._gathered: dict[int, tuple[Tensor, Tensor]] = {}
        self._repeats: dict[int, tuple[Tensor, int]] = {}

    @property
    def own(self) -> slice:
        """This rank's rows among those of all."""
        return slice(self.starts[self.rank], self.starts[self.rank] + self.sizes[self.rank])

    def of(self, sizes: list[int]) -> Shards:
        """The same ranks with other sizes."""
        return Shards(self.group, self.rank, sizes, self.exchange)

    def times(self, count: int) -> Shards:
        """The same ranks with `count` rows for each row."""
        return self.of([count * size for size in self.sizes])

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

    def gather_keys(self, rows: Tensor) -> Tensor:
        """`gather` with a gradient, that of all ranks' losses."""
        return rows if self.world == 1 else _GatherKeys.apply(rows, self)

    def own_ids(self, device: torch.device, repeat: int = 1) -> Tensor:
        """Ids of this rank's rows; `repeat`: rows come in so many runs, with equal ids."""
        ids = self._numbered(self.rank, repeat).to(device)
        self._repeats[id(ids)] = (ids, repeat)
        return ids

    def all_ids(self, ids: Tensor) -> Tensor:
        """The ids of all ranks; of `own_ids` and of ids seen before without a collective."""
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

    def total_of(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, the same bits on every rank; no gradient."""
        return sum_over_ranks(value.detach(), self)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the entries (n_r, ...) of all ranks, 0-d, no gradient."""
        count = value.new_full((), value.numel(), dtype=torch.float64)
        both = self.total_of(torch.stack((value.detach().double().sum(), count)))
        return (both[0] / both[1]).to(value.dtype)

    def reduce(self, total: Tensor, mean: bool) -> Tensor:
        """The sum over ranks of a sum over rows, or their mean, by the module's convention."""
        return _Reduce.apply(total, self, self.total if mean else 1)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks; its gradient is that of all ranks' losses."""
        return _Sum.apply(value, self)

    def logsumexp(self, rows: Tensor) -> Tensor:
        """logsumexp over the rows (n_r,) of all ranks, 0-d; its gradient is that of all losses."""
        return _LogSumExp.apply(rows.logsumexp(0), self)

    def sweep(self, *args: Any, **options: Any):
        """`ops.sweep` against the keys of all ranks; called by it."""
        from .sharded import sweep  # not needed where nothing is distributed

        return sweep(self, *args, **options)

    def softplus_sweep(self, *args: Any, **options: Any):
        """`ops.softplus_sweep` against the keys of all ranks; called by it."""
        from .sharded import softplus_sweep

        return softplus_sweep(self, *args, **options)


class Meeting:
    """One call by every rank of a group: what one rank raises before `join` is told to all.

    Without it the others would wait in `join` until the backend gives up.
    """

    def __init__(self, group: ProcessGroup | DeviceMesh, arguments: Iterable[Any]) -> None:
        from torch.distributed.distributed_c10d import _get_object_coll_device

        self.group = resolve_group(group)
        self.joined = False
        # the same kind of device on every rank, whatever it was called with
        kind = _get_object_coll_device(self.group)
        devices = [t.device for t in arguments if isinstance(t, Tensor) and t.device.type == kind]
        self.device = devices[0] if devices else torch.device(kind)

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, Exception) and not self.joined:
            self.tell(0, 0, FAILED)
            self.tell_objects(f"{type(error).__name__}: {error}")

    def tell(self, *record: int) -> list[list[int]]:
        """The records of all ranks."""
        mine = torch.tensor([record], device=self.device)
        self.joined = True
        return all_gather(mine, self.group).tolist()

    def tell_objects(self, mine: Any) -> list[Any]:
        """The same for anything; only where something is wrong."""
        from torch.distributed import all_gather_object

        everywhere = [None] * self.group.size()
        all_gather_object(everywhere, mine, self.group)
        return everywhere


def collective(loss: Callable[P, R]) -> Callable[P, R]:
    """Decorates what takes a `group` and joins it: inside, `group` is the Meeting of this call."""

    @wraps(loss)
    def call(*args: P.args, **options: P.kwargs) -> R:
        group = options.get("group")
        if group is None or isinstance(group, Meeting):
            return loss(*args, **options)
        return meet(group, args, options)

    @torch._disable_dynamo  # collectives and what is read from them break a graph, here at once
    def meet(group: ProcessGroup | DeviceMesh, args: tuple, options: dict[str, Any]) -> R:
        with Meeting(group, (*args, *options.values())) as meeting:
            return loss(*args, **{**options, "group": meeting})

    return call


def join(
    group: Meeting | None,
    exchange: str,
    loss: str,
    rows: int,
    more_rows: int = 0,
    /,
    **arguments: Any,
) -> tuple[Shards | None, Shards | None]:
    """Sizes of this call's batch on every rank: (of its `rows`, of its `more_rows`), or Nones.

    One all-gather of three numbers, which are read on the host. `arguments`: tensors, whose first
    sizes may differ between ranks, and options; all else must not.

    Raises:
        ValueError, on every rank: another loss, dtype, number of features or option somewhere; no
            rows anywhere; an error of another rank before it came here.
        The backend's error, at its timeout: a rank that does not come.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f'exchange must be "auto", "gather" or "ring", got {exchange!r}')
    if group is None:
        return None, None
    device = next(t.device.type for t in arguments.values() if isinstance(t, Tensor))
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    described = {
        "loss": loss, "exchange": exchange, "autocast": str(autocast),
        **{name: _describe(value) for name, value in arguments.items()},
    }  # fmt: skip
    digest = hashlib.blake2b(repr(described).encode(), digest_size=7).digest()
    sizes, more, digests = zip(*group.tell(rows, more_rows, int.from_bytes(digest)), strict=True)
    if FAILED in digests:
        errors = enumerate(group.tell_objects(None))
        raise ValueError(
            "; ".join(f"rank {rank} of group raised {e}" for rank, e in errors if e is not None)
        )
    if len(set(digests)) > 1:
        raise ValueError(_difference(group.tell_objects(described)))
    if not any(sizes):
        raise ValueError("a rank of group must have rows, got none on any")
    ranks, rank = group.group, group.group.rank()
    return Shards(ranks, rank, list(sizes), exchange), Shards(ranks, rank, list(more), exchange)


def gather_uneven(group: Meeting, rows: Tensor) -> Tensor:
    """The rows (n_r, ...) of all ranks, in their order, (N, ...); no gradient."""
    shards, _ = join(group, "gather", "the queue", rows.shape[0], features=rows.detach())
    return shards.gather(rows.detach())


def resolve_group(group: ProcessGroup | DeviceMesh) -> ProcessGroup:
    """The process group of a group or of a DeviceMesh with one dimension."""
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a DeviceMesh of one dimension, got {group.ndim}: pass mesh[name]"
            )
        group = group.get_group()
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed process group of this rank or a DeviceMesh, "
            f"got {type(group).__name__}"
        )
    return group


def all_gather(rows: Tensor, group: ProcessGroup) -> Tensor:
    """The tensors of all ranks, equal in shape, one after the other along the first dimension."""
    import torch.distributed._functional_collectives as collectives

    # renamed in torch 2.13
    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
    return collectives.wait_tensor(gather(rows.contiguous(), 0, group))


def all_to_all(rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """Rows for every rank, `sent` of them to each, against theirs, `received` from each."""
    import torch.distributed._functional_collectives as collectives

    return collectives.wait_tensor(
        collectives.all_to_all_single(rows.contiguous(), received, sent, group)
    )


def sum_over_ranks(value: Tensor, shards: Shards) -> Tensor:
    """The sum in the order of the ranks: an all-reduce might round differently on each."""
    if shards.world == 1:
        return value
    return all_gather(value.unsqueeze(0), shards.group).sum(0)


class _Reduce(torch.autograd.Function):
    """The sum over all ranks divided by `count`; the gradient is W / count of the rank's sum."""

    @staticmethod
    def forward(ctx, total: Tensor, shards: Shards, count: int) -> Tensor:
        ctx.factor = shards.world / count
        return sum_over_ranks(total, shards) / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return shards.gather(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        shards = ctx.shards
        own = shards.sizes[shards.rank]
        parts = all_to_all(grad, [own] * shards.world, shards.sizes, shards.group)
        return parts.view(shards.world, own, *grad.shape[1:]).sum(0), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return _all_reduce(value, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.shards), None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        total = all_gather(part.unsqueeze(0), shards.group).logsumexp(0)
        ctx.save_for_backward(part, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        part, total = ctx.saved_tensors
        return sum_over_ranks(grad, ctx.shards) * (part - total).exp(), None


def _all_reduce(value: Tensor, shards: Shards) -> Tensor:
    import torch.distributed._functional_collectives as collectives

    if shards.world == 1:
        return value.clone()
    return collectives.wait_tensor(collectives.all_reduce(value, "sum", shards.group))


def _describe(value: Any) -> str:
    if is_source(value):
        return f"{value.dtype} (*, {value.shape[1]}) in chunks"
    if not isinstance(value, Tensor):
        return repr(value)
    shape = ", ".join(("*", *map(str, value.shape[1:]))) if value.dim() else ""
    gradient = " with gradient" if value.requires_grad and torch.is_grad_enabled() else ""
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} ({shape}) on {value.device.type}{gradient}"


def _difference(everywhere: list[dict[str, str]]) -> str:
    """What differs between the ranks."""
    for name in dict.fromkeys(name for ranks in everywhere for name in ranks):
        values = [ranks.get(name, "absent") for ranks in everywhere]
        if len(set(values)) > 1:
            listed = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            return f"{name} must be the same on every rank of group, got {listed}"
    return "the arguments must come in the same order on every rank of group"
