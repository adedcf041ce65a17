"""A slow link: a transfer arrives late, and the computation of a block takes longer still."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from oracles import randn

import contrastive_kernels as ck
from contrastive_kernels.distributed import call, exchange, shards
from contrastive_kernels.ops import pairs

DELAY, COMPUTE = 0.05, 0.06  # seconds, of a transfer and of a block


class Link:
    """Counts its transfers, those that nothing was computed meanwhile, and seconds of waiting."""

    def __init__(self) -> None:
        self.transfers = self.idle = self.blocks = 0
        self.waited = 0.0

    def send(self) -> Callable[[], None]:
        """Sends something; what is returned waits for it."""
        self.transfers += 1
        arrival, blocks = time.monotonic() + DELAY, self.blocks

        def wait() -> None:
            left = max(0.0, arrival - time.monotonic())
            time.sleep(left)
            self.waited += left
            self.idle += self.blocks == blocks

        return wait


@contextmanager
def slow(link: Link):
    """Transfers go over `link`, and blocks take COMPUTE."""
    send = dist.batch_isend_irecv

    def late(collective: Callable) -> Callable:
        def call(*args: Any) -> Any:
            link.send()()
            return collective(*args)

        return call

    class Work:
        def __init__(self, works: list[dist.Work]) -> None:
            self.works, self.arrive = works, link.send()

        def wait(self) -> None:
            self.arrive()
            for work in self.works:
                work.wait()

    def computing(block: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            time.sleep(COMPUTE)
            link.blocks += 1
            return block(*args, **options)

        return call

    with (
        mock.patch.object(call, "all_gather", late(call.all_gather)),
        mock.patch.object(shards, "all_gather", late(shards.all_gather)),
        mock.patch.object(exchange, "all_to_all", late(exchange.all_to_all)),
        mock.patch.object(dist, "batch_isend_irecv", lambda ops: [Work(send(ops))]),
        mock.patch.object(pairs, "softmax", computing(pairs.softmax)),
        mock.patch.object(pairs, "softmax_backward", computing(pairs.softmax_backward)),
    ):
        yield


def everything() -> dict[str, tuple[int, int, float]]:
    """(transfers, those that a rank only waited for, seconds of waiting) of a step of CLIP."""
    report = {}
    for name in ("gather", "ring"):
        x, y = (randn(4, 5, seed=s).requires_grad_() for s in (1, 2))
        link = Link()
        with slow(link):
            ck.clip_loss(x, y, 5.0, group=dist.group.WORLD, exchange=name).backward()
        report[name] = link.transfers, link.idle, link.waited
    return report
