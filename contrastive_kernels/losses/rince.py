"""Robust InfoNCE, for positives that may be false."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..checks import (
    check_other_rows,
    check_own,
    check_positive,
    check_reduction,
    check_views,
    resolve_scale,
)
from ..distributed import Batch, join
from ..ops import operands, positives, sweep, swept_positives
from ..sources import NegativeSource
from ..types import Group, IdPair, Loss, OwnKeys, known
from .algebra import replicated, shared_number, softplus
from .base import ContrastiveLoss, loss
from .stats import pair_stats, tie_limit


@loss
def rince(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | NegativeSource | None = None,
    negatives_mask: Tensor | None = None,
    negatives_per_query: Tensor | None = None,
    temperature: float = 0.1,
    scale: float | Tensor | None = None,
    q: float = 0.5,
    lam: float = 0.01,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """RINCE (Chuang et al. 2022, sec. 4): InfoNCE that is robust against false positives.

    loss_i = -exp(q s_i+) / q + (lam (exp(s_i+) + sum_j exp(s_ij)))^q / q,   s = <query, key> /
    temperature. Towards q = 0 its gradient is that of InfoNCE; with q = 1 the loss is symmetric in
    the sense that makes a classifier robust to noisy labels.

    Args:
        query: (N, D).
        key: (N, D), row i is the positive of query i.
        negatives: (M, D) shared, in one tensor or in chunks, (N, M, D) for each query, or None: the
            keys of the other rows. With a `group` every rank has the shared ones.
        negatives_mask: (N, M), bool, of negatives (N, M, D): True where one counts.
        negatives_per_query: (N,), of negatives (total, D): how many of them are those of each query
            in turn.
        scale: number or tensor of one element (may be learned), instead of 1 / temperature.
        q: robustness, in (0, 1].
        lam: weight of the denominator, > 0.

    Returns:
        0-d, or (N,) with reduction="none"; it may be negative. It holds exp(q s), which float32
        does not where q / temperature comes near 88.
    """
    n = check_views("query", query, "key", key, whole=group is None)
    check_reduction(reduction)
    scale = resolve_scale(temperature, scale)
    check_positive("lam", lam)
    if not 0 < q <= 1:
        raise ValueError(f"q must be a number in (0, 1], got {q}")
    m = 0
    keys: Tensor | NegativeSource | OwnKeys = key
    in_batch = negatives is None and negatives_mask is None and negatives_per_query is None
    if not in_batch:
        keys = check_own(query, negatives, negatives_mask, negatives_per_query, whole=group is None)
        m = shared_number(keys)
        negatives = negatives if isinstance(keys, OwnKeys) else keys
    backend = resolve_backend(backend, query.device)
    batch, others = join(group, n, m, exchange=exchange, negatives=negatives, replicated=True)
    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    aligned, dot = False, None
    if in_batch:
        aligned, dot, query, key = swept_positives(query, key, batch, dots=return_stats, **options)
    else:
        dot, query, key = positives(query, key, **options)
    key_batch: Batch | None = batch
    exclude: IdPair | None = None
    if in_batch:
        check_other_rows("query", batch.total)
        ids = batch.own_ids(query.device)
        exclude, keys = (ids, ids), key
    else:
        keys, key_batch = replicated(keys, n, others)

    pairs = operands(
        query, keys, scale=scale, exclude=exclude, batch=key_batch, aligned=aligned, **options
    )
    pos = None if dot is None else scale * dot
    threshold = tie_limit(known(pos), query, key, scale, **options) if return_stats else None
    out = sweep(pairs, threshold=threshold)
    pos = known(out.partner if aligned else pos)
    gap = softplus(out.lse - pos)  # that of InfoNCE: log of the denominator less the positive
    # the difference of two exponentials, relative to the larger one
    above = q * (gap + math.log(lam))
    share = torch.where(
        above > 0, -torch.expm1(-above.clamp(min=0)), torch.expm1(above.clamp(max=0))
    )
    rows = (q * pos + above.clamp(min=0)).exp() * share / q
    value = batch.reduce_rows(rows, reduction)
    if not return_stats:
        return value
    return value, pair_stats(known(dot), [out.counts], scale, batch, lse=gap + pos)


class RINCE(ContrastiveLoss):
    function = staticmethod(rince)
