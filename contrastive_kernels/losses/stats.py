"""The free statistics of losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import product_rounding
from ..distributed import Batch
from ..types import Counts, LossStats, known, statistics_dtype
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


def tie_limit(
    positive: Tensor,
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    normalize: bool,
    backend: str,
    size: Tensor | None = None,
) -> Tensor:
    """The largest logit of a sweep that ties with the positive's, scale <x_i, y_i> + bias.

    Sweeps and `row_dot` add the D products of a logit in different orders, after other roundings.
    Whatever its order, a sum of D products is within D eps / 2 of `size`, which no logit exceeds
    without its bias: |scale| |x| |y| unless given. 8 eps are for norms and scale, and both factors
    of a product may be rounded, where float32 is multiplied as TF32.
    """
    logit = positive.detach()
    bound: float | Tensor | None = size
    if bound is None:
        bound = scale.detach().abs() if isinstance(scale, Tensor) else abs(scale)
        if not normalize:
            bound = bound * norm(x) * norm(y)
    eps = torch.finfo(logit.dtype).eps
    share = (0.5 * x.shape[-1] + 8) * eps + 2 * product_rounding(backend, x, y)
    return logit + (share * bound + 4 * eps * logit.abs())


def is_first(rank: Tensor, positive: Tensor) -> Tensor:
    """Whether a positive ranks first: no NaN does, even where it has no negatives."""
    return (rank == 0) & ~positive.isnan()


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
        accuracy=batch.mean(is_first(rank, dot.detach()).to(dot.dtype)),
        rank=rank.long(),
        positive_similarity=batch.mean(dot),
        negative_similarity=((total / count - bias) / scale).detach(),
        lse=None if lse is None else lse.detach(),
    )


def norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=statistics_dtype(x))
