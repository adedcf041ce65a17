"""Negatives in chunks in a call by several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..sources import NegativeSource, checked
from .collectives import all_gather, tell
from .shards import Shards


class RankSource:
    """What this rank reads of a source; an error in a pass of one rank is raised on all, which end
    each pass together.

    batch: the rows of the call. shared: the negatives are this rank's part of those of all ranks
    and meet the rows of all; else every rank has all negatives, for its own rows.
    """

    def __init__(self, source: NegativeSource, batch: Shards, *, shared: bool) -> None:
        self.source, self.batch, self.shared = source, batch, shared
        self.shape, self.dtype = source.shape, source.dtype

    def __iter__(self) -> Iterator[Tensor]:
        try:
            yield from checked(self.source)
        except Exception as error:
            self.end(error)
            raise
        self.end()

    def end(self, error: Exception | None = None) -> None:
        """The end of a pass, also of one that this rank has nothing to read in."""
        from torch.distributed.distributed_c10d import _get_object_coll_device

        group = self.batch.group
        failed = torch.tensor([error is not None], device=_get_object_coll_device(group))
        if all_gather(failed.int(), group).any():
            tell(error, group)
