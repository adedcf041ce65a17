"""The entropy of a batch, by the nearest neighbour of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import once_differentiable
from ..backends import resolve_backend
from ..checks import check_features, check_other_rows, check_positive, check_reduction
from ..distributed import Shards, join
from ..ops import add_rows, can_tie, take_rows, top_k
from ..types import Group
from .algebra import unit
from .base import ContrastiveLoss, loss
from .units import units


@loss
def koleo(
    features: Tensor,
    *,
    eps: float = 1e-8,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """KoLeo (Sablayrolles et al. 2019, sec. 3.1; DINOv2, Oquab et al. 2023): spreads features over
    the sphere, by the Kozachenko-Leonenko estimate of their entropy.

    loss_i = -log(|x_i - x_j + eps| + eps), of features of unit length unless normalize=False, j the
    nearest other row: the one with the largest <x_i, x_j>, of equals the first. The gradient goes
    to both.

    Args:
        features: (N, D).
        eps: added to each difference, as torch.nn.PairwiseDistance does, and to the distance.
    """
    check_features("features", features, (2,), whole=group is None)
    check_positive("eps", eps)
    check_reduction(reduction)
    backend = resolve_backend(backend, features.device)
    batch, _ = join(group, features.shape[0])
    check_other_rows("features", batch.total)
    blocks = (
        features.device.type == "cpu"
        and can_tie(backend, features, 0)
        and not isinstance(batch, Shards)
    )
    if not blocks:
        features, normalize = unit(features, normalize), False
    ids, keys = batch.own_ids(features.device), batch.gather_keys(features)
    if len(features) > 0:
        nearest = top_k(
            features.detach(), keys.detach(), 1, exclude=(ids, batch.all_ids(ids)),
            normalize=normalize, backend=backend,
        ).ids.flatten()  # fmt: skip
    else:  # a rank without rows
        nearest = torch.empty(0, dtype=torch.int64, device=features.device)
    if blocks:
        distance = _Distance.apply(features, nearest, eps, normalize, backend)
    else:
        distance = (features - take_rows(keys, nearest, backend) + eps).norm(dim=1)
    return batch.reduce_rows(-(distance + eps).log(), reduction)


class KoLeo(ContrastiveLoss):
    function = staticmethod(koleo)


class _Distance(torch.autograd.Function):
    """|x_i - x_j + eps| of each row (N, D) and the one that `nearest` (N,) names, a block of rows
    at a time."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, nearest: Tensor, eps: float, normalize: bool, backend: str
    ) -> Tensor:
        x = units(features, normalize)
        parts = [(x.of(rows) - x.of(nearest[rows]) + eps).norm(dim=1) for rows in x.blocks()]
        distance = torch.cat(parts)
        ctx.given = eps, normalize, backend
        ctx.save_for_backward(features, nearest, distance)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, nearest, distance = ctx.saved_tensors
        eps, normalize, backend = ctx.given
        x = units(features, normalize)
        grad = (grad / distance).masked_fill_(distance == 0, 0.0)
        total = x.zeros(grad)
        for rows in x.blocks():
            each = (x.of(rows) - x.of(nearest[rows]) + eps) * grad[rows, None]
            total[rows] += each
            add_rows(total, nearest[rows], each.neg_(), backend)
        return x.gradient(total), *4 * (None,)
