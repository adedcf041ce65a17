"""Runs a function in several processes of a group, for the tests of distributed losses."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


def run(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60,
    backend: str = "gloo",
    before: Callable[[], Any] | None = None,
) -> list[Any]:
    """function(*args) in each of `world` processes of one group: their results, by rank.

    `before` runs once, in the process that ranks are forked from: for imports that only they need.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, folder, timeout, backend, function, args)
        if backend == "nccl":  # a process that has met CUDA cannot become others
            start_processes(_start, arguments, world)
        else:
            _parent().submit(_fork, before, *arguments).result()
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(world)]


@cache
def _parent() -> ProcessPoolExecutor:
    """A process that stays: what takes long to import is imported there once, and not by ranks."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def _fork(before: Callable[[], Any] | None, world: int, *arguments: Any) -> None:
    import torch._dynamo  # noqa: F401  the first call of a loss with a group would

    torch.set_num_threads(1)
    if before is not None:
        before()
    start_processes(_start, (world, *arguments), world, start_method="fork")


def _start(
    rank: int, world: int, folder: str, timeout: float, backend: str, function, args
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    os.environ["CK_TEST_RESULT"] = result = str(Path(folder, str(rank)))
    torch.save(function(*args), result)
    try:
        dist.destroy_process_group()
    except RuntimeError:  # a test that lets a rank die
        pass
