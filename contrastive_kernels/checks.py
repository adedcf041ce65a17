"""Checks of what users pass: each raises an error that names the argument, what it must be and what
came. A public function calls them once; what it calls checks nothing again.

`whole=False`: there may be no rows, as in a rank's part of a batch.
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from .autograd import in_transform
from .sources import NegativeSource, as_source, is_source
from .types import FLOATS, IdPair, OwnKeys, statistics_dtype

_UNSORTED = (torch.bool, torch.uint16, torch.uint32, torch.uint64)
REDUCTIONS = ("mean", "sum", "none")
_SHAPES = {1: "(N,)", 2: "(N, D)", 3: "(N, M, D)", 4: "(N, T, S, D)"}


def check_features(name: str, x: Any, dims: tuple[int, ...], *, whole: bool = True) -> None:
    """Raise unless `x` is a non-empty floating tensor with one of the given numbers of dims."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one: pass its values() or pad it"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}: call to_dense()")
    _check_dtype(name, x.dtype)
    if x.dim() not in dims:
        wanted = " or ".join(_SHAPES[d] for d in dims)
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
    if (whole and x.shape[0] == 0) or x.shape[-1] == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")


def check_keys(name: str, keys: Any, dims: tuple[int, ...], *, whole: bool = True) -> None:
    """`check_features`, or raise unless a source has shape (M, D), not empty, and a dtype."""
    if not is_source(keys):
        return check_features(name, keys, dims, whole=whole)
    _check_dtype(name, keys.dtype)
    shape = tuple(keys.shape)
    if len(shape) != 2:
        raise ValueError(f"{name} in chunks must have shape (M, D), got {shape}")
    if (whole and shape[0] == 0) or shape[1] == 0:
        raise ValueError(f"{name} must not be empty, got shape {shape}")


def check_pair(x: Tensor, y: Tensor | NegativeSource, x_name: str = "x", y_name: str = "y") -> None:
    """Raise unless features `x` (N, D) and `y` (..., D) fit: device, dtype family and D.

    Chunks of a source may be on any device.
    """
    if isinstance(y, Tensor) and x.device != y.device:
        raise ValueError(
            f"{x_name} and {y_name} must be on one device, got {x.device} and {y.device}"
        )
    if x.dtype != y.dtype and torch.float64 in (x.dtype, y.dtype):
        raise TypeError(
            f"{x_name} and {y_name} must both be float64 or neither, "
            f"got {_short(x.dtype)} and {_short(y.dtype)}"
        )
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{x_name} and {y_name} must have the same number of features D, "
            f"got {x.shape[-1]} and {y.shape[-1]}"
        )


def check_same_rows(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    """Raise unless `x` and `y` have as many rows."""
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{x_name} and {y_name} must have the same number of rows, "
            f"got {x.shape[0]} and {y.shape[0]}"
        )


def check_views(x_name: str, x: Tensor, y_name: str, y: Tensor, *, whole: bool = True) -> int:
    """Raise unless `x` and `y` are features of one shape (N, D) that fit; return N."""
    check_features(x_name, x, (2,), whole=whole)
    check_features(y_name, y, (2,), whole=whole)
    check_pair(x, y, x_name, y_name)
    check_same_rows(x_name, x, y_name, y)
    return x.shape[0]


def check_negatives(
    query: Tensor,
    negatives: Tensor | NegativeSource,
    dims: tuple[int, ...] = (2, 3),
    *,
    whole: bool = True,
) -> int:
    """Raise unless `negatives` (M, D) or (N, M, D) fit `query` (N, D); return M, which may be 0 too
    with `whole=False`."""
    check_keys("negatives", negatives, dims, whole=whole)
    check_pair(query, negatives, "query", "negatives")
    if whole and negatives.shape[-2] == 0:
        raise ValueError(f"negatives must not be empty, got shape {tuple(negatives.shape)}")
    if len(negatives.shape) == 3 and negatives.shape[0] != query.shape[0]:
        raise ValueError(
            f"negatives of shape (N, M, D) must have N = {query.shape[0]} as query has, "
            f"got {tuple(negatives.shape)}"
        )
    return negatives.shape[-2]


def check_own(
    query: Tensor, negatives: Any, mask: Any, per_query: Any, *, whole: bool = True
) -> Tensor | NegativeSource | OwnKeys:
    """`negatives` as `as_source` has them, with `check_negatives`; or as `OwnKeys`, where a mask
    (N, M) or numbers (N,) say which of them are those of a query; or raise."""
    if mask is None and per_query is None:
        negatives = as_source("negatives", negatives)
        check_negatives(query, negatives, whole=whole)
        return negatives
    if mask is not None and per_query is not None:
        raise ValueError(
            "negatives_mask and negatives_per_query must not both be given: the one is for "
            "negatives of shape (N, M, D), the other for (total, D)"
        )
    name, dims = ("negatives_mask", 3) if per_query is None else ("negatives_per_query", 2)
    if not isinstance(negatives, Tensor) or negatives.dim() != dims:
        wanted = "(N, M, D)" if per_query is None else "(total, D), in one tensor"
        got = tuple(negatives.shape) if isinstance(negatives, Tensor) else type(negatives).__name__
        raise ValueError(f"{name} needs negatives of shape {wanted}, got {got}")
    if per_query is None:
        m = check_negatives(query, negatives, (3,), whole=whole)
        return OwnKeys(negatives, mask=check_mask(name, mask, (query.shape[0], m), query.device))
    check_features("negatives", negatives, (2,), whole=False)
    check_pair(query, negatives, "query", "negatives")
    total = negatives.shape[0]
    counts = check_numbers(name, per_query, query.shape[:1], total, query.device)
    return OwnKeys(negatives, counts=counts)


def check_mask(
    name: str, mask: Any, shape: tuple[int, ...], device: torch.device, of: str = "a negative"
) -> Tensor:
    """Raise unless `mask` is a bool tensor of the shape, True where `of` counts; return it."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = _short(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, True where {of} counts, got {got}")
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    check_device(name, mask, device)
    return mask


def check_numbers(
    name: str,
    numbers: Any,
    shape: tuple[int, ...],
    total: int,
    device: torch.device,
    of: str = "negatives",
) -> Tensor:
    """Raise unless `numbers` (N,) are integers >= 0 that sum to `total`, the rows of `of`; return
    them as int64."""
    if not isinstance(numbers, Tensor) or numbers.dtype == torch.bool:
        got = "bool" if isinstance(numbers, Tensor) else type(numbers).__name__
        raise TypeError(f"{name} must be an integer tensor, got {got}")
    numbers = check_ids(name, numbers, shape).long()
    check_device(name, numbers, device)
    if in_transform() and torch._C._functorch.is_batchedtensor(numbers):
        raise NotImplementedError(f"{name} must be the same for all problems of a vmap")
    fits = (numbers >= 0).all() & (numbers.sum() == total)
    if numbers.is_cpu and not torch.compiler.is_compiling():
        if not fits:
            raise ValueError(
                f"{name} must be >= 0 and sum to the {total} rows of {of}, got "
                f"{_some(numbers)}, which sum to {int(numbers.sum())}"
            )
    elif not numbers.is_meta:  # without waiting for the device
        torch._assert_async(fits, f"{name} must be >= 0 and sum to the number of {of}")
    return numbers


def check_device(name: str, t: Tensor, device: torch.device) -> None:
    """Raise unless `t` is on the device."""
    if t.device != device:
        raise ValueError(f"{name} must be on {device}, got {t.device}")


def check_other_rows(name: str, rows: int) -> None:
    """Raise when a batch has no other row to take negatives from."""
    if rows < 2:
        raise ValueError(
            f"{name} must have at least 2 rows: a batch of one has no negatives (drop_last=True of "
            "a DataLoader leaves out a last batch of one)"
        )


def check_ids(name: str, ids: Any, shape: tuple[int, ...]) -> Tensor:
    """`ids`, as int64 if torch cannot sort them, or raise unless they are integers or bools of the
    given shape."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor, got {got}")
    if ids.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(ids.shape)}")
    return ids.long() if ids.dtype in _UNSORTED else ids


def check_id_pair(name: str, pair: Any, rows: int, keys: int, device: torch.device) -> IdPair:
    """`pair` with `check_ids` of both, one tensor where it is one; or raise unless it is (row_ids
    (rows,), col_ids (keys,)) on the device."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (row_ids, col_ids), got {type(pair).__name__}")
    checked = []
    for which, ids, size in (("row_ids", pair[0], rows), ("col_ids", pair[1], keys)):
        checked.append(check_ids(f"{name}: {which}", ids, (size,)))
        check_device(f"{name}: {which}", ids, device)
    if len({ids.dtype == torch.uint64 for ids in pair}) > 1:  # which may be beyond the others
        raise TypeError(
            f"{name}: row_ids and col_ids must both be uint64 or neither, got {pair[0].dtype} and "
            f"{pair[1].dtype}"
        )
    return checked[0], checked[0] if pair[0] is pair[1] else checked[1]


def check_vector(name: str, values: Any, size: int) -> None:
    """Raise unless `values` is a tensor (size,)."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if values.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(values.shape)}")


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is a finite number above 0."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor; pass a learned one as scale=")
    if not 0 < value < math.inf:  # torch.compile cannot trace math.isfinite here
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise unless `value` is a finite number with low <= value < high."""
    if not low <= value < high:  # false for nan
        limits = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g})"
        raise ValueError(f"{name} must be a finite number {limits}, got {value}")


def check_reduction(reduction: str) -> None:
    """Raise unless `reduction` is one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def finite(name: str, value: float) -> float:
    """`value`, or raise unless it is a finite number."""
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value


@overload
def scalar(name: str, value: float) -> float: ...


@overload
def scalar(name: str, value: Tensor) -> Tensor: ...


@overload
def scalar(name: str, value: float | Tensor) -> float | Tensor: ...


def scalar(name: str, value: float | Tensor) -> float | Tensor:
    """`value` as a finite number or a 0-d tensor, of float32 or float64: what uses it several times
    then rounds its gradient once."""
    if not isinstance(value, Tensor):
        return finite(name, value)
    if value.numel() != 1:
        raise ValueError(
            f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}"
        )
    return value.reshape(()).to(statistics_dtype(value))


def resolve_scale(temperature: float, scale: float | Tensor | None = None) -> float | Tensor:
    """The factor on similarities: `scale` if given, else 1 / temperature."""
    if scale is not None:
        return scalar("scale", scale)
    check_positive("temperature", temperature)
    return 1.0 / temperature


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {_short(dtype)}"
        )


def _some(numbers: Tensor) -> str:
    """The first few numbers."""
    few = numbers[:8].tolist()
    return f"[{', '.join(map(str, few))}{', ...' if len(numbers) > len(few) else ''}]"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
