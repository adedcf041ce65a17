"""Sweeps by keyword arguments, checked as the public functions check theirs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from contrastive_kernels import ops
from contrastive_kernels.types import SoftplusSweep, Sweep


def sweep(
    x: Tensor,
    y: Tensor | None,
    *,
    mean: bool = False,
    columns: bool = False,
    threshold: Tensor | None = None,
    **operands: Any,
) -> Sweep:
    given = ops.checked_operands(x, y, **operands)
    return ops.sweep(given, mean=mean, columns=columns, threshold=threshold)


def softplus_sweep(
    x: Tensor,
    y: Tensor | None,
    *,
    threshold: Tensor | None = None,
    summed: bool = False,
    **operands: Any,
) -> SoftplusSweep:
    given = ops.checked_operands(x, y, **operands)
    return ops.softplus_sweep(given, threshold=threshold, summed=summed)
