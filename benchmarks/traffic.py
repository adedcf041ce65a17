"""What a distributed loss sends and holds on each rank, counted on paper; docs/distributed.md.

`python -m benchmarks.traffic` prints the table. The tests compare `sent` with what is really given
to torch.distributed at W = 2, 3 and 4.
"""

from __future__ import annotations

from typing import NamedTuple

RECORD = 24  # bytes: what `join` tells of a rank
STATISTIC = {2: 4, 4: 4, 8: 8}  # bytes of a statistic, by those of a feature
MERGED = 8  # and of one that parts merge into, in float64


class Step(NamedTuple):
    """Forward and backward of one loss with n rows of `dim` features on each of W ranks."""

    world: int
    n: int
    dim: int
    itemsize: int = 4  # bytes of a feature
    exchange: str = "gather"
    symmetric: bool = False  # rows against themselves, as NT-Xent's 2N
    columns: bool = False  # both directions, as CLIP's

    @property
    def hops(self) -> int:
        """How many other ranks' keys a rank meets."""
        return self.world // 2 if self.symmetric else self.world - 1

    def sent(self) -> int:
        """Bytes a rank sends, to one other rank after the other."""
        others, stat = self.world - 1, STATISTIC[self.itemsize]
        keys = self.n * self.dim * self.itemsize
        small = others * (RECORD + stat)  # sizes, and the sum of the losses
        column = MERGED * self.n * (self.columns or self.symmetric)
        results = self.hops * (column + self.n * self.dim * stat)  # log-sum-exps, gradients
        statistics = 2 * column  # in the backward: the log-sum-exp and its gradient
        if self.exchange == "gather":
            return small + others * (keys + statistics) + results
        return small + self.hops * (2 * keys + statistics + self.ids) + results

    @property
    def ids(self) -> int:
        """Bytes of the ids that exclude the positives, forward and backward."""
        return 2 * 4 * self.n

    def held(self) -> int:
        """Bytes of keys and of their gradients, sent and arriving, at the peak of the backward."""
        stat = STATISTIC[self.itemsize]
        if self.exchange == "gather":
            return self.world * self.n * self.dim * (self.itemsize + 2 * stat)
        return 2 * self.n * self.dim * (self.itemsize + 2 * stat)

    def collectives(self) -> int:
        """How many transfers a step waits for."""
        columns = self.columns or self.symmetric
        if self.exchange == "gather":
            return 2 + 1 + 1 + 2 * columns
        return 2 + (2 + 1 + columns) * self.hops


def amount(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def table() -> str:
    """CLIP with 512 bfloat16 features, by the size of the batch and the number of ranks."""
    lines = ["| batch | W | rows per rank | gather: holds | sends | ring: holds | sends |"]
    lines.append("|" + 7 * "---|")
    for batch in (2**15, 2**18, 2**22):
        for world in (8, 64, 1024):
            cells = [f"{batch:,}", f"{world}", f"{batch // world:,}"]
            for exchange in ("gather", "ring"):
                step = Step(world, batch // world, 512, 2, exchange, columns=True)
                cells += [amount(step.held()), amount(step.sent())]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
