"""What each rank sees when another one does something else, or is gone."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from oracles import randn

import contrastive_kernels as ck


def message(function, *args, **options) -> str:
    try:
        function(*args, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def differences() -> dict[str, str]:
    """Rank 1 differs from the others in one thing at a time."""
    odd, group = dist.get_rank() == 1, dist.group.WORLD
    x, y = randn(3, 5, seed=1), randn(3, 5, seed=2)
    wide = randn(3, 6) if odd else x
    half = x.float() if odd else x
    leaf = x.clone().requires_grad_() if odd else x
    calls = {
        "dtype": lambda: ck.clip_loss(half, half, 2.0, group=group),
        "features": lambda: ck.nt_xent(wide, wide, group=group),
        "option": lambda: ck.nt_xent(x, y, temperature=0.2 if odd else 0.1, group=group),
        "gradient": lambda: ck.clip_loss(leaf, y, 2.0, group=group),
        "negatives": lambda: ck.info_nce(x, y, negatives=x[: 2 if odd else 3], group=group),
        "loss": lambda: (ck.dcl if odd else ck.nt_xent)(x, y, group=group),
        "exchange": lambda: ck.nt_xent(x, y, group=group, exchange="ring" if odd else "gather"),
        "documents": lambda: ck.mnrl(x, x.repeat(2 if odd else 1, 1), group=group),
        "no rows": lambda: ck.mnrl(x[:0], x[:0], group=group),
        "after all": lambda: ck.nt_xent(x, y, group=group),
    }
    return {name: message(call) for name, call in calls.items()}


def never_comes(folder: str) -> tuple[str, float]:
    """Rank 1 stays away until the others have given up."""
    done = os.path.join(folder, "done")
    if dist.get_rank() == 1:
        while not os.path.exists(done):
            time.sleep(0.05)
        return "away", 0.0
    start, x = time.perf_counter(), torch.ones(3, 5)
    seen = message(ck.nt_xent, x, x, group=dist.group.WORLD), time.perf_counter() - start
    open(done, "w").close()
    return seen


def dies_before_backward() -> tuple[str, float]:
    """Rank 1 leaves between forward and backward."""
    x = torch.randn(3, 5).requires_grad_()
    loss = ck.clip_loss(x, x, 2.0, group=dist.group.WORLD)
    if dist.get_rank() == 1:
        torch.save(("gone", 0.0), os.environ["CK_TEST_RESULT"])
        os._exit(0)
    start = time.perf_counter()
    return message(loss.backward), time.perf_counter() - start
