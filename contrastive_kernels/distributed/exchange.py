"""How the keys of all ranks meet the rows of each, and what belongs to the keys comes home.

`Gather` copies all keys to every rank; in `Ring` they travel from rank to rank. Both run the same
plan: rank r meets the shards r, r - 1, ..., r - h (modulo W), with h = W - 1, or h = W // 2 where
the matrix is symmetric and a block serves its transpose too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import known
from .collectives import all_to_all
from .shards import Shards

# "auto" gathers up to this many bytes of keys: every rank holds them from forward to backward
GATHERED_BYTES = 2**28


class KeyShard(NamedTuple):
    """What belongs to keys (m, ...) and goes where they go; None is not there.

    stats: statistics of the columns and their gradients. exclude, keep: ids of the columns.
    """

    keys: Tensor | None = None
    bias: Tensor | None = None
    stats: Tensor | None = None
    exclude: Tensor | None = None
    keep: Tensor | None = None

    def part(self, rows: slice) -> KeyShard:
        return KeyShard(*(None if t is None else t[rows] for t in self))


# (rows of this rank, whether they meet themselves, the keys they meet) -> results (keys, C)
Visit = Callable[[slice, bool, KeyShard], Tensor | None]
Merge = Callable[[Tensor, Tensor], Tensor]


class Block(NamedTuple):
    """Rows of this rank against keys of a shard; `own`: against themselves, half of the pairs."""

    shard: int
    rows: slice
    keys: slice
    own: bool = False


def plan(shards: Shards, rank: int, rows: int, symmetric: bool) -> list[Block]:
    """The blocks of a rank that has `rows` rows, in the order of the ring."""
    world, sizes = shards.world, shards.sizes
    met = [(rank - step) % world for step in range(world // 2 + 1 if symmetric else world)]
    blocks = [Block(shard, slice(0, rows), slice(0, sizes[shard])) for shard in met]
    if symmetric:
        blocks[0] = blocks[0]._replace(own=True)
        if world % 2 == 0:  # the two ranks that meet each other last share the pairs
            other = met[-1]
            half = sizes[min(rank, other)] // 2
            if rank < other:
                blocks[-1] = Block(other, slice(0, half), slice(0, sizes[other]))
            else:
                blocks[-1] = Block(other, slice(0, rows), slice(half, sizes[other]))
    return blocks


class Exchange:
    """Base of both: `load` this rank's keys, then `run` over the keys of all."""

    def __init__(self, shards: Shards, rows: int, symmetric: bool) -> None:
        self.shards = shards
        self.blocks = plan(shards, shards.rank, rows, symmetric)
        self.symmetric = symmetric

    def load(self, mine: KeyShard) -> KeyShard:
        """What `run` takes, of what is on this rank."""
        return mine

    def run(
        self, loaded: KeyShard, visit: Visit, neutral: Tensor | None, merge: Merge
    ) -> Tensor | None:
        """Visit every block. What visits return for keys of this rank, merged, (keys, C).

        `neutral` (C,) is a result without effect; None: there are no results. `merge` may write
        into its first argument.
        """
        raise NotImplementedError


def _place(result: Tensor | None, keys: slice, neutral: Tensor, count: int) -> Tensor:
    """Results of `keys` among `count` results, the others neutral."""
    if result is not None and result.shape[0] == count:
        return result
    results = neutral.repeat(count, 1)
    if result is not None:
        results[keys] = result
    return results


class Gather(Exchange):
    """One all-gather before, one all-to-all after."""

    def load(self, mine: KeyShard) -> KeyShard:
        def gather(t: Tensor | None, how: Callable[[Tensor], Tensor]) -> Tensor | None:
            return None if t is None else how(t)

        rows, ids = self.shards.gather, self.shards.all_ids
        return KeyShard(
            keys=gather(mine.keys, rows),
            bias=gather(mine.bias, rows),
            stats=gather(mine.stats, rows),
            exclude=gather(mine.exclude, ids),
            keep=gather(mine.keep, ids),
        )

    def run(
        self, loaded: KeyShard, visit: Visit, neutral: Tensor | None, merge: Merge
    ) -> Tensor | None:
        shards = self.shards
        results = None
        for block in self._joined():
            result = visit(block.rows, block.own, loaded.part(block.keys))
            if neutral is not None and results is None:
                results = _place(result, block.keys, neutral, shards.total)
            elif results is not None and result is not None:
                results[block.keys] = result
        if results is None or shards.world == 1:
            return results
        own, others = shards.sizes[shards.rank], range(shards.world)
        sent = [size if self._meets(shards.rank, s) else 0 for s, size in enumerate(shards.sizes)]
        received = [own if self._meets(other, shards.rank) else 0 for other in others]
        if sum(sent) < shards.total:
            parts = zip(results.split(shards.sizes), sent, strict=True)
            results = torch.cat([part[:size] for part, size in parts])
        arrived = all_to_all(results, received, sent, shards.group)
        count = sum(self._meets(other, shards.rank) for other in others)
        return reduce(merge, arrived.view(count, own, len(known(neutral))).unbind())

    def _meets(self, rank: int, shard: int) -> bool:
        steps = (rank - shard) % self.shards.world
        return steps <= self.shards.world // 2 or not self.symmetric

    def _joined(self) -> list[Block]:
        """The blocks with keys counted over all ranks; neighbours of the same rows become one."""
        joined: list[Block] = []
        for block in sorted(self.blocks):
            start = self.shards.starts[block.shard]
            keys = slice(start + block.keys.start, start + block.keys.stop)
            last = joined[-1] if joined else None
            if last and (last.rows, last.own, last.keys.stop) == (
                block.rows, block.own, keys.start
            ):  # fmt: skip
                joined[-1] = last._replace(keys=slice(last.keys.start, keys.stop))
            else:
                joined.append(block._replace(keys=keys))
        return joined


class Ring(Exchange):
    """Keys go from each rank to the next, and results after them; the last rank sends them home.

    The next keys arrive while the present ones are used: a rank holds two shards of keys, and two
    of results.
    """

    def run(
        self, loaded: KeyShard, visit: Visit, neutral: Tensor | None, merge: Merge
    ) -> Tensor | None:
        shards, last = self.shards, len(self.blocks) - 1
        mine = transfer = None
        for step, block in enumerate(self.blocks):
            keys = None
            if step < last:
                size = shards.sizes[self.blocks[step + 1].shard]
                keys = _Transfer(shards, [t for t in loaded if t is not None], 1, size)
            result = visit(block.rows, block.own, loaded.part(block.keys))
            if neutral is not None:
                results = _place(result, block.keys, neutral, shards.sizes[block.shard])
                del result  # may be as large as a shard
                if step == 0:
                    mine = results  # stays at home, those of other ranks join it at the end
                else:
                    if transfer is not None:
                        results = merge(transfer.wait().pop(), results)
                    if step < last:
                        transfer = _Transfer(shards, [results], 1, size)
                    else:
                        transfer = _Transfer(shards, [results], -last, shards.sizes[shards.rank])
                del results
            if keys is not None:
                arrived = iter(keys.wait())
                loaded = KeyShard(*(None if t is None else next(arrived) for t in loaded))
        return mine if transfer is None else merge(known(mine), transfer.wait()[0])


class _Transfer:
    """Tensors on their way to the rank `steps` further, and `rows` rows of each from behind."""

    def __init__(self, shards: Shards, tensors: list[Tensor], steps: int, rows: int) -> None:
        from torch.distributed import P2POp, batch_isend_irecv, get_global_rank, irecv, isend

        group = shards.group
        target, source = (
            get_global_rank(group, (shards.rank + sign * steps) % shards.world) for sign in (1, -1)
        )
        self.sent = [t.contiguous() for t in tensors]  # kept until they have left
        self.received = [t.new_empty(rows, *t.shape[1:]) for t in tensors]
        # an empty message is not sent: both ends know the sizes
        ops = [P2POp(isend, t, target, group) for t in self.sent if t.numel()]
        ops += [P2POp(irecv, t, source, group) for t in self.received if t.numel()]
        self.works = batch_isend_irecv(ops) if ops else []

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        self.sent.clear()
        return self.received


def choose(shards: Shards, keys: Tensor, rows: int, symmetric: bool) -> Exchange:
    """The exchange asked for; "auto" gathers up to GATHERED_BYTES of keys on each rank."""
    size = shards.total * keys.shape[1] * keys.element_size()
    ring = shards.exchange == "ring" or (shards.exchange == "auto" and size > GATHERED_BYTES)
    return (Ring if ring else Gather)(shards, rows, symmetric)
