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
    except (ValueError, TypeError, RuntimeError, OSError) as error:
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
        "transform": lambda: torch.func.grad(lambda x: ck.nt_xent(x, y, group=group))(x),
        "tangent": lambda: torch.func.jvp(lambda x: ck.nt_xent(x, y, group=group), (x,), (y,)),
        "no rows": lambda: ck.mnrl(x[:0], x[:0], group=group),
        "after all": lambda: ck.nt_xent(x, y, group=group),
    }
    return {name: message(call) for name, call in calls.items()}


def errors() -> dict[str, tuple[str, float]]:
    """What each rank sees, and after how long, of arguments that only rank 1 has wrong."""
    odd, group = dist.get_rank() == 1, dist.group.WORLD
    x, y = randn(4, 5, seed=1), randn(4, 5, seed=2)
    queue, loss = ck.FeatureQueue(8, 5, group=group), ck.NCE(num_data=9, group=group)
    views = torch.stack((x, y)).repeat(1, 2, 1)[..., :2]
    calls = {
        "shape": lambda: ck.nt_xent(x, y[:3] if odd else y, group=group),
        "type": lambda: ck.clip_loss(x.tolist() if odd else x, y, 2.0, group=group),
        "missing": lambda: ck.clip_loss(*((x, y) if odd else (x, y, 2.0)), group=group),
        "option": lambda: ck.info_nce(x, y, temperature=0.0 if odd else 1.0, group=group),
        "reduction": lambda: ck.mnrl(x, [y], reduction="avg" if odd else "sum", group=group),
        "exchange": lambda: ck.gist(x, y, x, y, exchange="ring" if odd else "auto", group=group),
        "weight": lambda: ck.dcl(x, y, weight=torch.ones(3 if odd else 8), group=group),
        "module": lambda: loss(x, y, y[:, :2] if odd else y),
        "covariance": lambda: ck.w_mse(0 * views if odd else views, group_size=8, group=group),
        "queue": lambda: queue.enqueue(x[:, :2] if odd else x),
        "after all": lambda: ck.nt_xent(x, y, group=group),
    }

    def timed(call) -> tuple[str, float]:
        start = time.perf_counter()
        return message(call), time.perf_counter() - start

    return {name: timed(call) for name, call in calls.items()}


def everything() -> dict[str, dict]:
    return {"differences": differences(), "errors": errors()}


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
