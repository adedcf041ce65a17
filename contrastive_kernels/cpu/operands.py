"""Tensors as `_cpu` takes them: checked, in the types it reads, as addresses, sizes and strides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import statistics_dtype

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # tile.h
_NO_IDS = (0, 0, False)
Matrix = tuple[int, int, int, int, int, int]


class Operands(NamedTuple):
    """What a sweep is over, of `rows` rows and `keys` keys for each.

    pairs: the tuple that `_cpu` takes. held: the tensors it has addresses of, in its types.
    own_keys: 0, or the keys that each row has for itself. like: some tensor of the type of
    statistics.
    """

    pairs: tuple
    held: tuple
    rows: int
    keys: int
    own_keys: int
    together: bool
    like: Tensor


def operands(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude_rows: Tensor | None,
    exclude_cols: Tensor | None,
    keep_rows: Tensor | None,
    keep_cols: Tensor | None,
    normalize: bool,
    together: bool = False,
) -> Operands:
    """Raises ValueError or TypeError for what does not fit."""
    check_features(x, x if y is None else y)
    if scale.numel() != 1:
        raise ValueError(f"scale must have one element, got {list(scale.shape)}")
    dtype = statistics_dtype(x)
    rows, own_keys = x.shape[0], 0
    more = None
    if together:  # the rows of both, with themselves
        if y is None or y.dim() != 2 or y.dtype != x.dtype:
            raise ValueError("together takes y (M, D) of the dtype of x, row ids only, and no bias")
        rows += y.shape[0]
        more, y = y, None
    keys = rows
    if y is None:
        if not (bias is exclude_cols is keep_cols is None):
            raise ValueError("a self-similarity (y absent) takes row ids only, and no bias")
        exclude_cols, keep_cols = exclude_rows, keep_rows  # ids serve both sides
    else:
        keys = y.shape[-2]
        if y.dim() == 3:
            own_keys, y = keys, y.reshape(-1, y.shape[2])
    bias = optional(bias, "bias", keys, dtype)
    exclude, exclude_held = _ids("exclude", exclude_rows, exclude_cols, rows, keys)
    keep, keep_held = _ids("keep", keep_rows, keep_cols, rows, keys)
    pairs = (
        matrix(x), None if more is None else matrix(more), None if y is None else matrix(y),
        own_keys, scale.item(), address(bias), exclude, keep, normalize,
    )  # fmt: skip
    held = (x, more, y, bias, exclude_held, keep_held)
    like = x if x.dtype is dtype else x.new_empty(0, dtype=dtype)
    return Operands(pairs, held, rows, keys, own_keys, together, like)


def check_features(x: Tensor, y: Tensor) -> None:
    """That y are keys for x, shared or of each row."""
    n, m = x.shape, y.shape
    if len(n) != 2:
        raise ValueError(f"x must have shape (N, D), got {list(n)}")
    if len(m) != 2 and (len(m) != 3 or m[0] != n[0]):
        raise ValueError(f"y must have shape (M, D) or (N, M, D), got {list(m)}")
    if n[1] != m[-1]:
        raise ValueError(f"x and y must have the same D, got {n[1]} and {m[-1]}")
    if 0 in n or 0 in m:
        raise ValueError(f"x and y must not be empty, got {list(n)} and {list(m)}")
    if x.dtype is not y.dtype and torch.float64 in (x.dtype, y.dtype):
        raise TypeError(f"x and y must both be float64 or neither, got {x.dtype} and {y.dtype}")


def _ids(
    name: str, rows: Tensor | None, cols: Tensor | None, n: int, m: int
) -> tuple[tuple[int, int, bool], tuple | None]:
    if rows is None or cols is None:
        return _NO_IDS, None
    dtype = torch.int32 if rows.dtype is cols.dtype is torch.int32 else torch.int64
    shared = rows is cols and n == m
    rows = vector(rows, f"{name}_rows", n, dtype)
    cols = rows if shared else vector(cols, f"{name}_cols", m, dtype)
    return (rows.data_ptr(), cols.data_ptr(), dtype is torch.int32), (rows, cols)


def optional(t: Tensor | None, name: str, size: int, dtype: torch.dtype) -> Tensor | None:
    """`vector`, if there is one."""
    return None if t is None else vector(t, name, size, dtype)


def vector(t: Tensor, name: str, size: int, dtype: torch.dtype) -> Tensor:
    """A vector that must have `size` values, one after the other, in a type that `_cpu` reads."""
    if t.shape != (size,):
        raise ValueError(f"{name} must have shape ({size}), got {list(t.shape)}")
    return contiguous(t, dtype)


def contiguous(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype and t.is_contiguous() else t.to(dtype).contiguous()


def matrix(t: Tensor) -> Matrix:
    """Features (N, D) of any strides."""
    code = DTYPES.get(t.dtype)
    if code is None:
        raise TypeError(f"features must be float32, float64, bfloat16 or float16, got {t.dtype}")
    return (t.data_ptr(), *t.shape, *t.stride(), code)


def address(t: Tensor | None) -> int:
    """0 for None."""
    return 0 if t is None else t.data_ptr()


class OwnRows(NamedTuple):
    """What products of rows with keys of their own are over, as `Operands` is."""

    arguments: tuple[Matrix, Matrix, int, int, bool]
    held: tuple
    dtype: torch.dtype


def own_rows(x: Tensor, y: Tensor, ends: Tensor | None, normalize: bool) -> OwnRows:
    """Raises ValueError or TypeError for what does not fit."""
    check_features(x, y)
    if (ends is None) == (y.dim() == 2):
        raise ValueError(f"y must have shape (N, K, D), or (T, D) with ends, got {list(y.shape)}")
    keys = 0
    if ends is None:
        keys, y = y.shape[1], y.reshape(-1, y.shape[2])
    else:
        if ends.dim() != 1 or ends.shape[0] != x.shape[0]:
            raise ValueError(f"ends must have shape ({x.shape[0]}), got {list(ends.shape)}")
        if ends.dtype != torch.int64 or not ends.is_contiguous():
            raise TypeError("ends must be contiguous int64")
    arguments = (matrix(x), matrix(y), keys, address(ends), normalize)
    return OwnRows(arguments, (x, y, ends), statistics_dtype(x))
