"""The free statistics of losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import Batch
from ..types import LossStats, SoftplusSweep, Sweep
from .algebra import log_count


def mi_lower_bound(loss: Tensor, num_negatives: int | Tensor) -> Tensor:
    """log(K + 1) - loss, detached: the bound I_NCE of the mutual information, in nats.

    It holds for InfoNCE and NT-Xent losses with K negatives (van den Oord et al. 2018, sec. 2.3;
    InfoMin, Tian et al. 2020), not with an EqCo margin or without the positive in the denominator.

    Args:
        loss: any shape.
        num_negatives: K, at least 1; or a tensor, one K for each entry of `loss`.
    """
    if not isinstance(num_negatives, Tensor) and num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
    return log_count(num_negatives + 1, loss.dtype) - loss.detach()


def pair_stats(
    dot: Tensor,
    sweeps: list[Sweep | SoftplusSweep],
    scale: float | Tensor,
    batch: Batch,
    *,
    bias: float | Tensor = 0.0,
    lse: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
) -> LossStats:
    """Statistics of a loss with one positive for each row, of similarity `dot`.

    `sweeps` saw the negatives at logits scale * similarity + bias. `extra` = (rows, logits) marks
    the rows whose positive the sweeps counted too.
    """
    rank = sum(out.rank for out in sweeps)
    total = sum(out.total.sum() for out in sweeps)
    count = sum(out.count.sum() for out in sweeps)
    if extra is not None:
        total = total - (extra[0] * extra[1]).sum()
        count = count - extra[0].sum()
    total, count = batch.total_of(torch.stack((total, count)))
    return LossStats(
        accuracy=batch.mean((rank == 0).to(dot.dtype)),
        rank=rank,
        positive_similarity=batch.mean(dot),
        negative_similarity=((total / count - bias) / scale).detach(),
        lse=None if lse is None else lse.detach(),
    )
