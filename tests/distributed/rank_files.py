"""Negatives in chunks over ranks: files of which each reads its part, and what goes wrong."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from faults import message
from oracles import randn
from torch import Tensor

import contrastive_kernels as ck

SIZES, M, D = (4, 0, 3), 11, 5  # rows of each rank; of the file
N = sum(SIZES)
IDS = (torch.arange(N) % 3, torch.arange(N + M) % 4)
BIAS = randn(N + M, seed=7)
LOSSES: dict[str, dict[str, Any]] = {
    "info_nce": {"loss": "info_nce"},
    "info_nce, in batch, ids, learned bias": {
        "loss": "info_nce", "in_batch": True, "exclude": IDS, "key_bias": BIAS,
    },
    "info_nce, rows": {"loss": "info_nce", "reduction": "none"},
    "eqco": {"loss": "eqco"},
    "cacr": {"loss": "cacr"},
    "cacr, not normalised": {"loss": "cacr", "normalize": False},
    "cacr, rbf": {"loss": "cacr", "cost": "rbf"},
}  # fmt: skip


def own(sizes: tuple[int, ...]) -> slice:
    rank = dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def inputs(rows: slice) -> dict[str, Tensor]:
    made = {"query": randn(N, D, seed=1)[rows], "key": randn(N, D, seed=2)[rows]}
    made["scale"] = torch.tensor(3.0, dtype=torch.float64)
    return {name: t.requires_grad_() for name, t in made.items()}


def evaluate(name: str, rows: slice, negatives: Any, **options) -> dict[str, Tensor]:
    """The loss, its statistics, and the gradients of all inputs."""
    options = LOSSES[name] | options
    loss = getattr(ck, options.pop("loss"))
    leaves = inputs(rows)
    given = (leaves["query"], leaves["key"])
    if loss is ck.cacr:
        del leaves["scale"]
    else:
        options["scale"] = leaves["scale"]
    for which in ("exclude", "key_bias") if "key_bias" in options else ():
        t = options[which]
        batch, more = (t[1] if which == "exclude" else t).split([N, M])
        candidates = torch.cat((batch[rows], more))
        options[which] = (t[0][rows], candidates) if which == "exclude" else candidates
    if "key_bias" in options:
        leaves["bias"] = options["key_bias"] = options["key_bias"].requires_grad_()
    value, stats = loss(*given, negatives=negatives, return_stats=True, **options)
    # rows have the gradients of rows: the mean that one process takes is made here
    total = value if value.dim() == 0 else value.sum() / N
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = {"loss": value.detach(), **dict(zip(leaves, grads, strict=True))}
    return found | {f: t for f, t in stats._asdict().items() if t is not None}


def compare(name: str, backend: str, negatives: Any, whole: Any, **options) -> dict[str, float]:
    """Errors of what this rank has, against one process."""
    rows, world = own(SIZES), dist.get_world_size()
    wanted = evaluate(name, slice(0, N), whole, backend="reference")
    got = evaluate(name, rows, negatives, backend=backend, group="world", **options)
    errors = {}
    for field, expected in wanted.items():
        found, factor = got[field], 1.0
        if field in ("query", "key"):
            expected = expected[rows]
            factor = world if wanted["loss"].dim() == 0 else 1.0
        elif field in ("scale", "bias"):
            if field == "bias":  # of this rank's keys, and of all of the file
                batch, more = found.split([rows.stop - rows.start, M])
                found = torch.cat((found.new_zeros(N), more))
                found[rows] = batch
            dist.all_reduce(found)
            factor = world if wanted["loss"].dim() == 0 else 1.0
        elif expected.dim():
            expected = expected[rows]
        errors[field] = 0.0
        if expected.numel():
            errors[field] = (found / factor - expected).abs().max().item()
    return errors


def bank(folder: str, rows: int = M, **options) -> ck.FileNegatives:
    """A file that every rank has for itself."""
    path = os.path.join(folder, f"{rows}.{dist.get_rank()}")
    if not os.path.exists(path):
        ck.write_negatives(path, [randn(rows, D, seed=3)])
    return ck.FileNegatives(path, **options)


def losses(folder: str, backends: tuple[str, ...]) -> dict[str, dict[str, float]]:
    keys, report = randn(M, D, seed=3), {}
    part = [keys[1:2], keys[:1], keys[2:]][dist.get_rank()]  # not equally many
    for name in LOSSES:
        for backend in backends:
            file = bank(folder, chunk_rows=2)
            compared = compare(name, backend, file, keys, sharded_negatives=True)
            report[f"{name}, {backend}, sharded"] = compared
            report[f"{name}, {backend}, everywhere"] = compare(name, backend, file, keys)
    for name in ("info_nce", "cacr"):
        listed = compare(name, backends[0], list(part.split(3)), keys, sharded_negatives=True)
        report[f"{name}, lists"] = listed
        small = bank(folder, 2)  # fewer rows than ranks
        few = randn(2, D, seed=3)
        report[f"{name}, few"] = compare(name, backends[0], small, few, sharded_negatives=True)
        mine = bank(folder).part(*((0, 3), (3, 3), (3, M))[dist.get_rank()])
        report[f"{name}, parts"] = compare(name, backends[0], mine, keys, sharded_negatives=True)
    return report


def half_precision(folder: str) -> float:
    """Largest error of gradients in bfloat16, relative to the largest entry: they are summed over
    ranks and chunks before they are rounded, once."""
    keys = randn(M, D, seed=3).bfloat16()
    path = os.path.join(folder, f"half.{dist.get_rank()}")
    ck.write_negatives(path, [keys])
    rows = own(SIZES)
    query, key = (randn(N, D, seed=s).bfloat16() for s in (1, 2))
    mine = query[rows].clone().requires_grad_()
    negatives = ck.FileNegatives(path, chunk_rows=2)
    loss = ck.info_nce(mine, key[rows], negatives=negatives, group="world", sharded_negatives=True)
    exact = query.double().requires_grad_()
    whole = ck.info_nce(exact, key.double(), negatives=keys.double(), backend="reference")
    (found,), (wanted,) = (torch.autograd.grad(t, x) for t, x in ((loss, mine), (whole, exact)))
    error = found.double() / dist.get_world_size() - wanted[rows]
    return error.abs().max().item() / wanted.abs().max().item() if error.numel() else 0.0


def reading(folder: str) -> dict[str, int]:
    """Rows of the file, and bytes that this process reads, in a step."""
    rows: list[int] = []
    file = bank(folder, 4001, progress=lambda done, _: rows.append(done))
    query, key = (randn(3, D, seed=s).requires_grad_() for s in (1, 2))

    def rchar() -> int:
        counters = Path("/proc/self/io").read_text()
        return int(counters.partition("rchar: ")[2].split()[0])

    before = rchar()
    loss = ck.info_nce(query, key, negatives=file, group="world", sharded_negatives=True)
    loss.backward()
    return {"rows": max(rows), "passes": rows.count(0), "bytes": rchar() - before}


def errors(folder: str) -> dict[str, tuple[str, float]]:
    """What each rank sees, and after how long, where the file of rank 1 alone is not right."""
    odd = dist.get_rank() == 1
    x, y = randn(4, D, seed=1), randn(4, D, seed=2)

    def call(file: Any, loss: Any = ck.info_nce, **options) -> str:
        return message(loss, x, y, negatives=file, group="world", **options)

    def changed(how: str, **options) -> str:
        path = os.path.join(folder, f"{how}.{dist.get_rank()}")
        ck.write_negatives(path, [randn(M, D, seed=3)])
        file = ck.FileNegatives(path, chunk_rows=2)
        if odd and how == "longer":
            ck.write_negatives(path, [x], append=True)
        if odd and how == "shorter":
            os.truncate(path, 40 * (M - 1))
        if odd and how == "gone":
            os.remove(path)
        if odd and how == "under way":
            file.progress = lambda done, _: os.utime(path, ns=(0, done))
        return call(file, **options)

    def raised(done: int, rows: int) -> None:
        if odd and done == 4:
            raise OSError("the disk is gone")

    class Short:  # of rank 1, by a chunk
        shape, dtype = (M, D), torch.float64

        def __iter__(self):
            yield randn(M - odd, D, seed=3)

    sharded = {"sharded_negatives": True}
    calls = {
        "longer": lambda: changed("longer", **sharded),
        "shorter": lambda: changed("shorter", **sharded),
        "under way": lambda: changed("under way", **sharded),
        "gone": lambda: changed("gone"),
        "raised": lambda: call(bank(folder, chunk_rows=2, progress=raised)),
        "source": lambda: call(Short(), ck.cacr),
        "rows": lambda: call(bank(folder, 9 if odd else M), **sharded),
        "dtype": lambda: call([x.bfloat16()] if odd else [x], **sharded),
        "kind": lambda: call([x] if odd else bank(folder), **sharded),
        "after all": lambda: call(bank(folder), **sharded),
    }
    report = {}
    for name, one in calls.items():
        start = time.perf_counter()
        report[name] = one(), time.perf_counter() - start
    return report


def everything(folder: str, backends: tuple[str, ...]) -> dict[str, Any]:
    """All that one start of the processes computes."""
    return {
        "losses": losses(folder, backends),
        "half": half_precision(folder) if "cpu" in backends else 0.0,
        "reading": reading(folder),
        "errors": errors(folder),
    }
