"""The entropy of a batch, by the nearest neighbour of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..checks import check_features, check_other_rows, check_positive, check_reduction
from ..distributed import join
from ..ops import take_rows, top_k
from ..types import Group
from .algebra import unit
from .base import ContrastiveLoss, loss
from .nearest import distances_to, in_blocks


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
    blocks = in_blocks(features, batch, backend)
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
        which = nearest.unsqueeze(1)
        distance = distances_to(
            features, which, eps=eps, normalize=normalize, backend=backend
        ).squeeze(1)
    else:
        distance = (features - take_rows(keys, nearest, backend) + eps).norm(dim=1)
    return batch.reduce_rows(-(distance + eps).log(), reduction)


class KoLeo(ContrastiveLoss):
    function = staticmethod(koleo)
