"""Every primitive on every engine of this machine against float64: `info --check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import engines
from .backends import unusable_reason
from .ops import row_dot, row_softplus, row_stats, top_k
from .whitening import whiten

ROWS, KEYS, DIM = 129, 67, 40
ENGINES = {"cpu": "cpu", "triton": "cuda"}  # the device of each
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _statistics(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return torch.cat(row_stats(x, y, scale=scale, bias=bias, **options))


def _softplus(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return row_softplus(x, y, scale=scale, bias=bias.mean(), **options)


def _own_pairs(x: Tensor, *_others: Tensor, backend: str) -> Tensor:
    return row_dot(x[:KEYS], x[-KEYS:], normalize=True, backend=backend)


def _frozen_keys(x: Tensor, y: Tensor, scale: Tensor, _bias: Tensor, **options: Any) -> Tensor:
    return row_stats(x, y.detach(), scale=scale, **options).lse


def _nearest(x: Tensor, y: Tensor, *_others: Tensor, backend: str) -> Tensor:
    return top_k(x, y, 3, backend=backend).values


def _whiten(x: Tensor, *_others: Tensor, method: str, backend: str) -> Tensor:
    # whose kernels "auto" picks
    return whiten(x, method=method, backend="reference" if backend == "reference" else "auto")


def cases(device: str) -> dict[str, Callable[..., Tensor]]:
    """Functions of x (ROWS, DIM), y (KEYS, DIM), scale () and bias (KEYS,), and `backend`."""
    ids = torch.arange(ROWS, device=device) % 5, torch.arange(KEYS, device=device) % 7
    return {
        "row_stats": _statistics,
        "row_stats of rows and columns": partial(_statistics, columns=True),
        "row_stats without pairs of equal ids": partial(_statistics, exclude=ids),
        "row_stats of frozen keys": _frozen_keys,
        "row_softplus": _softplus,
        "row_dot": _own_pairs,
        "top_k": _nearest,
        **{f"whiten by {m}": partial(_whiten, method=m) for m in ("cholesky", "zca")},
        "whiten by newton_schulz": partial(_whiten, method="newton_schulz"),
    }


def inputs(dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, DIM), (KEYS, DIM), (), (KEYS,)
    x, y, scale, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    scale = 8 + scale
    return [x.to(device, dtype), y.to(device, dtype), scale.to(device), bias.to(device)]


def value_and_gradients(
    function: Callable[..., Tensor], given: list[Tensor], backend: str
) -> list[Tensor]:
    given = [t.detach().requires_grad_() for t in given]
    value = function(*given, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(value.shape, generator=generator).to(value)
    gradients = torch.autograd.grad(value, given, upstream, allow_unused=True)
    return [value.detach(), *(g for g in gradients if g is not None)]


def fault(function: Callable[..., Tensor], given: list[Tensor], engine: str) -> str | None:
    """What is wrong with a primitive on an engine, or None: its error may be twice that of dense
    torch in the same dtype, plus rounding."""
    try:
        got = value_and_gradients(function, given, engine)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    dense = value_and_gradients(function, given, "reference")
    exact = value_and_gradients(function, [t.double() for t in given], "reference")
    for place, (ours, theirs, oracle) in enumerate(zip(got, dense, exact, strict=True)):
        rounding = torch.finfo(ours.dtype).eps * _size(oracle) + torch.finfo(torch.float64).eps
        limit = 2 * _size(theirs.double() - oracle).nan_to_num(0.0) + 64 * rounding
        error = _size(ours.double() - oracle)
        if not error <= limit:  # NaN is not
            what = f"gradient {place}" if place else "value"
            return f"the error of its {what} is {error:.2e}, at most {limit:.2e} is allowed"
    return None


def faults() -> Iterator[tuple[str, str | None]]:
    """(title, fault) of every primitive, engine that is usable here, and dtype."""
    for engine, device in ENGINES.items():
        if unusable_reason(engine, device) is not None or not _is_there(device):
            continue
        for dtype in DTYPES:
            given = inputs(dtype, device)
            for name, function in cases(device).items():
                title = f"{name}, {engine}, {str(dtype).removeprefix('torch.')}"
                yield title, fault(function, given, engine)


def of_hopper(record: bool) -> Iterator[tuple[str, str | None]]:
    """The same of the engine for Hopper, on such a GPU; its result can be recorded."""
    if unusable_reason("triton", "cuda") is not None or not _is_there("cuda"):
        return
    device = torch.device("cuda", torch.cuda.current_device())
    if engines.is_hopper(device):
        found = import_module("contrastive_kernels.triton.hopper_check").fault(device)
        if record and found is None:
            engines.record(device)
        yield "sweeps, engine for Hopper", found


def _is_there(device: str) -> bool:
    return device == "cpu" or torch.cuda.is_available()


def _size(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
