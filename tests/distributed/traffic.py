"""Counts what a rank gives to torch.distributed, and measures what it holds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import interpreted
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from oracles import randn
from torch import Tensor

import contrastive_kernels as ck

ROWS, DIM = 6, 5
LOSSES: dict[str, Callable] = {
    "clip_loss": lambda x, y, **options: ck.clip_loss(x, y, 5.0, **options),
    "siglip_loss": lambda x, y, **options: ck.siglip_loss(x, y, 5.0, -3.0, **options),
    "nt_xent": lambda x, y, **options: ck.nt_xent(x, y, **options),
}


@contextmanager
def counted(world: int, rank: int):
    """[bytes this rank sends, collectives it takes part in], of all that is sent meanwhile."""
    counts = [0, 0]

    def counting(original, sent: Callable[..., int]):
        def call(*args, **options):
            counts[0] += sent(*args)
            counts[1] += 1
            return original(*args, **options)

        return call

    def to_others(rows: Tensor, received: list[int], sent: list[int], group) -> int:
        row = rows.nbytes // max(1, rows.shape[0])
        return row * (sum(sent) - sent[rank])

    def messages(ops: list[dist.P2POp]) -> int:
        return sum(op.tensor.nbytes for op in ops if op.op is dist.isend)

    name = "all_gather_single" if hasattr(collectives, "all_gather_single") else "all_gather_tensor"
    gather = counting(getattr(collectives, name), lambda t, *_: (world - 1) * t.nbytes)
    exchange = counting(collectives.all_to_all_single, to_others)
    sends = counting(dist.batch_isend_irecv, messages)
    with (
        mock.patch.object(collectives, name, gather),
        mock.patch.object(collectives, "all_to_all_single", exchange),
        mock.patch.object(dist, "batch_isend_irecv", sends),
    ):
        yield counts


def everything() -> dict[tuple[str, str, int], list[int]]:
    """[bytes, collectives] of forward and backward, by loss, exchange and size of a feature."""
    report = {}
    for name, loss in LOSSES.items():
        for exchange in ("gather", "ring"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                x, y = (randn(ROWS, DIM, seed=s, dtype=dtype).requires_grad_() for s in (1, 2))
                with counted(dist.get_world_size(), dist.get_rank()) as counts:
                    loss(x, y, group=dist.group.WORLD, exchange=exchange).backward()
                report[name, exchange, x.element_size()] = counts
    return report


def under_autocast() -> list[int]:
    """The same of float32 features for Triton, under autocast to bfloat16, round the ring."""
    interpreted.prepare_once()
    x, y = (randn(ROWS, DIM, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    options = {"group": dist.group.WORLD, "exchange": "ring", "backend": "triton"}
    with counted(dist.get_world_size(), dist.get_rank()) as counts:
        with torch.autocast("cpu", torch.bfloat16):
            loss = ck.clip_loss(x, y, 5.0, **options)
        loss.backward()
    return counts


def peak(rows: int, dim: int, exchange: str) -> tuple[float, int]:
    """(loss, bytes by which forward and backward raise the peak of this process)."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is freed goes back, and counts no more
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(dist.get_rank()))
    y = x.roll(1, 1).requires_grad_()
    x.requires_grad_()
    small = [t.detach()[:64].clone().requires_grad_() for t in (x, y)]
    options = {"group": dist.group.WORLD, "exchange": exchange}
    ck.clip_loss(*small, 10.0, **options).backward()  # what is made once
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before = _status("VmRSS")
    loss = ck.clip_loss(x, y, 10.0, **options)
    loss.backward()
    return loss.item(), _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
