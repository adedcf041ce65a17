"""Runs a function in several processes of a group, for the tests of distributed losses."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
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
) -> list[Any]:
    """function(*args) in each of `world` processes of one group: their results, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_start, (world, folder, timeout, backend, function, args), world)
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(world)]


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
