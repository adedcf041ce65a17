"""A module's rows of which each rank holds its part, and states that can be saved and loaded on any
number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..types import known
from .groups import KeptGroup

CURE = (
    "One rank's state has its part alone: save by all ranks with torch.distributed.checkpoint, or "
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), as "
    "docs/distributed.md shows"
)


class Rows(nn.Module):
    """`size` rows of which `features` are those from `start` on, and counters beside them.

    Without a part all are buffers. The tensors of a part are attributes: ranks differ in them, and
    DistributedDataParallel copies the buffers of rank 0 to all ranks. They follow `to`, copies and
    pickles as buffers do; the counters stay on the CPU, where reading them waits for no device.

    A state_dict has the part as a DTensor of all rows, so that what saves each rank's part, or
    gathers them, knows how; and always `rows`, the number of each row, since what one rank saves
    alone holds its own part only. Loading takes from a state, whole or a part, the rows that it
    needs.
    """

    features: Tensor
    position: Tensor
    seen: Tensor
    _kept = ("features", "position", "seen")

    def __init__(self, size: int, start: int, group: KeptGroup | None, sharded: bool) -> None:
        super().__init__()
        self.size, self.start, self.group, self.sharded = size, start, group, sharded
        self.host = torch.device("cpu") if sharded else None  # where counters stay

    def keep(self, features: Tensor) -> None:
        """Start with these rows, and with counters at 0."""
        device = self.host or features.device
        counters = (torch.zeros((), dtype=torch.long, device=device) for _ in range(2))
        for name, tensor in zip(self._kept, (features, *counters), strict=True):
            if self.sharded:
                setattr(self, name, tensor)
            else:
                self.register_buffer(name, tensor)

    @property
    def rows(self) -> Tensor:
        """The numbers, of 0 .. size - 1, of the rows that are here."""
        stop = self.start + self.features.shape[0]
        return torch.arange(self.start, stop, device=self.features.device)

    @contextmanager
    def _as_buffers(self, *names: str) -> Iterator[None]:
        """The tensors of a part among the buffers, for what nn.Module does with those."""
        parts = names if self.sharded else ()
        for name in parts:
            self._buffers[name] = self.__dict__.pop(name)
        try:
            yield
        finally:
            for name in parts:
                self.__dict__[name] = self._buffers.pop(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rows:
        with self._as_buffers("features"):
            return super()._apply(fn, recurse)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Also a part, if this module is asked alone: as by fully_shard, which moves buffers, and
        by torch.distributed.checkpoint, but not by DistributedDataParallel."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:
            for name in (*self._kept, "rows") if self.sharded else ("rows",):
                yield f"{prefix}.{name}" if prefix else name, getattr(self, name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self._as_buffers(*self._kept):
            super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.sharded:  # with the entries of a part, each loads into the other
            destination[prefix + "rows"] = self.rows
            return
        for name, part in (("features", self.features), ("rows", self.rows)):
            destination[prefix + name] = self._whole(part)

    def _whole(self, part: Tensor) -> Tensor:
        """All rows as a DTensor, or the part alone when the group is gone, as at a run's end."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        try:
            ranks = known(self.group).find()
        except RuntimeError:
            return part
        mesh = DeviceMesh.from_group(ranks, "cpu" if part.is_meta else part.device.type)
        return DTensor.from_local(part.detach(), mesh, [Shard(0)], run_check=False)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        key = prefix + "features"
        numbers, state = state_dict.pop(prefix + "rows", None), state_dict.get(key)
        if isinstance(state, Tensor) and (self.sharded or numbers is not None):
            try:
                state_dict[key], absent = self._take(state, numbers)
            except ValueError as error:
                error_msgs.append(f"{key}: {error}.")
                state_dict[key] = self.features
            else:
                missing_keys.extend(f"{key}: {message}" for message in absent)
            for name in {prefix + counter for counter in self._kept[1:]} & state_dict.keys():
                state_dict[name] = state_dict[name].clone()  # the rows are copies too
        with self._as_buffers(*self._kept):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                error_msgs,
            )  # fmt: skip

    def _take(self, state: Tensor, numbers: Tensor | None) -> tuple[Tensor, list[str]]:
        """The rows of this module out of those a state has, and what to say of absent ones, in
        whose places are this module's.

        Raises:
            ValueError: rows of another queue.
        """
        part, shape = _local(state), (self.size, *self.features.shape[1:])
        named = numbers is not None
        numbers = torch.arange(len(state)) if numbers is None else _local(numbers).cpu()
        if numbers.shape != part.shape[:1]:
            raise ValueError(f"the state has {len(part)} rows, and no entry `rows` tells which")
        alone = named and part is state  # a part of a queue that may be of any size
        fits = bool((numbers < self.size).all()) if alone else len(state) == self.size
        if not fits or part.shape[1:] != shape[1:]:
            raise ValueError(
                f"size mismatch: the state has shape {tuple(state.shape)}, this queue {shape}"
            )
        places = torch.full((self.size,), -1)
        places[numbers] = torch.arange(len(part))
        places = places[self.start :][: self.features.shape[0]]
        found = places >= 0
        if found.all():
            return part[places.to(part.device)], []
        smaller = ""
        if torch.equal(numbers, torch.arange(len(part))):  # it does not say which of both
            smaller = f"It may be all of a queue of size {len(part)}, where this one is {self.size}"
        message = (
            f"the state has rows {_ranges(numbers)}, and not rows "
            f"{_ranges(self.rows.cpu()[~found])} of this queue, which stay as they were. "
            f"{smaller and smaller + ', or the first part of one. '}{CURE}"
        )
        warnings.warn(message, stacklevel=2)
        rows = self.features.to(part.device, part.dtype, copy=True)
        rows[found.to(part.device)] = part[places[found].to(part.device)]
        return rows, [message]


def _local(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _ranges(numbers: Tensor) -> str:
    """1, 2, 3, 7 as "1 to 3, 7 to 7"."""
    numbers = numbers.unique()
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    runs = numbers.tensor_split(breaks.tolist())
    return ", ".join(f"{run[0]} to {run[-1]}" for run in runs if len(run))
