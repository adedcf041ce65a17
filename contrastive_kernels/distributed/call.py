"""One call of a loss by every rank of a group: what all must agree on, and errors that reach all.

`@collective` decorates a loss. It knows the arguments of the call, so that `join`, which the loss
calls when it has checked them, need only be told what may differ between ranks.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..autograd import no_transform
from ..sources import is_source
from ..types import Group
from .collectives import all_gather, all_gather_objects, tell
from .groups import KeptGroup, resolve_group
from .shards import Batch, Shards

P = ParamSpec("P")
R = TypeVar("R")

EXCHANGES = ("auto", "gather", "ring")
FAILED = -1  # in place of a fingerprint, which is not negative


class GroupCall:
    """One call by every rank of a group: what one rank raises before `join` is told to all.

    Without it the others would wait in `join` until the backend gives up.
    """

    def __init__(self, group: Group | KeptGroup, name: str, inputs: Iterable[Any]) -> None:
        from torch.distributed.distributed_c10d import _get_object_coll_device

        self.ranks = resolve_group(group)
        self.name = name
        self.arguments: dict[str, Any] = {}
        self.joined = False
        # the same kind of device on every rank, whatever it was called with
        kind = _get_object_coll_device(self.ranks)
        devices = [t.device for t in inputs if isinstance(t, Tensor) and t.device.type == kind]
        self.device = devices[0] if devices else torch.device(kind)

    def __enter__(self) -> GroupCall:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, Exception) and not self.joined:
            self.gather_numbers(0, 0, FAILED)
            tell(error, self.ranks)

    def gather_numbers(self, *numbers: int) -> list[list[int]]:
        """The numbers of each rank, read on the host."""
        mine = torch.tensor([numbers], device=self.device)
        self.joined = True
        return all_gather(mine, self.ranks).tolist()


# The `group` of a loss: users pass a Group, modules one that they keep, and what `collective`
# decorates sees the GroupCall.
GroupLike: TypeAlias = Group | KeptGroup | GroupCall | None


def collective(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates what takes a `group` and joins it: inside, `group` is the GroupCall."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        group: Any = options.get("group")
        if group is None or isinstance(group, GroupCall):
            return function(*args, **options)
        return on_ranks(group, args, options)

    @torch._disable_dynamo  # collectives and what is read from them break a graph, here at once
    def on_ranks(group: Group, args: tuple, options: dict[str, Any]) -> R:
        no_transform("a group")  # within one, nothing can be told to the other ranks
        with GroupCall(group, function.__name__, (*args, *options.values())) as together:
            options = {**options, "group": together}
            try:
                bound = signature.bind(*args, **options)
            except TypeError:
                return function(*args, **options)  # which says it as Python does
            bound.apply_defaults()
            together.arguments = dict(bound.arguments)
            return function(*args, **options)

    return call


def join(
    group: GroupLike,
    rows: int,
    more_rows: int = 0,
    *,
    exchange: str = "auto",
    replicated: bool = False,
    total: int | None = None,
    **differing: Any,
) -> tuple[Batch, Batch]:
    """The batches of this call: of its `rows`, and of its `more_rows`.

    With a group one all-gather of three numbers, which are read on the host. Of the arguments of
    the call tensors may differ between ranks in their first size alone, and all else must not;
    `differing` replaces arguments where that is not the way to see them. `replicated`: `more_rows`
    are negatives that every rank has all of; else `total`, if given, is their number over all
    ranks, as each knows it.

    Raises:
        ValueError, on every rank: another loss, dtype, number of features or option somewhere; no
            rows anywhere; an error of another rank before it came here.
        The backend's error, at its timeout: a rank that does not come.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f'exchange must be "auto", "gather" or "ring", got {exchange!r}')
    if group is None:
        return Batch(rows), Batch(more_rows)
    assert isinstance(group, GroupCall), "what joins a group is decorated by `collective`"
    arguments = {**group.arguments, **differing}
    for name in ("group", "exchange"):
        arguments.pop(name, None)
    device = next(t.device.type for t in arguments.values() if isinstance(t, Tensor))
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    described = {
        "loss": group.name, "exchange": exchange, "autocast": str(autocast),
        **{name: _describe(value) for name, value in arguments.items()},
    }  # fmt: skip
    if replicated or total is not None:
        described["number of negatives"] = str(more_rows if replicated else total)
    digest = hashlib.blake2b(repr(described).encode(), digest_size=7).digest()
    numbers = group.gather_numbers(rows, more_rows, int.from_bytes(digest))
    sizes, more, digests = (list(each) for each in zip(*numbers, strict=True))
    ranks = group.ranks
    if FAILED in digests:
        tell(None, ranks)
    if len(set(digests)) > 1:
        raise ValueError(_difference(all_gather_objects(described, ranks)))
    if not any(sizes):
        raise ValueError("a rank of group must have rows, got none on any")
    rank = ranks.rank()
    return Shards(ranks, rank, sizes, exchange), Shards(ranks, rank, more, exchange)


def _describe(value: Any) -> str:
    if is_source(value):
        return f"{value.dtype} (*, {value.shape[1]}) in chunks"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_describe, value))})"
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
