"""Negatives in a file over ranks, against one process: time, and what each reads.

`python -m benchmarks.rank_files` writes the file, then takes turns in the same processes: rank 0
alone with all queries and all of the file, while the others wait, and all ranks with their part of
both. A rank has one thread, beside the one that reads ahead. Loss and gradient of the queries, of
bfloat16 features; the file is in the system's cache if that holds it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes

import contrastive_kernels as ck

DIM, QUERIES = 128, 256


class Cost(NamedTuple):
    """Of one step of this process: seconds by the clock and of the processor, bytes read."""

    wall: float
    cpu: float
    read: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2**24)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured(options.rows, options.ranks, options.rounds, Path(folder))


def measured(rows: int, ranks: int, rounds: int, folder: Path) -> dict[str, float]:
    """Ratios of a round, of all ranks to one, by the fields of Cost; prints what they are of."""
    ck.write_negatives(folder / "bank", blocks(rows))
    start_processes(run, (ranks, str(folder), rounds), ranks, start_method="spawn")
    return json.loads((folder / "ratios").read_text())


def blocks(rows: int) -> Iterator[Tensor]:
    block = torch.randn(2**16, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    for start in range(0, rows, len(block)):
        yield block[: rows - start]


def run(rank: int, ranks: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    bank = ck.FileNegatives(Path(folder, "bank"))
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(QUERIES, DIM, generator=generator).bfloat16() for _ in range(2)]
    mine = [t.chunk(ranks)[rank] for t in whole]

    def alone() -> Tensor:
        return step(whole, bank)

    def together() -> Tensor:
        return step(mine, bank, group="world", sharded_negatives=True)

    losses, found = {}, {"alone": [], "together": []}  # type: ignore[var-annotated]
    for _ in range(rounds):
        dist.barrier()
        if rank == 0:
            losses["alone"] = measure(alone, found["alone"])
        dist.barrier()
        losses["together"] = measure(together, found["together"])
    costs: list = [None] * ranks
    dist.all_gather_object(costs, found["together"])
    dist.destroy_process_group()
    if rank == 0:
        ratios = report(bank, ranks, losses, found["alone"], costs)
        Path(folder, "ratios").write_text(json.dumps(ratios))


def step(features: list[Tensor], bank: ck.FileNegatives, **options) -> Tensor:
    query, key = features
    query = query.clone().requires_grad_()
    loss = ck.info_nce(query, key, negatives=bank, temperature=0.1, **options)
    loss.backward()
    return loss.detach()


def measure(call: Callable[[], Tensor], costs: list[Cost]) -> float:
    before = time.perf_counter(), time.process_time(), rchar()
    loss = call()
    after = time.perf_counter(), time.process_time(), rchar()
    costs.append(Cost(*(b - a for a, b in zip(before, after, strict=True))))  # type: ignore[arg-type]
    return loss.item()


def rchar() -> int:
    """Bytes that this process has read so far, from the disk or the system's cache."""
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


def report(
    bank: ck.FileNegatives, ranks: int, losses: dict, alone: list[Cost], costs: list[list[Cost]]
) -> dict[str, float]:
    print(f"{bank.shape[0]:,} rows of {DIM} bfloat16, {QUERIES} queries, {os.cpu_count()} cores")
    print(f"losses: {losses['alone']:.7f} alone, {losses['together']:.7f} on {ranks} ranks")
    slowest = [max(each, key=lambda cost: cost.wall) for each in zip(*costs, strict=True)]
    ratios = {}
    for field in Cost._fields:
        one = [getattr(cost, field) for cost in alone]
        each = [getattr(cost, field) for cost in slowest]
        ratio = ratios[field] = median(b / a for a, b in zip(one, each, strict=True))
        print(
            f"{field}: median {median(one):,.2f} alone, {median(each):,.2f} of the slowest rank, "
            f"ratio of a round {ratio:.3f}; least {min(one):,.2f} and {min(each):,.2f}, ratio "
            f"{min(each) / min(one):.3f}"
        )
    return ratios


if __name__ == "__main__":
    main()
