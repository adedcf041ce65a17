"""The free statistics of losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import Batch
from ..types import Counts, LossStats, known
from .algebra import add_up, log_count


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
    counts: Sequence[Counts | None],
    scale: float | Tensor,
    batch: Batch,
    *,
    bias: float | Tensor = 0.0,
    lse: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
) -> LossStats:
    """Statistics of a loss with one positive for each row, of similarity `dot`.

    `counts` are there, of sweeps that saw the negatives at logits scale * similarity + bias.
    `extra` = (rows, logits) marks the rows whose positive the sweeps counted too.
    """
    found = [known(each) for each in counts]
    rank = add_up(each.rank for each in found)
    total = add_up(each.total.sum() for each in found)
    count = add_up(each.pairs.sum() for each in found)
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
