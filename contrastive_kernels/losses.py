"""Losses between two sets of features; `self_similarity.py` and `transport.py` hold the others.

The options all losses share are described in `common.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .common import (
    Loss,
    add_rows,
    check_negatives,
    check_other_rows,
    check_reduction,
    check_views,
    count_equal_ids,
    log_count,
    mean_of,
    own_ids,
    pair_stats,
    reduce_rows,
    replicated,
    resolve_scale,
    scalar,
    softplus,
    total_rows,
)
from .distributed import Group, Shards, collective, join
from .ops import IdPair, check_ids, check_positive, row_dot, softplus_sweep, sweep
from .sources import NegativeSource, as_source, is_source


@collective
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | NegativeSource | None = None,
    temperature: float = 0.1,
    scale: float | Tensor | None = None,
    alpha: float | None = None,
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
            else every rank has all of them, as those of a queue that is equal everywhere.

    Returns:
        0-d, or (N,) with reduction="none"; with return_stats=True also LossStats: rank, accuracy
        and lse are those of the queries, the bound is the mean of the directions if symmetric.
    """
    n = check_views("query", query, "key", key, rows=group is None)
    check_reduction(reduction)
    scale = resolve_scale(temperature, scale)
    if alpha is not None:
        check_positive("alpha", alpha)
    m = 0
    if negatives is not None:
        negatives = as_source("negatives", negatives)
        m = check_negatives(query, negatives, rows=group is None)
        own = len(negatives.shape) == 3
        if sharded_negatives and (group is None or own or is_source(negatives)):
            raise ValueError(
                "sharded_negatives needs a group, and negatives of shape (M, D) in one tensor"
            )
    if in_batch is None:
        in_batch = negatives is None
    if negatives is None and not in_batch:
        raise ValueError("negatives must be given with in_batch=False, got None")
    if symmetric and not in_batch:
        raise ValueError("symmetric must be False without in-batch negatives, got True")
    start = n if in_batch else 0  # candidates: `start` keys of the batch, then `negatives`
    if key_bias is not None and key_bias.shape != (start + m,):
        raise ValueError(f"key_bias must have shape ({start + m},), got {tuple(key_bias.shape)}")
    if exclude is not None:
        if not isinstance(exclude, tuple | list) or len(exclude) != 2:
            raise TypeError(f"exclude must be a pair (row_ids, col_ids), got {type(exclude)}")
        check_ids("exclude: row_ids", exclude[0], (n,))
        check_ids("exclude: col_ids", exclude[1], (start + m,))
    row_ids, col_ids = exclude or (None, None)
    shards, others = join(
        group, exchange, "info_nce", n, m, query=query, key=key, negatives=negatives, scale=scale,
        alpha=alpha, in_batch=in_batch, symmetric=symmetric, exclude_rows=row_ids,
        exclude_columns=col_ids, key_bias=key_bias, sharded_negatives=sharded_negatives or m,
        normalize=normalize, reduction=reduction, backend=backend, return_stats=return_stats,
    )  # fmt: skip
    if negatives is None:
        check_other_rows("query", total_rows(n, shards))
    elif not sharded_negatives:
        negatives, others = replicated(negatives, n, others)

    dot = row_dot(query, key, normalize=normalize, backend=backend, shards=shards)
    pos = scale * dot
    if in_batch and key_bias is not None:
        pos = pos + key_bias[:n].to(pos.dtype)
    threshold = pos.detach() if return_stats else None
    options = {"scale": scale, "normalize": normalize, "backend": backend}
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
        seen = [(batch_ids, n, shards)] if in_batch else []
        if negatives is not None:
            seen.append((more_ids, m, others))
        count = _count_negatives(seen, in_batch, unmasked)
    margin = _log_margin(alpha, count, pos)

    sweeps = []
    if in_batch:
        out = sweep(
            query, key, exclude=batch_ids if exclude is not None else own_ids(n, query, shards),
            bias=None if key_bias is None else key_bias[:n], columns=symmetric,
            threshold=_above(threshold, unmasked, scale), shards=shards, **options,
        )  # fmt: skip
        rows = _rows(out.lse, pos, margin, unmasked)
        sweeps.append(out)
    if negatives is not None:
        out = sweep(
            query, negatives, exclude=more_ids,
            bias=None if key_bias is None else key_bias[start:], threshold=threshold,
            shards=others, **options,
        )  # fmt: skip
        logit = out.lse - pos if margin is None else out.lse - pos + margin
        # log(1 + a + b) from log(1 + a) and log b: finite also where both have no pair
        rows = torch.logaddexp(rows, logit) if in_batch else softplus(logit)
        sweeps.append(out)
    losses = rows
    if symmetric:
        if count is not None:
            flipped = None if exclude is None else batch_ids[::-1]
            column_count = _count_negatives([(flipped, n, shards)], True, unmasked)
            margin = _log_margin(alpha, column_count, pos)
        columns = _rows(sweeps[0].col_lse, pos, margin, unmasked)
        losses = 0.5 * (rows + columns)
    loss = reduce_rows(losses, reduction, shards)
    if not return_stats:
        return loss
    extra = None if unmasked is None else (unmasked, pos)
    stats = pair_stats(dot, sweeps, scale, lse=rows + pos, extra=extra, shards=shards)
    if key_bias is not None:
        stats = stats._replace(negative_similarity=None)
    if alpha is None:
        bound = mean_of(mi_lower_bound(rows, count), shards)
        if symmetric:
            bound = 0.5 * (bound + mean_of(mi_lower_bound(columns, column_count), shards))
        stats = stats._replace(mi_lower_bound=bound)
    return loss, stats


@collective
def eqco(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | NegativeSource | None = None,
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

    K negatives then weigh as much as alpha would.
    """
    return info_nce(
        query, key, negatives=negatives, alpha=alpha, temperature=temperature, scale=scale,
        in_batch=in_batch, symmetric=symmetric, exclude=exclude, key_bias=key_bias,
        sharded_negatives=sharded_negatives, normalize=normalize, reduction=reduction,
        backend=backend, group=group, exchange=exchange, return_stats=return_stats,
    )  # fmt: skip


@collective
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """CLIP (Radford et al. 2021, fig. 3): InfoNCE from images to texts and back, averaged.

    Args:
        image_features, text_features: (N, D), row i of one belongs to row i of the other.
        logit_scale: number or tensor of one element, already exponentiated; may be learned.

    Returns:
        0-d, or (N,): the average of the two directions of each pair.
    """
    rows = group is None  # else the rank's part may be empty
    n = check_views("image_features", image_features, "text_features", text_features, rows=rows)
    if rows:
        check_other_rows("image_features", n)
    return info_nce(
        image_features, text_features, scale=scalar("logit_scale", logit_scale), symmetric=True,
        normalize=normalize, reduction=reduction, backend=backend, group=group, exchange=exchange,
        return_stats=return_stats,
    )  # fmt: skip


@collective
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """SigLIP (Zhai et al. 2023, eq. 2): every pair is a binary classification.

    loss_i = sum_j softplus(-y_ij (logit_scale <image_i, text_j> + logit_bias)), y_ij = 1 for i = j,
    else -1.

    Args:
        image_features, text_features: (N, D), row i of one belongs to row i of the other.
        logit_scale: number or tensor of one element, already exponentiated; may be learned.
        logit_bias: number or tensor of one element; may be learned.

    Returns:
        0-d: the sum over all pairs divided by N for reduction="mean"; or (N,), by image.
    """
    rows = group is None  # else the rank's part may be empty
    n = check_views("image_features", image_features, "text_features", text_features, rows=rows)
    check_reduction(reduction)
    scale, bias = scalar("logit_scale", logit_scale), scalar("logit_bias", logit_bias)
    shards, _ = join(
        group, exchange, "siglip_loss", n, image_features=image_features,
        text_features=text_features, logit_scale=scale, logit_bias=bias, normalize=normalize,
        reduction=reduction, backend=backend, return_stats=return_stats,
    )  # fmt: skip
    dot = row_dot(
        image_features, text_features, normalize=normalize, backend=backend, shards=shards
    )
    pos = scale * dot + bias
    out = softplus_sweep(
        image_features, text_features, scale=scale, bias=bias, normalize=normalize,
        exclude=own_ids(n, dot, shards), threshold=pos.detach() if return_stats else None,
        summed=reduction != "none", backend=backend, shards=shards,
    )  # fmt: skip
    loss = add_rows(out.value, softplus(-pos), reduction, shards)
    if not return_stats:
        return loss
    return loss, pair_stats(dot, [out], scale, bias=bias, shards=shards)


@collective
def nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeSource,
    *,
    temperature: float = 0.07,
    num_data: int,
    Z: float | Tensor | None = None,
    log_z: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    return_stats: bool = False,
) -> Loss:
    """Noise-contrastive estimation (InstDis, Wu et al. 2018, eq. 7; CMC, PIRL).

    With P(s) = exp(s / temperature) / Z and m noise samples, uniform out of num_data,
    loss_i = -log(P_i+ / (P_i+ + m / num_data)) - sum_j log((m / num_data) / (P_ij + m / num_data)),
    computed as softplus of logits with the bias -log Z - log(m / num_data).

    Args:
        query: (N, D).
        key: (N, D), row i is the positive of query i.
        negatives: (m, D) shared, in one tensor or in chunks, or (N, m, D) for each query; with a
            `group` every rank has the shared ones, and mean and Z are over the rows of all ranks.
        num_data: size of the data set.
        Z: the normalisation constant, > 0; None: the estimate of this batch (`estimate_log_z`).
            The module `NCE` keeps its first estimate, as InstDis does.
        log_z: its logarithm, which cannot overflow, in place of Z.

    Returns:
        0-d, or (N,) with reduction="none".
    """
    check_reduction(reduction)
    scale = resolve_scale(temperature)
    if log_z is not None:
        log_z = scalar("log_z", log_z)
    elif isinstance(Z, Tensor):
        log_z = scalar("Z", Z).detach().log()
    elif Z is not None:
        check_positive("Z", Z)
        log_z = math.log(Z)
    else:
        log_z = estimate_log_z(
            query, key, negatives, temperature=temperature, num_data=num_data,
            normalize=normalize, backend=backend, group=group,
        )  # fmt: skip
    negatives, shards, others = _join_nce(
        group, "nce", query, key, negatives, num_data, temperature=temperature, log_z=log_z,
        normalize=normalize, reduction=reduction, backend=backend, return_stats=return_stats,
    )  # fmt: skip
    dot = row_dot(query, key, normalize=normalize, backend=backend, shards=shards)
    bias = math.log(num_data) - log_count(negatives.shape[-2], dot.dtype) - log_z
    pos = scale * dot + bias
    out = softplus_sweep(
        query, negatives, scale=scale, bias=bias, normalize=normalize,
        threshold=pos.detach() if return_stats else None, summed=reduction != "none",
        backend=backend, shards=others,
    )  # fmt: skip
    loss = add_rows(out.value, softplus(-pos), reduction, shards)
    if not return_stats:
        return loss
    return loss, pair_stats(dot, [out], scale, bias=bias, shards=shards)


@collective
@torch.no_grad()
def estimate_log_z(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeSource,
    *,
    temperature: float = 0.07,
    num_data: int,
    normalize: bool = True,
    backend: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """log Z of `nce`: log(num_data * mean(exp(s / temperature))) over positives and negatives."""
    scale = resolve_scale(temperature)
    negatives, shards, others = _join_nce(
        group, "estimate_log_z", query, key, negatives, num_data, temperature=temperature,
        normalize=normalize, backend=backend,
    )  # fmt: skip
    options = {"normalize": normalize, "backend": backend}
    pos = scale * row_dot(query, key, shards=shards, **options)
    lse = sweep(query, negatives, scale=scale, shards=others, **options).lse
    sums = torch.cat((lse, pos))
    total = sums.logsumexp(0) if shards is None else shards.logsumexp(sums)
    pairs = total_rows(query.shape[0], shards) * (negatives.shape[-2] + 1)
    return total - log_count(pairs, pos.dtype) + math.log(num_data)


def _join_nce(
    group: Group | None,
    loss: str,
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    num_data: int,
    **arguments: Any,
) -> tuple[Tensor, Shards | None, Shards | None]:
    """Check the features; the negatives, and what `join` says of the rows and of them."""
    n = check_views("query", query, "key", key, rows=group is None)
    negatives = as_source("negatives", negatives)
    m = check_negatives(query, negatives, rows=group is None or n > 0)
    check_positive("num_data", num_data)
    shards, others = join(
        group, "auto", loss, n, m, query=query, key=key, negatives=negatives, num_negatives=m,
        num_data=num_data, **arguments,
    )  # fmt: skip
    negatives, others = replicated(negatives, n, others)
    return negatives, shards, others


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


def _count_negatives(
    seen: list[tuple[IdPair | None, int, Shards | None]], in_batch: bool, unmasked: Tensor | None
) -> int | Tensor:
    """Number of negatives of each row, a tensor (N,) when ids are excluded.

    `seen`: for each set of candidates the excluded ids, its size here and on which ranks it is.
    """
    candidates = sum(total_rows(size, shards) for _, size, shards in seen)
    if any(ids is None for ids, _, _ in seen):
        return candidates - 1 if in_batch else candidates
    kept = candidates - sum(count_equal_ids(*ids, shards) for ids, _, shards in seen)
    return kept if unmasked is None else kept - unmasked.long()


def _log_margin(
    alpha: float | None, count: int | Tensor | None, like: Tensor
) -> float | Tensor | None:
    """log(alpha / count), 0 for a row without negatives; None without alpha."""
    if alpha is None:
        return None
    margin = math.log(alpha) - log_count(count, like.dtype)
    return torch.where(count > 0, margin, 0.0) if isinstance(count, Tensor) else margin


def _above(
    threshold: Tensor | None, unmasked: Tensor | None, scale: float | Tensor
) -> Tensor | None:
    """`threshold`, raised above the rounding of the logit of a positive that a row still sees."""
    if threshold is None or unmasked is None:
        return threshold
    rounding = 32 * torch.finfo(threshold.dtype).eps * (threshold.abs() + abs(scale))
    return torch.where(unmasked, threshold + rounding, threshold).detach()


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
    ratio = margin.exp()
    return torch.where(unmasked, gap + torch.log1p((1 - ratio) * torch.expm1(-gap)), rows)
