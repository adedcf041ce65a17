"""The kernels of rows and what belongs to each, for ops/row_operators.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu  # type: ignore[attr-defined]  # compiled
from ..types import statistics_dtype
from .operands import OwnRows, contiguous, matrix, own_rows, vector


def row_distance(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    rows = own_rows(x, y, None, normalize)
    out = x.new_empty(y.shape[:-1], dtype=rows.dtype)
    _cpu.row_distance(*_without_ends(rows), out.data_ptr())
    return out


def row_distance_backward(
    x: Tensor, y: Tensor, distance: Tensor, grad: Tensor, normalize: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    rows = own_rows(x, y, None, normalize)
    for name, t in (("distance", distance), ("grad", grad)):
        if t.shape != y.shape[:-1]:
            raise ValueError(f"{name} must have shape {list(y.shape[:-1])}, got {list(t.shape)}")
    distance, grad = contiguous(distance, rows.dtype), contiguous(grad, rows.dtype)
    dx = x.new_empty(x.shape) if needs[0] else x.new()
    dy = y.new_empty(y.shape) if needs[1] else y.new()
    _cpu.row_distance_backward(
        *_without_ends(rows), distance.data_ptr(), grad.data_ptr(), dx.data_ptr(), dy.data_ptr()
    )
    return dx, dy


def class_dot(x: Tensor, place: Tensor, normalize: bool) -> Tensor:
    place = _places(x, place)
    out = x.new_empty(x.shape[0], dtype=statistics_dtype(x))
    _cpu.class_dot(matrix(x), place.data_ptr(), normalize, out.data_ptr())
    return out


def class_dot_backward(
    x: Tensor, place: Tensor, grad: Tensor, normalize: bool, into: Tensor | None = None
) -> Tensor:
    """`into`: a contiguous gradient of x, to which this one is added."""
    place = _places(x, place)
    grad = vector(grad, "grad", x.shape[0], statistics_dtype(x))
    dx = x.new_empty(x.shape) if into is None else into
    _cpu.class_dot_backward(
        matrix(x), place.data_ptr(), normalize, grad.data_ptr(), dx.data_ptr(), into is not None
    )
    return dx


def _without_ends(rows: OwnRows) -> tuple:
    x, y, keys, _, normalize = rows.arguments
    return x, y, keys, normalize


def _places(x: Tensor, place: Tensor) -> Tensor:
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"x must have shape (N, D) and not be empty, got {list(x.shape)}")
    return vector(place, "place", x.shape[0], torch.int32)
