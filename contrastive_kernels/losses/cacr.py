"""Contrastive attraction and repulsion (CACR), first named contrastive conditional transport (CCT).

Zheng et al. 2023, TMLR (arXiv 2105.03746). d = |q - k|^2; a query pulls its far positives more,
with weights softmax(t_pos d), and pushes its near negatives more, with weights softmax(-t_neg d).
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..checks import (
    check_features,
    check_negatives,
    check_other_rows,
    check_pair,
    check_positive,
    check_range,
    check_reduction,
)
from ..distributed import Batch, join
from ..ops import Asked, row_dot, sweeps
from ..sources import NegativeSource, as_source
from ..types import Group, Loss, LossStats, Sweep, known
from .algebra import add_up, own_part, replicated, sharded, weighted
from .base import ContrastiveLoss, loss, loss_like
from .distances import distances, view_distances
from .repulsion import Options, plain, repulsion, tie_limit_of
from .stats import is_first


@loss
def cacr(
    query: Tensor,
    positives: Tensor,
    *,
    negatives: Tensor | NegativeSource | None = None,
    t_pos: float = 1.0,
    t_neg: float = 2.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    cost: str = "euclidean",
    rbf_t: float = 2.0,
    detach_weights: bool = False,
    sharded_negatives: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """CACR (Zheng et al. 2023) of one set of queries.

    loss_i = alpha sum_k w+_ik d_ik - beta sum_j w-_ij d_ij,   d = |query - key|^2,
    w+_ik = softmax_k(t_pos d_ik) over the positives, w-_ij = softmax_j(-t_neg d_ij) over the
    negatives. cost="rbf" replaces the repulsion by the official code's
    beta log mean_i sum_j w-_ij exp(-rbf_t d_ij), which couples the rows.

    Args:
        query: (N, D).
        positives: (N, D), or (N, K, D): K positives of each query.
        negatives: (M, D), in one tensor or in chunks (a list of tensors or a `NegativeSource`), or
            None: the (N - 1) K positives of all other queries, in one softmax.
        t_pos, t_neg: inverse temperatures of the weights, t_pos >= 0, t_neg > 0.
        alpha, beta: factors of attraction and repulsion.
        cost: "euclidean" or "rbf"; "rbf" has reduction="mean" only.
        rbf_t: width of the "rbf" cost, > 0.
        detach_weights: treat w+ and w- as constants; else the gradient flows through them too.
        sharded_negatives: with a `group`, whether `negatives` are this rank's part of them; else
            every rank has all of them. A `FileNegatives` is passed whole by every rank, which reads
            its part.

    Returns:
        0-d, or (N,) with reduction="none". LossStats has rank and accuracy for one positive only,
        and no negative_similarity with normalize=False.
    """
    whole = group is None  # else the rank's part may be empty
    check_features("query", query, (2,), whole=whole)
    check_features("positives", positives, (2, 3), whole=whole)
    check_pair(query, positives, "query", "positives")
    n = query.shape[0]
    if positives.shape[0] != n or (positives.dim() == 3 and positives.shape[1] == 0):
        raise ValueError(
            f"positives must have shape (N, D) or (N, K, D) with N = {n} as query has and K > 0, "
            f"got {tuple(positives.shape)}"
        )
    _check_options(t_pos, t_neg, cost, rbf_t, reduction)
    k = positives.shape[1] if positives.dim() == 3 else 1
    m, total = 0, None
    if negatives is not None:
        negatives = as_source("negatives", negatives)
        m = check_negatives(query, negatives, (2,), whole=whole)
    if sharded_negatives:
        if whole or negatives is None:
            raise ValueError("sharded_negatives needs a group and negatives")
        negatives, own = own_part(negatives, group)
        total = None if own is None else m
        m = negatives.shape[0]
    backend = resolve_backend(backend, query.device)
    batch, others = join(
        group, n, m, exchange=exchange, negatives=negatives,
        replicated=not sharded_negatives, total=total,
    )  # fmt: skip
    distance, query, positives = distances(query, positives, normalize, backend)
    ids = None
    candidates: Tensor | NegativeSource = positives
    key_batch: Batch | None = others
    if negatives is None:
        check_other_rows("query", batch.total)
        key_batch = batch.times(k)
        rows = key_batch.own_ids(query.device) if k == 1 else batch.own_ids(query.device)
        ids = (rows, rows if k == 1 else rows.repeat_interleave(k))
        candidates = positives.flatten(0, 1) if positives.dim() == 3 else positives
    elif sharded_negatives:
        candidates = sharded(negatives, batch, others)
    else:
        candidates, key_batch = replicated(negatives, n, others)

    options = Options(t_neg, cost, rbf_t, detach_weights, normalize, backend)
    limit = None
    if return_stats:
        limit = distance.new_zeros(n)  # of several positives none has a rank
        if k == 1:
            limit = tie_limit_of(query, positives.flatten(1), distance[:, 0], options)
    asked, repel = repulsion(query, candidates, ids, options, limit, batch, key_batch)
    repelled, out = repel(sweeps(asked))
    attraction = _attraction(distance, t_pos, detach_weights)
    losses = weighted(alpha, attraction) + weighted(beta, repelled)
    value = batch.reduce_rows(losses, reduction)
    if not return_stats:
        return value
    with torch.no_grad():
        similarity = row_dot(query, positives, normalize=normalize, backend=backend)
    stats = _stats(batch.mean(similarity), [out], options, batch)
    if k == 1:
        rank = known(out.counts).rank.long()
        first = is_first(rank, distance.detach()[:, 0])
        stats = stats._replace(accuracy=batch.mean(first.to(value.dtype)), rank=rank)
    return value, stats


@loss_like(cacr)
def cacr_views(
    views: Tensor,
    *,
    t_pos: float = 1.0,
    t_neg: float = 2.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    cost: str = "euclidean",
    rbf_t: float = 2.0,
    detach_weights: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """CACR of V views (the official small-scale code of Zheng et al. 2023).

    The attraction is averaged over every view as query with the other V - 1 views as positives,
    the repulsion over the pairs of views v < u: view v of a row against view u of all other rows.

    Args:
        views: (V, N, D), V >= 2 views of N >= 2 samples.

    Returns:
        0-d, or (N,) with reduction="none".
    """
    check_features("views", views, (3,))
    _check_options(t_pos, t_neg, cost, rbf_t, reduction)
    v, n, _ = views.shape
    backend = resolve_backend(backend, views.device)
    batch, _ = join(group, n, exchange=exchange, views=views.transpose(0, 1))
    if v < 2 or batch.total < 2:
        raise ValueError(
            f"views must have shape (V, N, D) with V >= 2 and N >= 2, got {tuple(views.shape)}"
        )
    pairs = list(combinations(range(v), 2))
    found, z = view_distances(views, pairs, normalize, backend)
    distance = dict(zip(pairs, found.unbind(1), strict=True))
    attraction = add_up(
        _attraction(
            torch.stack([distance[min(i, j), max(i, j)] for j in range(v) if j != i], 1),
            t_pos,
            detach_weights,
        )
        for i in range(v)
    )
    own = batch.own_ids(views.device)
    options = Options(t_neg, cost, rbf_t, detach_weights, normalize, backend)
    asked: list[Asked] = []
    uses = []
    for i, j in pairs:
        limit = None
        if return_stats:
            limit = tie_limit_of(plain(z[i]), plain(z[j]), distance[i, j], options)
        each, repel = repulsion(z[i], z[j], (own, own), options, limit, batch, batch)
        uses.append((repel, slice(len(asked), len(asked) + len(each))))
        asked += each
    made = sweeps(asked)
    repulsions, swept = zip(*(repel(made[part]) for repel, part in uses), strict=True)
    losses = (alpha / v) * attraction + (beta / len(pairs)) * add_up(repulsions)
    value = batch.reduce_rows(losses, reduction)
    if not return_stats:
        return value
    with torch.no_grad():
        dots = [row_dot(views[i], views[j], normalize=normalize, backend=backend) for i, j in pairs]
    similarity = batch.mean(torch.stack(dots))
    stats = _stats(similarity, list(swept), options, batch)
    ranks = [known(out.counts).rank for out in swept]
    correct = torch.stack(
        [is_first(r, distance[pair].detach()) for r, pair in zip(ranks, pairs, strict=True)]
    )
    return value, stats._replace(accuracy=batch.mean(correct.to(value.dtype)))


@loss_like(cacr)
def cct(
    query: Tensor,
    positives: Tensor,
    *,
    negatives: Tensor | NegativeSource | None = None,
    t_pos: float = 1.0,
    t_neg: float = 2.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    detach_weights: bool = False,
    sharded_negatives: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """Contrastive conditional transport: the Euclidean form of `cacr` under its first name
    (arXiv 2105.03746, version 1)."""
    return cacr(
        query, positives, negatives=negatives, t_pos=t_pos, t_neg=t_neg, alpha=alpha, beta=beta,
        detach_weights=detach_weights, sharded_negatives=sharded_negatives, normalize=normalize,
        reduction=reduction, backend=backend, group=group, exchange=exchange,
        return_stats=return_stats,
    )  # fmt: skip


class CACR(ContrastiveLoss):
    function = staticmethod(cacr)


class CACRViews(ContrastiveLoss):
    function = staticmethod(cacr_views)


class CCT(ContrastiveLoss):
    function = staticmethod(cct)


def _check_options(t_pos: float, t_neg: float, cost: str, rbf_t: float, reduction: str) -> None:
    check_range("t_pos", t_pos, 0.0)
    check_positive("t_neg", t_neg)
    check_positive("rbf_t", rbf_t)
    check_reduction(reduction)
    if cost not in ("euclidean", "rbf"):
        raise ValueError(f'cost must be "euclidean" or "rbf", got {cost!r}')
    if cost == "rbf" and reduction != "mean":
        raise ValueError(
            f'reduction must be "mean" with cost="rbf", whose rows are coupled, got {reduction!r}'
        )


def _attraction(distance: Tensor, t_pos: float, detach: bool) -> Tensor:
    """sum_k softmax_k(t_pos d_ik) d_ik, (N,)."""
    if distance.shape[1] == 1:
        return distance.squeeze(1)
    distance = distance.T  # over few columns torch's softmax takes several times as long
    weight = torch.softmax(weighted(t_pos, distance), 0)
    return ((weight.detach() if detach else weight) * distance).sum(0)


def _stats(similarity: Tensor, sweeps: list[Sweep], options: Options, batch: Batch) -> LossStats:
    negative = None
    if options.normalize:
        counts = [known(out.counts) for out in sweeps]
        total = batch.total_of(add_up(each.total.sum() for each in counts))
        pairs = batch.total_of(add_up(each.pairs.sum() for each in counts))
        negative = total / pairs / (2 * options.t_neg)
    return LossStats(positive_similarity=similarity, negative_similarity=negative)
