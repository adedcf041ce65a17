"""Squared distances: of queries and their positives, and by the products of a sweep."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..ops import (
    KeyBias,
    Part,
    can_tie,
    has_row_kernels,
    row_distance,
    row_distance_gradients,
    squares,
    tied,
)
from ..sources import NegativeSource, is_source
from ..types import IdPair, known, statistics_dtype
from .algebra import SHORTEST, may_look, unit


def distances(
    query: Tensor, positives: Tensor, normalize: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(|query_i - positive_ik|^2 (N, K), query, positives), the features for sweeps and nothing
    else; by difference: 2 - 2 cos would lose all of a small one."""
    own = positives.unsqueeze(1) if positives.dim() == 2 else positives
    kernels = has_row_kernels(backend) and len(query) > 0
    if can_tie(backend, query, smallest=None if kernels else 0):
        local = _Distances(normalize, backend)
        distance, tied_query, tied_positives = tied(local, query, positives)
        return distance, tied_query, known(tied_positives)
    if kernels:
        return row_distance(query, own, normalize), query, positives
    difference = unit(own, normalize) - unit(query, normalize).unsqueeze(1)
    return difference.square().sum(-1), query, positives


def view_distances(
    views: Tensor, pairs: list[tuple[int, int]], normalize: bool, backend: str
) -> tuple[Tensor, list[Tensor | Part]]:
    """(the squared distances (N, P) of pairs of the views (V, N, D), the views likewise)."""
    if normalize and can_tie(backend, views, smallest=0):
        every, tied_views, _ = tied(_ViewDistances(pairs, backend), views.transpose(0, 1))
        whole = tied_views.transpose(0, 1)
        return every, [Part(whole, i) for i in range(len(whole))]
    z, found = list(views.unbind()), []
    for i, j in pairs:
        each, z[i], z[j] = distances(z[i], z[j], normalize, backend)
        found.append(each.squeeze(1))
    return torch.stack(found, 1), [*z]


def from_products(
    query: Tensor | Part,
    keys: Tensor | Part | NegativeSource,
    normalize: bool,
    backend: str,
    shared: bool,
) -> tuple[float | Tensor, Tensor | KeyBias | None, Tensor | Part, Any]:
    """(shift (N,), bias (M,), query, keys), |q_i - k_j|^2 being shift_i - (2 <q_i, k_j> + bias_j);
    the features are for sweeps and nothing else.

    On the unit sphere that is 2 and no bias, of which a row of zeros lacks 1. `shared`: the keys
    are one rank's, and whether there is a bias must not depend on them.
    """
    if normalize:
        short, of_keys = shortfall(query), partial(shortfall, look=not shared)
        bias = of_keys if is_source(keys) else of_keys(keys)
        return 2.0 if short is None else 2.0 - short, bias, query, keys
    shift, query = squares(cast(Tensor, query), backend=backend)
    if is_source(keys):
        return shift, lambda part: -squares(part, backend=backend)[0], query, keys
    bias, keys = squares(cast(Tensor, keys), backend=backend)
    return shift, -bias, query, keys


def times(t: float, bias: Tensor | KeyBias | None) -> Tensor | KeyBias | None:
    """A bias of `from_products` for logits t (2 <q, k> + bias)."""
    if bias is None or isinstance(bias, Tensor):
        return None if bias is None else t * bias
    of_chunk = bias

    def scaled(part: Tensor) -> Tensor | None:
        made = of_chunk(part)
        return None if made is None else t * made

    return scaled


def total_bias(
    bias: Tensor | KeyBias, keys: Tensor | NegativeSource, ids: IdPair | None
) -> tuple[Tensor, Tensor]:
    """Sums of the bias: over all keys (0-d), and over those that each row drops, which with `ids`
    are as many of the keys in turn."""
    if not isinstance(bias, Tensor):
        every = torch.zeros((), dtype=torch.float64)
        for part in cast(NegativeSource, keys):
            of_part = bias(part)
            if of_part is not None:
                every += of_part.sum().cpu()
        return every, every.new_zeros(())
    every = bias.sum()
    rows = 0 if ids is None else len(ids[0])
    return every, bias.view(rows, -1).sum(1) if rows else every.new_zeros(())


def shortfall(x: Tensor | Part, look: bool = True) -> Tensor | None:
    """1 - |u|^2 (M,) of normalised rows u, without gradient: 0, but 1 of a row of zeros, and more
    than 0 of one below 1e-12. None: 0 throughout, where a `look` may tell."""
    x = (x.of.detach()[x.where] if isinstance(x, Part) else x).detach()
    look = look and may_look(x)
    if look and not (x[..., 0].abs() <= SHORTEST).any():  # SHORTEST is 0 in float16
        return None
    found = _shortfall(torch.linalg.vector_norm(x, dim=-1, dtype=statistics_dtype(x)))
    return None if look and not found.any() else found


class _Distances(NamedTuple):
    """|p - q|^2, of normalised p and q or as they are.

    With r = p - q and a = <r, p> = (d + |p|^2 - |q|^2) / 2, b = -<r, q> = d - a, which are d / 2 on
    the sphere, the gradients, tangential and divided by the norms, are 2 ((1 - a) r - a q) / |p|
    and -2 (r + b q) / |q|. A norm that was raised to 1e-12 is a constant: a or b counts as 0.
    """

    normalize: bool
    backend: str

    def values(self, x: Tensor, y: Tensor | None) -> Tensor:
        if has_row_kernels(self.backend):
            return row_distance(x, known(y), self.normalize)
        difference = unit(known(y), self.normalize) - unit(x, self.normalize).unsqueeze(1)
        return torch.linalg.vector_norm(difference, dim=-1).square()

    def gradients(
        self, x: Tensor, y: Tensor | None, values: Tensor, grad: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        y = known(y)
        if has_row_kernels(self.backend):
            return row_distance_gradients(x, y, values, grad, self.normalize, needs)
        direction = unit(x, self.normalize)
        difference = unit(y, self.normalize) - direction.unsqueeze(1)
        grad_x = grad_y = None
        if needs[0]:
            grad_x = -2 * (grad.unsqueeze(-1) * difference).sum(1)
        if not self.normalize:
            return grad_x, 2 * grad.unsqueeze(-1) * difference if needs[1] else None
        norm_x, norm_y = _norm(x), _norm(y)
        along_y = 0.5 * (values + _shortfall(norm_x) - _shortfall(norm_y).squeeze(-1))
        if grad_x is not None:
            along_x = (grad * (values - along_y)).sum(1, keepdim=True)
            grad_x = grad_x - 2 * along_x.masked_fill(norm_x < SHORTEST, 0.0) * direction
            grad_x = grad_x / norm_x.clamp(min=SHORTEST)
        if needs[1]:
            factor = 2 * grad.unsqueeze(-1) / norm_y.clamp(min=SHORTEST)
            along = along_y.unsqueeze(-1).masked_fill(norm_y < SHORTEST, 0.0)
            grad_y = torch.addcmul(
                (factor * (1 - along)) * difference, factor * along, direction.unsqueeze(1),
                value=-1,
            )  # fmt: skip
        return grad_x, grad_y


class _ViewDistances(NamedTuple):
    """Those of pairs of the normalised views (N, V, D) of each row."""

    pairs: list[tuple[int, int]]
    backend: str

    def values(self, x: Tensor, y: Tensor | None) -> Tensor:
        local = _Distances(True, self.backend)
        return torch.cat([local.values(x[:, i], x[:, j : j + 1]) for i, j in self.pairs], 1)

    def gradients(
        self, x: Tensor, y: Tensor | None, values: Tensor, grad: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        local, total = _Distances(True, self.backend), None
        for p, (i, j) in enumerate(self.pairs):
            of_i, of_j = local.gradients(
                x[:, i], x[:, j : j + 1], values[:, p : p + 1], grad[:, p : p + 1], (True, True)
            )
            if total is None:
                total = known(of_i).new_zeros(x.shape)
            total[:, i] += known(of_i)
            total[:, j : j + 1] += known(of_j)
        return total, None


def _norm(x: Tensor) -> Tensor:
    """L2 norm of the rows, with a last dimension of 1."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=statistics_dtype(x))


def _shortfall(norm: Tensor) -> Tensor:
    return (1 - (norm / SHORTEST).square()).clamp(min=0)
