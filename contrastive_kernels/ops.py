"""The primitives: validation, choice of backend, and registered operators.

Every loss is algebra on `sweep` (softmax statistics of the rows and columns of a similarity
matrix that is never stored), `softplus_sweep` (row sums of softplus) and `row_dot` (the positives).
The registered operators are `contrastive_kernels::row_stats_<backend>`, `row_softplus_<backend>`
and `row_dot_<backend>`; their schemas live in `registration.py`. `backend="reference"` runs the
dense functions of `reference.py`, which autograd differentiates, twice if need be.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import chunks, reference, registration
from .backends import unusable_reason
from .reference import SoftplusSweep, Sweep
from .registration import statistics_dtype
from .sources import FLOATS, NegativeSource, is_source

if TYPE_CHECKING:
    from .distributed import Shards

IdPair = tuple[Tensor, Tensor]


class RowStats(NamedTuple):
    """Softmax statistics of each row: lse (N,), mean (N,)."""

    lse: Tensor
    mean: Tensor


class RowColumnStats(NamedTuple):
    """Softmax statistics of each row (N,) and of each column (M,)."""

    lse: Tensor
    mean: Tensor
    col_lse: Tensor
    col_mean: Tensor


def available_backends(device: str = "cpu") -> list[str]:
    """Names of the backends that can run on `device` here, the dense reference first."""
    names = ("reference", "cpu", "triton")
    return [name for name in names if unusable_reason(name, device) is None]


def resolve_backend(
    backend: str, device: torch.device, kernels: tuple[str, ...] = ("cpu", "triton")
) -> str:
    """The backend that runs on `device`: the fastest usable one for "auto", else the one named.

    An explicit name never falls back. `kernels`: the backends that the operation has kernels of.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend cannot run here; the message lists every reason.
    """
    if backend == "reference":
        return backend
    preferred = "cpu" if device.type == "cpu" else "triton"
    if backend == "auto":
        return preferred if unusable_reason(preferred, device.type) is None else "reference"
    if backend not in ("cpu", "triton", "cuda"):
        raise ValueError(
            'backend must be "auto", "reference", "cpu", "triton" or "cuda", got ' + repr(backend)
        )
    reason = unusable_reason(backend, device.type)
    if backend not in kernels:
        reason = "; ".join(filter(None, ("it has no kernels for this operation", reason)))
    if reason is not None:
        raise RuntimeError(f'backend="{backend}" cannot run on {device.type} tensors: {reason}')
    return backend


def check_features(name: str, x: Tensor, dims: tuple[int, ...], *, rows: bool = True) -> None:
    """Raise unless `x` is a non-empty floating tensor with one of the given numbers of dims.

    `rows=False`: it may have no rows, as a rank's part of a batch.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    _check_dtype(name, x.dtype)
    if x.dim() not in dims:
        shapes = {1: "(N,)", 2: "(N, D)", 3: "(N, M, D)"}
        wanted = " or ".join(shapes[d] for d in dims)
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
    if (rows and x.shape[0] == 0) or x.shape[-1] == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")


def check_keys(
    name: str, keys: Tensor | NegativeSource, dims: tuple[int, ...], *, rows: bool = True
) -> None:
    """`check_features`, or raise unless a source has shape (M, D), not empty, and a dtype."""
    if not is_source(keys):
        return check_features(name, keys, dims, rows=rows)
    _check_dtype(name, keys.dtype)
    shape = tuple(keys.shape)
    if len(shape) != 2:
        raise ValueError(f"{name} in chunks must have shape (M, D), got {shape}")
    if 0 in shape:
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
            f"got {_dtype(x.dtype)} and {_dtype(y.dtype)}"
        )
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{x_name} and {y_name} must have the same number of features D, "
            f"got {x.shape[-1]} and {y.shape[-1]}"
        )


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless `ids` is an integer tensor of the given shape."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor, got {got}")
    if ids.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(ids.shape)}")


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is a finite number above 0."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor; pass a learned one as scale=")
    if not 0 < value < math.inf:  # torch.compile cannot trace math.isfinite here
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


def sweep(
    x: Tensor,
    y: Tensor | NegativeSource | None,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    normalize: bool = False,
    mean: bool = False,
    columns: bool = False,
    threshold: Tensor | None = None,
    backend: str = "auto",
    shards: Shards | None = None,
) -> Sweep:
    """Softmax statistics of z_ij = scale <x_i, y_j> + bias_j in one sweep; see `row_stats`.

    Beyond `row_stats`: y = None means y = x, computed for half of the pairs; `mean=False` leaves
    the mean out; `threshold` (N,) asks for rank_i = #{j: z_ij > threshold_i}, total_i = sum_j z_ij
    and count_i, the number of kept pairs, all without gradient. Fields not asked for are None.
    `shards`: y, bias and col_ids are this rank's part of those of a group, of `shards.sizes` rows;
    statistics of rows are over the keys of all ranks, and those of this rank's columns over the
    rows of all.
    """
    scale, bias = _check_sweep(x, y, scale, bias, exclude, keep, threshold, shards)
    streamed = is_source(y)
    if columns and y is not None and (streamed or y.dim() == 3):
        got = "in chunks" if streamed else "of shape (N, M, D)"
        raise ValueError(f"columns=True needs keys of shape (M, D), got a y {got}")
    chosen = resolve_backend(backend, x.device)
    if streamed:
        return chunks.sweep(y, x, scale, bias, exclude, keep, threshold, normalize, mean, chosen)
    if shards is not None:
        return shards.sweep(
            x, y, scale, bias, exclude, keep, threshold, normalize, mean, columns, chosen
        )
    if chosen == "reference":
        with full_precision(x):
            return reference.sweep(
                x, y, scale=scale, bias=bias, exclude=exclude, keep=keep, normalize=normalize,
                mean=mean, columns=columns, threshold=threshold,
            )  # fmt: skip
    if y is None and (bias is not None or columns or not _same_ids(exclude, keep)):
        y = x  # not a symmetric matrix any more
    # the weighted mean of the keys is the gradient of the queries: take it in the same sweep
    attend = (
        y is not None
        and y.dim() == 2
        and not (mean or columns)
        and torch.is_grad_enabled()
        and x.requires_grad
        and registration.can_attend(
            chosen, x, y, not (y.requires_grad or (bias is not None and bias.requires_grad))
        )
    )
    both = y is not None  # the ids of a self-similarity serve rows and columns
    out = registration.row_stats(chosen)(
        x, y, scale, bias, *_ids(exclude, both), *_ids(keep, both), threshold, mean, normalize,
        columns, attend,
    )  # fmt: skip
    asked = (True, mean, columns, columns and mean, *(3 * (threshold is not None,)))
    return Sweep(*(t if wanted else None for t, wanted in zip(out[:7], asked, strict=True)))


def softplus_sweep(
    x: Tensor,
    y: Tensor | NegativeSource | None,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    normalize: bool = False,
    threshold: Tensor | None = None,
    summed: bool = False,
    backend: str = "auto",
    shards: Shards | None = None,
) -> SoftplusSweep:
    """Row sums of softplus, with the further options of `sweep`; see `row_softplus`.

    `summed`: value is the sum over the rows too, 0-d, which leaves backends more freedom.
    """
    keys = x if y is None else y
    streamed = is_source(keys)
    if not isinstance(bias, Tensor):
        bias = None if bias == 0 else torch.full(
            (), _finite("bias", bias), dtype=statistics_dtype(x), device=x.device
        )  # fmt: skip
    if bias is not None and bias.dim() == 0 and shards is None and not streamed:
        bias = bias.expand(keys.shape[-2])
    scale, bias = _check_sweep(x, keys, scale, bias, exclude, keep, threshold, shards)
    chosen = resolve_backend(backend, x.device)
    if streamed:
        out = chunks.softplus_sweep(
            keys, x, scale, bias, exclude, keep, threshold, normalize, chosen
        )
    elif shards is not None:
        out = shards.softplus_sweep(
            x, keys, scale, bias, exclude, keep, threshold, normalize, chosen
        )
    elif chosen == "reference":
        bias = 0.0 if bias is None else bias
        with full_precision(x):
            out = reference.softplus_sweep(
                x, keys, scale=scale, bias=bias, exclude=exclude, keep=keep, normalize=normalize,
                threshold=threshold,
            )  # fmt: skip
    else:
        attend = [False] * 4
        if summed and threshold is None and keys.dim() == 2 and torch.is_grad_enabled():
            if registration.can_sum(chosen):
                attend = [t is not None and t.requires_grad for t in (x, keys, scale, bias)]
        values = registration.row_softplus(chosen)(
            x, keys, scale, bias, *_ids(exclude), *_ids(keep), threshold, normalize, attend
        )
        monitors = values[1:4] if threshold is not None else 3 * (None,)
        out = SoftplusSweep(values[0], *monitors)
    return out._replace(value=out.value.sum()) if summed else out


def keeps_frozen_keys(x: Tensor, y: Tensor, backend: str = "auto") -> bool:
    """Whether the backward of `sweep` reads keys y (M, D) without gradient again, so that they
    must not change before it."""
    chosen = resolve_backend(backend, x.device)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return False
    return chosen == "reference" or not registration.can_attend(chosen, x, y, frozen=True)


def row_dot(
    x: Tensor,
    y: Tensor,
    *,
    normalize: bool = False,
    backend: str = "auto",
    shards: Shards | None = None,
) -> Tensor:
    """<x_i, y_i> for y (N, D), giving (N,), or <x_i, y_ik> for y (N, K, D), giving (N, K).

    With `normalize` every row is first divided by its norm (at least 1e-12). The result is
    float32, or float64 for float64 features. With `shards` a rank may have no rows.
    """
    check_features("x", x, (2,), rows=shards is None)
    check_features("y", y, (2, 3), rows=shards is None)
    check_pair(x, y)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"x and y must have the same number of rows, got {x.shape[0]} and {y.shape[0]}"
        )
    chosen = resolve_backend(backend, x.device)
    if x.shape[0] == 0:  # the graph of the other ranks, with no rows
        return (x.view(0, *(y.dim() - 2) * (1,), x.shape[1]) * y).sum(-1, dtype=statistics_dtype(x))
    if chosen == "reference":
        with full_precision(x):
            return reference.row_dot(x, y, normalize=normalize)
    if y.dim() == 3:
        return registration.row_dot(chosen)(x, y, normalize)
    return registration.row_dot(chosen)(x, y.unsqueeze(1), normalize).squeeze(1)


def row_stats(
    x: Tensor,
    y: Tensor | NegativeSource,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    columns: bool = False,
    normalize: bool = False,
    backend: str = "auto",
) -> RowStats | RowColumnStats:
    """Softmax statistics of the rows, and on request the columns, of a similarity matrix.

    z_ij = scale <x_i, y_j> + bias_j,   lse_i = log sum_j exp(z_ij),
    mean_i = sum_j exp(z_ij - lse_i) z_ij, over the pairs that are kept. The matrix is never
    stored: memory grows with N + M. Differentiable once in x, y, scale and bias; with
    `backend="reference"` any number of times.

    Args:
        x: queries (N, D); float32, float64, bfloat16 or float16, any strides.
        y: keys (M, D), or (N, M, D): keys of its own for every query; or (M, D) in chunks, a
            `NegativeSource`, without gradient. Pass the same tensor as `x` for a self-similarity:
            it then costs half.
        scale: a number or a 0-d tensor, which may need a gradient.
        bias: (M,), added to every logit of key j.
        exclude: integer ids (row_ids (N,), col_ids (M,)); pairs with equal ids are dropped.
        keep: integer ids likewise; only pairs with equal ids are kept.
        columns: also return col_lse and col_mean (M,), the same statistics of each column.
        normalize: divide rows of x and y by their L2 norm (at least 1e-12) first.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        RowStats(lse, mean), each (N,), or RowColumnStats(lse, mean, col_lse, col_mean); float32,
        or float64 for float64 features. A row with no pair has lse = -inf, mean = 0 and no
        gradient.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a `backend` that cannot run here.
    """
    out = sweep(
        x, None if y is x else y, scale=scale, bias=bias, exclude=exclude, keep=keep,
        normalize=normalize, mean=True, columns=columns, backend=backend,
    )  # fmt: skip
    return RowColumnStats(*out[:4]) if columns else RowStats(*out[:2])


def row_softplus(
    x: Tensor,
    y: Tensor | NegativeSource,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Row sums of softplus: value_i = sum_j log(1 + exp(scale <x_i, y_j> + bias_j)), (N,).

    Arguments as in `row_stats`; `bias` is a number, a 0-d tensor or (M,), and may need a gradient.
    A row with no pair has value 0.
    """
    return softplus_sweep(
        x, y, scale=scale, bias=bias, exclude=exclude, keep=keep, normalize=normalize,
        backend=backend,
    ).value  # fmt: skip


def _check_sweep(
    x: Tensor,
    y: Tensor | NegativeSource | None,
    scale: float | Tensor,
    bias: Tensor | None,
    exclude: IdPair | None,
    keep: IdPair | None,
    threshold: Tensor | None,
    shards: Shards | None,
) -> tuple[Tensor, Tensor | None]:
    check_features("x", x, (2,), rows=shards is None)
    if y is not None:
        check_keys("y", y, (2, 3), rows=shards is None)
        check_pair(x, y)
        if len(y.shape) == 3 and y.shape[0] != x.shape[0]:
            raise ValueError(
                f"y of shape (N, M, D) must have one set of keys for each of the {x.shape[0]} "
                f"rows of x, got {tuple(y.shape)}"
            )
        if y.shape[-2] == 0 and shards is None:
            raise ValueError(f"y must not be empty, got shape {tuple(y.shape)}")
    rows, keys = x.shape[0], (x if y is None else y).shape[-2]
    dtype = statistics_dtype(x)
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(
                f"scale must be a number or a tensor of one element, got shape {tuple(scale.shape)}"
            )
        scale = scale.reshape(()).to(device=x.device, dtype=dtype)
    else:
        scale = torch.full((), _finite("scale", scale), dtype=dtype, device=x.device)
    if bias is not None:
        for_all = bias.dim() == 0 and (shards is not None or is_source(y))
        if bias.shape != (keys,) and not for_all:
            raise ValueError(f"bias must have shape ({keys},), got {tuple(bias.shape)}")
        bias = bias.to(device=x.device, dtype=dtype)
    for name, pair in (("exclude", exclude), ("keep", keep)):
        if pair is not None:
            _check_ids(name, pair, rows, keys, x.device)
    if threshold is not None and threshold.shape != (rows,):
        raise ValueError(f"threshold must have shape ({rows},), got {tuple(threshold.shape)}")
    return scale, bias


def _check_ids(name: str, pair: IdPair, rows: int, keys: int, device: torch.device) -> None:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (row_ids, col_ids), got {type(pair).__name__}")
    for which, ids, size in (("row_ids", pair[0], rows), ("col_ids", pair[1], keys)):
        check_ids(f"{name}: {which}", ids, (size,))
        if ids.device != device:
            raise ValueError(f"{name}: {which} must be on {device}, got {ids.device}")


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast off: what a half input gains is speed, and the primitives compute in float32."""
    return torch.autocast(x.device.type, enabled=False)


def _same_ids(*pairs: IdPair | None) -> bool:
    return all(pair is None or pair[0] is pair[1] for pair in pairs)


def _ids(pair: IdPair | None, both: bool = True) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if pair is None else (pair[0], pair[1] if both else None)


def _finite(name: str, value: float) -> float:
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {_dtype(dtype)}"
        )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
