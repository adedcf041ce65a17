"""The kernels of late interaction, for ops/max_sim.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu  # type: ignore[attr-defined]  # compiled
from ..types import statistics_dtype
from .operands import address, contiguous, matrix

LARGEST = 2**31 - 1  # tokens, whose numbers are of 32 bits


def max_sim(
    x: Tensor,
    y: Tensor,
    x_ends: Tensor,
    y_ends: Tensor,
    x_kept: Tensor | None,
    y_kept: Tensor | None,
    own: int,
    temperature: float,
    normalize: bool,
    zeros: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs, _held = _pairs(x, y, x_ends, y_ends, x_kept, y_kept, own, temperature, normalize, zeros)
    shape = (own or y_ends.shape[0], x.shape[0])
    dtype = statistics_dtype(x)
    scores = x.new_empty(x_ends.shape[0], shape[0], dtype=dtype)
    winners = x.new_empty((0,) if temperature else shape, dtype=torch.int32)
    values = x.new_empty(shape if temperature else (0,), dtype=dtype)
    if x_kept is not None:  # those of tokens that do not count are not written
        values.fill_(-torch.inf)
    _cpu.max_sim(pairs, *_state(winners, values, temperature), scores.data_ptr())
    return scores, winners, values


def max_sim_backward(
    x: Tensor,
    y: Tensor,
    x_ends: Tensor,
    y_ends: Tensor,
    x_kept: Tensor | None,
    y_kept: Tensor | None,
    own: int,
    temperature: float,
    normalize: bool,
    zeros: bool,
    winners: Tensor,
    values: Tensor,
    grad: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    pairs, _held = _pairs(x, y, x_ends, y_ends, x_kept, y_kept, own, temperature, normalize, zeros)
    slots, dtype = own or y_ends.shape[0], statistics_dtype(x)
    for name, t, shape in (
        ("grad", grad, (x_ends.shape[0], slots)),
        ("values", values, (slots, x.shape[0]) if temperature else (0,)),
        ("winners", winners, (0,) if temperature else (slots, x.shape[0])),
    ):
        if t.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
    grad, values = contiguous(grad, dtype), contiguous(values, dtype)
    winners = contiguous(winners, torch.int32)
    dx = x.new_empty(x.shape if needs[0] else (0,))
    if x_kept is not None:
        dx.zero_()
    dy = y.new_empty(y.shape if needs[1] else (0,))
    _cpu.max_sim_backward(
        pairs, *_state(winners, values, temperature), grad.data_ptr(),
        *(t.data_ptr() if need else 0 for t, need in zip((dx, dy), needs, strict=True)),
    )  # fmt: skip
    return dx, dy


def _state(winners: Tensor, values: Tensor, temperature: float) -> tuple[int, int]:
    return (0, values.data_ptr()) if temperature else (winners.data_ptr(), 0)


def _pairs(
    x: Tensor,
    y: Tensor,
    x_ends: Tensor,
    y_ends: Tensor,
    x_kept: Tensor | None,
    y_kept: Tensor | None,
    own: int,
    temperature: float,
    normalize: bool,
    zeros: bool,
) -> tuple[tuple, tuple]:
    """What `_cpu` takes, and the tensors that it has addresses of; raises for what does not fit."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(f"x and y must have shape (T, D), got {list(x.shape)} and {list(y.shape)}")
    if x.dtype is not y.dtype and torch.float64 in (x.dtype, y.dtype):
        raise TypeError(f"x and y must both be float64 or neither, got {x.dtype} and {y.dtype}")
    if max(x.shape[0], y.shape[0]) > LARGEST:
        raise ValueError(f"tokens must be at most {LARGEST}, got {x.shape[0]} and {y.shape[0]}")
    if own and y_ends.shape[0] != own * x_ends.shape[0]:
        raise ValueError(f"y_ends must have {own * x_ends.shape[0]} entries, got {len(y_ends)}")
    sides, held = [], []
    for name, tokens, ends, kept in (("x", x, x_ends, x_kept), ("y", y, y_ends, y_kept)):
        if ends.dim() != 1 or ends.shape[0] == 0:
            raise ValueError(f"{name}_ends must be (sets,), not empty, got {list(ends.shape)}")
        ends = contiguous(ends, torch.int64)
        if kept is not None:
            if kept.shape != tokens.shape[:1]:
                raise ValueError(f"{name}_kept must have shape {list(tokens.shape[:1])}")
            kept = contiguous(kept, torch.bool)
        sides.append((matrix(tokens), ends.data_ptr(), ends.shape[0], address(kept)))
        held += [ends, kept]
    return (*sides, own, temperature, normalize, zeros), tuple(held)
