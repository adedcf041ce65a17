"""Batches that are spread over the ranks of a group."""

from .call import GroupCall, GroupLike, collective, join
from .collectives import all_gather, resolve_group
from .shards import Batch, Shards

__all__ = [
    "Batch",
    "GroupCall",
    "GroupLike",
    "Shards",
    "all_gather",
    "collective",
    "join",
    "resolve_group",
]
