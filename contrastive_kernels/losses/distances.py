"""Squared distances of queries and their positives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import can_tie, tied
from ..types import known, statistics_dtype
from .algebra import unit


def distances(
    query: Tensor, positives: Tensor, normalize: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(|query_i - positive_ik|^2 (N, K), query, positives), the features for sweeps and nothing
    else; by difference: 2 - 2 cos would lose all of a small one."""
    if can_tie(backend, query, smallest=0):
        distance, tied_query, tied_positives = tied(_Distances(normalize), query, positives)
        return distance, tied_query, known(tied_positives)
    own = positives.unsqueeze(1) if positives.dim() == 2 else positives
    difference = unit(own, normalize) - unit(query, normalize).unsqueeze(1)
    return difference.square().sum(-1), query, positives


class _Distances(NamedTuple):
    """|p - q|^2, of normalised p and q or as they are.

    With r = p - q on the sphere, <r, p> = -<r, q> = d / 2, so that the gradients, tangential and
    divided by the norms, are 2 ((1 - d/2) r - (d/2) q) / |p| and -2 (r + (d/2) q) / |q|.
    """

    normalize: bool

    def values(self, x: Tensor, y: Tensor | None) -> Tensor:
        difference = unit(known(y), self.normalize) - unit(x, self.normalize).unsqueeze(1)
        return torch.linalg.vector_norm(difference, dim=-1).square()

    def gradients(
        self, x: Tensor, y: Tensor | None, values: Tensor, grad: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        y = known(y)
        direction = unit(x, self.normalize)
        difference = unit(y, self.normalize) - direction.unsqueeze(1)
        grad_x = grad_y = None
        if needs[0]:
            grad_x = -2 * (grad.unsqueeze(-1) * difference).sum(1)
        if not self.normalize:
            return grad_x, 2 * grad.unsqueeze(-1) * difference if needs[1] else None
        half = 0.5 * values
        if grad_x is not None:
            grad_x = grad_x - (2 * grad * half).sum(1, keepdim=True) * direction
            grad_x = grad_x / _norm(x)
        if needs[1]:
            factor = 2 * grad.unsqueeze(-1) / _norm(y)
            half = half.unsqueeze(-1)
            grad_y = torch.addcmul(
                (factor * (1 - half)) * difference, factor * half, direction.unsqueeze(1), value=-1
            )
        return grad_x, grad_y


def _norm(x: Tensor) -> Tensor:
    """L2 norm of the rows, at least 1e-12 as in F.normalize, with a last dimension of 1."""
    x = x.to(statistics_dtype(x))
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
