"""Batches that are spread over the ranks of a group."""

from .call import GroupCall, GroupLike, collective, join
from .collectives import all_gather
from .groups import KeptGroup, resolve_group, world_size
from .parts import Rows
from .rank_source import RankSource
from .shards import Batch, Shards

__all__ = [
    "Batch",
    "GroupCall",
    "GroupLike",
    "KeptGroup",
    "RankSource",
    "Rows",
    "Shards",
    "all_gather",
    "collective",
    "join",
    "resolve_group",
    "world_size",
]
