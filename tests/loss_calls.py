"""The cases of the table of losses, as functions of a list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from oracles import BACKENDS, DEVICE, DOUBLE
from torch import Tensor

from contrastive_kernels.losses.cases import call, tensors
from contrastive_kernels.losses.table import CASES, LOSSES, definition

FIRST = {row.name: next(iter(row.cases)) for row in LOSSES}  # the case that stands for the loss


def inputs(name: str, dtype: torch.dtype = DOUBLE, **sizes: int) -> list[Tensor]:
    return list(tensors(CASES[name][1], dtype=dtype, **sizes).values())


def ours(name: str, **options) -> Callable[..., Tensor]:
    row, case = CASES[name]
    return lambda *given: call(row.function, case, _named(name, given), **options)


def dense(name: str, **options) -> Callable[..., Tensor]:
    """The same by the definition."""
    row, case = CASES[name]
    return lambda *given: call(definition(row), case, _named(name, given), whole=True, **options)


def _named(name: str, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(CASES[name][1].inputs, given, strict=True))


def by_rows(name: str) -> str:
    """The reduction with the most numbers to compare."""
    return "mean" if CASES[name][1].coupled else "none"


def backends(name: str) -> list[str]:
    """That run the loss here."""
    row, case = CASES[name]
    return [b for b in case.backends or row.backends if b == "auto" or b in BACKENDS]


def with_backends(
    names: Iterable[str] = CASES, interpreted: Iterable[str] | None = None
) -> pytest.MarkDecorator:
    """Parametrizes a test over (name, backend); of kernels that are interpreted, which are slow,
    only over the names in `interpreted`, if it is given."""
    few = set(names if interpreted is None else interpreted)
    return pytest.mark.parametrize(
        ("name", "backend"),
        [
            (name, backend)
            for name in names
            for backend in backends(name)
            if name in few or not (backend == "triton" and DEVICE == "cpu")
        ],
    )
