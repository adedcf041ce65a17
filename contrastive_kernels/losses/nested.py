"""Losses at several prefixes of the features at once (Matryoshka)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..checks import check_features, finite
from ..ops import can_nest
from ..sources import as_source, prefix_of
from ..types import LossStats

P = ParamSpec("P")
R = TypeVar("R")
Given = dict[str, Any]


def nested(
    *features: str, fuses: Callable[[Given], bool] = lambda given: True, swept: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a loss with options `dims` and `weights`; `features` are the arguments that have
    prefixes.

    Where one sweep can serve all prefixes, for arguments that it `fuses`, the loss gets `dims` in
    ascending order, the last one D, and their weights, makes sweeps with these `ends` and
    `weigh`s what comes of them. Elsewhere it is called for each prefix, without dims. A loss that
    is not `swept` makes its own products, of all prefixes on every backend but "reference".
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = list(inspect.signature(function).parameters)

        @wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            if options.get("dims") is None and options.get("weights") is None:
                return function(*args, **options)
            given: Given = {**dict(zip(names, args, strict=False)), **options}
            dims, weights = given.pop("dims", None), given.pop("weights", None)
            plain = cast(Callable[..., Any], function)
            first = given.get(features[0])
            check_features(features[0], first, (2,), whole=False)
            size = cast(Tensor, first).shape[1]
            ends, weights = check_dims(features[0], size, dims, weights)
            if any(found != size for name in features for found in _sizes(given.get(name))):
                return cast(R, plain(**given))  # which says so
            if not (_can_nest(given, cast(Tensor, first), ends, swept) and fuses(given)):
                parts = [plain(**_narrowed(given, features, end, size)) for end in ends]
                return cast(R, _total(parts, weights))
            longest = _narrowed(given, features, ends[-1], size)
            if not given.get("return_stats"):
                return cast(R, plain(**longest, dims=ends, weights=weights))
            value = plain(**{**longest, "return_stats": False}, dims=ends, weights=weights)
            with torch.no_grad():
                return cast(R, (value, plain(**longest)[1]))

        return call

    return decorate


def check_dims(
    name: str, size: int, dims: Any, weights: Any
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(dims in ascending order, their weights), or raise unless they are prefixes of the `size`
    features of `name`."""
    if dims is None:
        raise ValueError("weights needs dims, whose losses they are of")
    if not isinstance(dims, Sequence) or not all(type(d) is int for d in dims):
        raise TypeError(f"dims must be a sequence of whole numbers, got {dims!r}")
    if not dims:
        raise ValueError("dims must have at least one entry, got none")
    if min(dims) < 1 or max(dims) > size:
        raise ValueError(f"dims must be from 1 to the {size} features of {name}, got {dims}")
    if len(set(dims)) < len(dims):
        raise ValueError(f"dims must differ from each other, got {dims}")
    if weights is None:
        weights = (1.0,) * len(dims)
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a sequence of numbers, got {type(weights).__name__}")
    if len(weights) != len(dims):
        raise ValueError(f"weights must be as many as dims, {len(dims)}, got {len(weights)}")
    for weight in weights:
        finite("weights", weight)
    of = dict(zip(dims, weights, strict=True))
    ends = tuple(sorted(dims))
    return ends, tuple(float(of[end]) for end in ends)


def weigh(rows: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Losses (K, N) of K prefixes as those of the rows (N,); without weights they are that."""
    if weights is None:
        return rows
    if all(weight == 1 for weight in weights):
        return rows.sum(0)
    return (rows.new_tensor(weights).unsqueeze(1) * rows).sum(0)


def _sizes(given: Any) -> list[int]:
    """The numbers of features that an argument has, as far as they are to be seen."""
    if isinstance(given, list | tuple):
        return [size for each in given for size in _sizes(each)]
    shape = getattr(given, "shape", None)
    return [shape[-1]] if shape else []


def _can_nest(given: Given, first: Tensor, ends: Sequence[int], swept: bool) -> bool:
    if swept and given.get("group") is not None:
        return False
    backend = resolve_backend(given.get("backend", "auto"), first.device)
    return can_nest(backend, first, ends) if swept else backend != "reference"


def _narrowed(given: Given, features: Sequence[str], end: int, size: int) -> Given:
    """The arguments with the first features alone."""
    if end == size:
        return given
    return {**given, **{name: _prefix(name, given.get(name), end) for name in features}}


def _prefix(name: str, given: Any, end: int) -> Any:
    if given is None:
        return None
    if isinstance(given, list | tuple):
        return [_prefix(name, each, end) for each in given]
    if isinstance(given, Tensor):
        return given[..., :end]
    return prefix_of(as_source(name, given), end)


def _total(parts: list[Any], weights: Sequence[float]) -> Any:
    """The weighted sum of losses, with the statistics of the last one."""
    stats: LossStats | None = None
    if isinstance(parts[0], tuple):
        stats = parts[-1][1]
        parts = [loss for loss, _ in parts]
    total = torch.stack([w * loss for w, loss in zip(weights, parts, strict=True)]).sum(0)
    return total if stats is None else (total, stats)
