"""InfoNCE, and with EqCo's margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..checks import (
    check_id_pair,
    check_other_rows,
    check_own,
    check_positive,
    check_reduction,
    check_vector,
    check_views,
    resolve_scale,
)
from ..distributed import Batch, join
from ..ops import Asked, count_own, operands, positives, sweeps, swept_positives
from ..sources import NegativeSource
from ..types import Group, IdPair, Loss, OwnKeys, known
from .algebra import (
    count_equal_ids,
    cut,
    log_add,
    log_count,
    own_part,
    replicated,
    sharded,
    shared_number,
    softplus,
)
from .base import ContrastiveLoss, loss, loss_like
from .nested import nested, weigh
from .stats import mi_lower_bound, pair_stats, tie_limit


@loss
@nested("query", "key", "negatives", fuses=lambda given: given.get("negatives") is None)
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | NegativeSource | None = None,
    negatives_mask: Tensor | None = None,
    negatives_per_query: Tensor | None = None,
    temperature: float = 0.1,
    scale: float | Tensor | None = None,
    alpha: float | None = None,
    in_batch: bool | None = None,
    symmetric: bool = False,
    exclude: IdPair | None = None,
    key_bias: Tensor | None = None,
    sharded_negatives: bool = False,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """InfoNCE (van den Oord et al. 2018, eq. 4): the cross-entropy of picking the positive key.

    loss_i = log(1 + r_i sum_j exp(s_ij - s_ii)),   s = scale <query, key> + key_bias,

    over the negatives j of row i; r_i = alpha / K_i with the EqCo margin (Zhu et al. 2020), K_i
    being the number of negatives that are left for row i, else r_i = 1.

    Args:
        query: (N, D).
        key: (N, D), row i is the positive of query i.
        negatives: (M, D) shared, (N, M, D) for each query, or None: the keys of the other rows.
            Shared ones may come in chunks, a list of tensors or a `NegativeSource`, without
            gradient.
        negatives_mask: (N, M), bool, of negatives (N, M, D): True where one counts. What lies
            elsewhere, padding of any value, is no candidate and has gradient 0.
        negatives_per_query: (N,), integers >= 0: `negatives` (total, D) are those of query 0, then
            those of query 1 and so on, as many as these, without padding. Column ids and
            `key_bias` then have `total` entries for them.
        temperature: scale = 1 / temperature.
        scale: number or tensor of one element (may be learned), instead of 1 / temperature.
        alpha: the EqCo margin.
        in_batch: whether other rows' keys are negatives; None: only when `negatives` is None.
        symmetric: average with the loss of each key against the queries of the batch.
        exclude: integer ids (row_ids, col_ids); a negative with the id of the row is dropped, the
            positive never is. col_ids has one id for each candidate: (N,) for the batch's keys,
            (M,) for `negatives`, or (N + M,), keys first, for both. Passing one tensor as both is
            the fastest and, near convergence, the most exact.
        key_bias: added to the logits of a key, one entry for each candidate as in `exclude`; the
            entries of the batch's keys hold for the positives too. Example: -log q(key).
        sharded_negatives: with a `group`, whether `negatives` (M, D) are this rank's part of them;
            else every rank has all of them, as those of a queue that is equal everywhere. A
            `FileNegatives` (what has `part`) is passed whole, with its ids and biases, by every
            rank, which reads its part.

    Returns:
        0-d, or (N,) with reduction="none"; with return_stats=True also LossStats: rank, accuracy
        and lse are those of the queries, the bound is the mean of the directions if symmetric.

    Passages (N (1 + k), D) with the positive of each query before its k negatives, as tevatron and
    FlagEmbedding have them, are groups: `own = passages.view(N, 1 + k, D)`. Each query against its
    own group is `key=own[:, 0], negatives=own[:, 1:]`. Against all passages of the batch, the other
    queries' negatives too, which is what tevatron does and FlagEmbedding by default, it is
    `key=own[:, 0], negatives=own[:, 1:].flatten(0, 1), in_batch=True`, and with a `group`
    `sharded_negatives=True`.
    """
    n = check_views("query", query, "key", key, whole=group is None)
    check_reduction(reduction)
    scale = resolve_scale(temperature, scale)
    if alpha is not None:
        check_positive("alpha", alpha)
    m, own = 0, None  # own: this rank's part of a file
    keys: Tensor | NegativeSource | OwnKeys | None = None
    if not (negatives is None and negatives_mask is None and negatives_per_query is None):
        keys = check_own(query, negatives, negatives_mask, negatives_per_query, whole=group is None)
        m = (keys.keys if isinstance(keys, OwnKeys) else keys).shape[-2]
        if sharded_negatives:
            if group is None or isinstance(keys, OwnKeys) or len(keys.shape) != 2:
                raise ValueError("sharded_negatives needs a group, and negatives of shape (M, D)")
            keys, own = own_part(keys, group)
    in_batch = negatives is None if in_batch is None else bool(in_batch)
    if negatives is None and not in_batch:
        raise ValueError("negatives must be given with in_batch=False, got None")
    if symmetric and not in_batch:
        raise ValueError("symmetric must be False without in-batch negatives, got True")
    candidates = n * in_batch + m
    if key_bias is not None:
        check_vector("key_bias", key_bias, candidates)
    if exclude is not None:
        exclude = check_id_pair("exclude", exclude, n, candidates, query.device)
    if own is not None:
        start = n * in_batch
        key_bias = None if key_bias is None else cut(key_bias, start, own)
        exclude = None if exclude is None else (exclude[0], cut(exclude[1], start, own))
    backend = resolve_backend(backend, query.device)
    batch, others = join(
        group, n, 0 if keys is None else shared_number(keys), exchange=exchange,
        negatives=negatives if isinstance(keys, OwnKeys) else keys, in_batch=in_batch,
        replicated=not sharded_negatives, total=None if own is None else m,
    )  # fmt: skip
    if negatives is None:
        check_other_rows("query", batch.total)
    return contrast(
        query, key, keys, scale=scale, alpha=alpha, in_batch=in_batch, symmetric=symmetric,
        exclude=exclude, key_bias=key_bias, sharded_negatives=sharded_negatives,
        normalize=normalize, reduction=reduction, backend=backend, batch=batch, others=others,
        return_stats=return_stats, ends=dims, weights=weights,
    )  # fmt: skip


@loss_like(info_nce)
def eqco(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | NegativeSource | None = None,
    negatives_mask: Tensor | None = None,
    negatives_per_query: Tensor | None = None,
    alpha: float = 65536.0,
    temperature: float = 0.2,
    scale: float | Tensor | None = None,
    in_batch: bool | None = None,
    symmetric: bool = False,
    exclude: IdPair | None = None,
    key_bias: Tensor | None = None,
    sharded_negatives: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """EqCo (Zhu et al. 2020): `info_nce` with the margin log(alpha / K) on the negatives' logits.

    K negatives then weigh as much as alpha would. Arguments as in `info_nce`.
    """
    return info_nce(
        query, key, negatives=negatives, negatives_mask=negatives_mask,
        negatives_per_query=negatives_per_query, alpha=alpha, temperature=temperature, scale=scale,
        in_batch=in_batch, symmetric=symmetric, exclude=exclude, key_bias=key_bias,
        sharded_negatives=sharded_negatives, normalize=normalize, reduction=reduction,
        backend=backend, group=group, exchange=exchange, return_stats=return_stats,
    )  # fmt: skip


class InfoNCE(ContrastiveLoss):
    function = staticmethod(info_nce)


class EqCo(ContrastiveLoss):
    function = staticmethod(eqco)


def contrast(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeSource | OwnKeys | None = None,
    *,
    scale: float | Tensor,
    alpha: float | None = None,
    in_batch: bool = True,
    symmetric: bool = False,
    exclude: IdPair | None = None,
    key_bias: Tensor | None = None,
    sharded_negatives: bool = False,
    normalize: bool,
    reduction: str,
    backend: str,
    batch: Batch,
    others: Batch,
    return_stats: bool,
    ends: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Loss:
    """`info_nce` of arguments that fit; `batch` has the rows, `others` the negatives. `ends` and
    `weights` are dims as `nested` gives them."""
    n = query.shape[0]
    start = n * in_batch  # candidates: `start` keys of the batch, then `negatives`
    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    aligned, dot = False, None  # without `dot` the sweep gives the positives
    if in_batch:
        aligned, dot, query, key = swept_positives(
            query, key, batch, dots=return_stats, one_way=not symmetric,
            prefixes=ends is not None, **options,
        )  # fmt: skip
    else:
        dot, query, key = positives(query, key, **options)
    options["scale"] = scale
    # ids of the batch's keys, and of the negatives
    batch_ids = more_ids = unmasked = None
    if exclude is not None:
        batch_ids = exclude if negatives is None else (exclude[0], exclude[1][:n])
        more_ids = (exclude[0], exclude[1][start:])
        # rows that still see their positive: the ids of the user do not drop it, and one sweep
        # can drop pairs by one pair of ids only
        if in_batch and exclude[0] is not exclude[1]:
            unmasked = exclude[0] != exclude[1][:n]
    count = None
    if alpha is not None or return_stats:
        seen = [(batch_ids, batch)] if in_batch else []
        own: int | Tensor = 0
        if isinstance(negatives, OwnKeys):
            own = count_own(negatives, more_ids)
        elif negatives is not None:
            # every rank has all of the negatives that it does not share
            alone = Batch(negatives.shape[-2])
            seen.append((more_ids, others if sharded_negatives else alone))
        count = own + _count_negatives(seen, in_batch, unmasked)
    threshold = None
    if dot is not None:
        pos = scale * dot
        if in_batch and key_bias is not None:
            pos = pos + key_bias[:n].to(pos.dtype)
        if return_stats:
            threshold = tie_limit(pos, query, key, **options)
    asked = []
    if in_batch:
        if batch_ids is None:
            ids = batch.own_ids(query.device)
            batch_ids = (ids, ids)
        pairs = operands(
            query, key, exclude=batch_ids, bias=None if key_bias is None else key_bias[:n],
            batch=batch, aligned=aligned, ends=ends, **options,
        )  # fmt: skip
        asked.append(Asked(pairs, columns=symmetric, threshold=threshold))
    if negatives is not None:
        on_ranks: Batch | None = others
        if sharded_negatives:
            negatives = sharded(cast("Tensor | NegativeSource", negatives), batch, others)
        else:
            negatives, on_ranks = replicated(negatives, n, others)
        bias = None if key_bias is None else key_bias[start:]
        pairs = operands(query, negatives, exclude=more_ids, bias=bias, batch=on_ranks, **options)
        asked.append(Asked(pairs, threshold=threshold))
    made = sweeps(asked)
    if aligned:
        pos = known(made[0].partner)
    margin = _log_margin(alpha, count, pos)
    if in_batch:
        rows = _rows(made[0].lse, pos, margin, unmasked)
    if negatives is not None:
        lse = made[-1].lse
        logit = lse - pos if margin is None else lse - pos + margin
        # log(1 + a + b) from log(1 + a) and log b: finite also where both have no pair
        rows = log_add(rows, logit) if in_batch else softplus(logit)
    losses = rows
    if symmetric:
        if count is not None:
            flipped = None if exclude is None else known(batch_ids)[::-1]
            column_count = _count_negatives([(flipped, batch)], True, unmasked)
            margin = _log_margin(alpha, column_count, pos)
        columns = _rows(known(made[0].col_lse), pos, margin, unmasked)
        losses = 0.5 * (rows + columns)
    value = batch.reduce_rows(weigh(losses, weights), reduction)
    if not return_stats:
        return value
    extra = None if unmasked is None else (unmasked, pos)
    stats = pair_stats(
        known(dot), [out.counts for out in made], scale, batch, lse=rows + pos, extra=extra
    )
    if key_bias is not None:
        stats = stats._replace(negative_similarity=None)
    if alpha is None and count is not None:
        bound = batch.mean(mi_lower_bound(rows, count))
        if symmetric:
            bound = 0.5 * (bound + batch.mean(mi_lower_bound(columns, column_count)))
        stats = stats._replace(mi_lower_bound=bound)
    return value, stats


def _count_negatives(
    seen: list[tuple[IdPair | None, Batch]], in_batch: bool, unmasked: Tensor | None
) -> int | Tensor:
    """Number of negatives of each row, a tensor (N,) when ids are excluded.

    `seen`: for each set of candidates the excluded ids, and the batch it is.
    """
    kept: int | Tensor = sum(batch.total for _, batch in seen)
    if any(ids is None for ids, _ in seen):
        return kept - 1 if in_batch else kept
    for ids, batch in seen:
        row_ids, col_ids = known(ids)
        kept = kept - count_equal_ids(row_ids, batch.all_ids(col_ids))
    return kept if unmasked is None else kept - unmasked.long()


def _log_margin(
    alpha: float | None, count: int | Tensor | None, like: Tensor
) -> float | Tensor | None:
    """log(alpha / count), 0 for a row without negatives; None without alpha."""
    if alpha is None or count is None:
        return None
    margin = math.log(alpha) - log_count(count, like.dtype)
    return torch.where(count > 0, margin, 0.0) if isinstance(count, Tensor) else margin


def _rows(
    lse: Tensor, pos: Tensor, margin: float | Tensor | None, unmasked: Tensor | None
) -> Tensor:
    """log(1 + r sum_j exp(s_j - pos)), r = exp(margin), over the negatives j of each row, from an
    lse over the negatives and, in `unmasked` rows, over the positive too."""
    gap = lse - pos
    rows = softplus(gap if margin is None else gap + margin)
    if unmasked is None:
        return rows
    # 1 + r (exp(gap) - 1) = exp(gap) (1 + (r - 1) (1 - exp(-gap))), with a gap >= 0
    gap = gap.clamp(min=0)
    if margin is None:
        return torch.where(unmasked, gap, rows)
    ratio = margin.exp() if isinstance(margin, Tensor) else math.exp(margin)
    return torch.where(unmasked, gap + torch.log1p((1 - ratio) * torch.expm1(-gap)), rows)
