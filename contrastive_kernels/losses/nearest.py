"""Distances of the rows of a batch to some of them, a block of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import once_differentiable
from ..distributed import Batch, Shards
from ..ops import add_rows, can_tie
from .units import Units, units


def in_blocks(features: Tensor, batch: Batch, backend: str) -> bool:
    """Whether a batch (N, D) is to be taken so: nothing has its size but its gradient."""
    on_cpu = features.device.type == "cpu" and not isinstance(batch, Shards)
    return on_cpu and can_tie(backend, features, 0)


def distances_to(
    features: Tensor, which: Tensor, *, eps: float = 0.0, normalize: bool, backend: str
) -> Tensor:
    """|x_i - x_j + eps| (N, K), of each row (N, D) and those that `which` (N, K) names."""
    return _Distances.apply(features, which, eps, normalize, backend)


class _Distances(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, which: Tensor, eps: float, normalize: bool, backend: str
    ) -> Tensor:
        x = units(features, normalize)
        parts = [
            torch.stack([_difference(x, rows, js[rows], eps).norm(dim=1) for js in which.T], 1)
            for rows in x.blocks()
        ]
        distances = torch.cat(parts)
        ctx.given = eps, normalize, backend
        ctx.save_for_backward(features, which, distances)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, which, distances = ctx.saved_tensors
        eps, normalize, backend = ctx.given
        x = units(features, normalize)
        grad = (grad / distances).masked_fill_(distances == 0, 0.0)
        # who names a row, so that its gradient is whole, and rounded, when its block is done
        names, order = which.flatten().sort(stable=True)
        total = grad.new_zeros(features.shape, dtype=features.dtype)
        for rows in x.blocks():
            block = grad.new_zeros(rows.stop - rows.start, features.shape[1])
            for others, weight in zip(which.T, grad.unbind(1), strict=True):
                block += _weighted(x, rows, others[rows], eps, weight[rows])
            first, last = torch.searchsorted(names, torch.tensor((rows.start, rows.stop))).tolist()
            for part in x.blocks(last - first):
                named, pair = names[first:last][part], order[first:last][part]
                by = pair.div(which.shape[1], rounding_mode="floor")
                weight = -grad[by, pair % which.shape[1]]
                add_rows(block, named - rows.start, _weighted(x, by, named, eps, weight), backend)
            total[rows] = x.gradient_of(rows, block)
            del block  # before the next one
        return total, *4 * (None,)


def _difference(x: Units, rows: slice | Tensor, others: Tensor, eps: float) -> Tensor:
    difference = x.of(rows) - x.of(others)
    return difference.add_(eps) if eps else difference


def _weighted(x: Units, rows: slice | Tensor, others: Tensor, eps: float, weight: Tensor) -> Tensor:
    return _difference(x, rows, others, eps) * weight.unsqueeze(1)
