"""Losses within one set of features: every feature is an anchor, all others are candidates.

The options all losses share are described in `common.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    Loss,
    LossStats,
    check_other_rows,
    check_range,
    check_reduction,
    check_views,
    count_equal_ids,
    log_count,
    mean_of,
    pair_stats,
    reduce_rows,
    resolve_scale,
    softplus,
    sum_of,
    total_rows,
)
from .distributed import Group, Shards, collective, join
from .losses import mi_lower_bound
from .ops import Sweep, check_features, check_ids, check_positive, row_dot, statistics_dtype, sweep


@collective
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.1,
    scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """NT-Xent (SimCLR; Chen et al. 2020, eq. 1): InfoNCE of 2N anchors with 2N - 2 negatives each.

    loss_i = log(exp(s_i+) + sum_j exp(s_ij)) - s_i+,   s = <z, z> / temperature.

    Args:
        z1, z2: (N, D), two views.
        scale: number or tensor of one element (may be learned), instead of 1 / temperature.

    Returns:
        0-d, or (2N,) with reduction="none": the anchors of z1, then those of z2.
    """
    scale = resolve_scale(temperature, scale)
    check_reduction(reduction)
    shards = _join_views(
        group, exchange, "nt_xent", z1, z2, scale=scale, normalize=normalize,
        reduction=reduction, backend=backend, return_stats=return_stats,
    )  # fmt: skip
    dot, pos, out = _positives_and_negatives(
        z1, z2, scale, normalize, backend, return_stats, shards
    )
    rows = softplus(out.lse - pos)
    loss = reduce_rows(rows, reduction, _twice(shards))
    if not return_stats:
        return loss
    stats = pair_stats(dot, [out], scale, lse=rows + pos, shards=shards)
    negatives = 2 * total_rows(dot.shape[0], shards) - 2
    bound = mi_lower_bound(mean_of(rows, shards), negatives)
    return loss, stats._replace(mi_lower_bound=bound)


@collective
def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.1,
    scale: float | Tensor | None = None,
    sigma: float | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """Decoupled contrastive learning (Yeh et al. 2022): the positive leaves the denominator.

    loss_i = log sum_j exp(s_ij) - w_i s_i+ over the 2N - 2 negatives of NT-Xent; w_i = 1, or with
    `sigma` (DCLW) w_i = 2 - N softmax_i(<z1_i, z2_i> / sigma), which is differentiated too.

    Args:
        z1, z2: (N, D), two views; the loss is the mean of both directions.
        scale: number or tensor of one element (may be learned), instead of 1 / temperature.
        weight: (2N,), other weights w_i in the order of the anchors, instead of `sigma`.

    Returns:
        0-d, or (2N,) with reduction="none": the anchors of z1, then those of z2.
    """
    scale = resolve_scale(temperature, scale)
    check_reduction(reduction)
    if sigma is not None:
        check_positive("sigma", sigma)
        if weight is not None:
            raise ValueError("weight and sigma must not both be given")
    if weight is not None and weight.shape != (2 * len(z1),):
        raise ValueError(f"weight must have shape {(2 * len(z1),)}, got {tuple(weight.shape)}")
    shards = _join_views(
        group, exchange, "dcl", z1, z2, scale=scale, sigma=sigma, weight=weight,
        normalize=normalize, reduction=reduction, backend=backend, return_stats=return_stats,
    )  # fmt: skip
    dot, pos, out = _positives_and_negatives(
        z1, z2, scale, normalize, backend, return_stats, shards
    )
    if sigma is not None:
        logits = dot / sigma
        if shards is None:
            share = torch.softmax(logits, 0)
        else:
            share = torch.exp(logits - shards.logsumexp(logits))
        weight = (2 - total_rows(dot.shape[0], shards) * share).repeat(2)
    if weight is not None:
        pos = weight * pos
    loss = reduce_rows(out.lse - pos, reduction, _twice(shards))
    if not return_stats:
        return loss
    return loss, pair_stats(dot, [out], scale, lse=out.lse, shards=shards)


@collective
def debiased(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    tau_plus: float = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """Debiased contrastive loss (Chuang et al. 2020): `hcl` with beta = 0."""
    return hcl(
        z1, z2, temperature=temperature, tau_plus=tau_plus, beta=0.0, normalize=normalize,
        reduction=reduction, backend=backend, group=group, exchange=exchange,
        return_stats=return_stats,
    )  # fmt: skip


@collective
def hcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """Hard negative sampling (Robinson et al. 2021), debiased; no weight is detached.

    loss_i = log(1 + g_i / u_i),   u_i = exp(s_i+),
    g_i = max((R_i - tau_plus n u_i) / (1 - tau_plus), n exp(-1 / temperature)),
    R_i = n sum_j exp((1 + beta) s_ij) / sum_j exp(beta s_ij) over the n = 2N - 2 negatives.

    Args:
        z1, z2: (N, D), two views; the lower limit of g_i assumes unit vectors.
        tau_plus: prior of a negative being of the same class, in [0, 1).
        beta: concentration on hard negatives, >= 0; 0 is the debiased loss.

    Returns:
        0-d, or (2N,) with reduction="none": the anchors of z1, then those of z2.
    """
    scale = resolve_scale(temperature)
    check_reduction(reduction)
    check_range("tau_plus", tau_plus, 0.0, 1.0)
    check_range("beta", beta, 0.0)
    shards = _join_views(
        group, exchange, "hcl", z1, z2, scale=scale, tau_plus=tau_plus, beta=beta,
        normalize=normalize, reduction=reduction, backend=backend, return_stats=return_stats,
    )  # fmt: skip
    sharp = (1 + beta) * scale
    dot, pos, out = _positives_and_negatives(
        z1, z2, sharp, normalize, backend, return_stats, shards
    )
    pos = pos / (1 + beta)
    log_n = log_count(2 * total_rows(dot.shape[0], shards) - 2, pos.dtype)
    log_r = out.lse
    if beta > 0:
        weights = _sweep_negatives(z1, z2, beta * scale, normalize, backend, shards=shards)
        log_r = out.lse - weights.lse + log_n
    log_g = _log_debiased(log_r, pos + log_n, tau_plus).clamp(min=log_n - scale)
    loss = reduce_rows(softplus(log_g - pos), reduction, _twice(shards))
    return (loss, pair_stats(dot, [out], sharp, shards=shards)) if return_stats else loss


@collective
def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2, L_out).

    loss_i = -(temperature / base_temperature) mean_{p in P(i)} (s_ip - log sum_{a != i} exp(s_ia)),
    P(i) being the other features of the label of i; an anchor without one has loss 0.

    Args:
        features: (N, D), or (N, V, D): V views, each of them an anchor.
        labels: integers (N,).
        base_temperature: None: the temperature, so that the factor is 1.

    Returns:
        0-d, or with reduction="none" one loss for each anchor: (N,), or (N, V).
    """
    check_features("features", features, (2, 3), rows=group is None)
    check_reduction(reduction)
    scale = resolve_scale(temperature)
    if base_temperature is not None:
        check_positive("base_temperature", base_temperature)
    check_ids("labels", labels, features.shape[:1])
    if labels.device != features.device:
        raise ValueError(
            f"labels and features must be on one device, got {labels.device} and {features.device}"
        )
    shards, _ = join(
        group, exchange, "sup_con", features.shape[0], features=features, labels=labels,
        temperature=temperature, base_temperature=base_temperature, normalize=normalize,
        reduction=reduction, backend=backend, return_stats=return_stats,
    )  # fmt: skip
    shape = features.shape[:-1]
    if features.dim() == 3:
        shards = None if shards is None else shards.times(features.shape[1])
        labels = labels.repeat_interleave(features.shape[1])
        features = features.flatten(0, 1)
    n = features.shape[0]
    check_other_rows("features", total_rows(n, shards))

    out = sup_con_rows(
        features, labels, scale=scale, normalize=normalize, shards=shards,
        threshold=features.new_zeros(n) if return_stats else None, backend=backend,
    )  # fmt: skip
    rows = out.loss
    if base_temperature is not None:
        rows = rows * (temperature / base_temperature)
    loss = reduce_rows(rows.view(shape), reduction, shards)
    if not return_stats:
        return loss
    # an only positive is not in the sweep
    lone, pos = out.count == 1, out.positive.detach()
    lse = out.sweep.lse.detach()
    positives = sum_of(out.count, shards)
    negatives = sum_of(out.sweep.count - torch.where(lone, 0, out.count), shards)
    total = sum_of(out.sweep.total - torch.where(lone, 0.0, pos), shards)
    stats = LossStats(
        positive_similarity=sum_of(pos, shards) / (scale * positives),
        negative_similarity=total / (scale * negatives),
        lse=torch.where(lone, torch.logaddexp(lse, pos), lse),
    )
    return loss, stats


class SupConRows(NamedTuple):
    """Of each anchor: its loss, the sum of the logits of its positives, the number of positives.

    sweep: the statistics of its candidates, without a positive that is the only one.
    """

    loss: Tensor
    positive: Tensor
    count: Tensor
    sweep: Sweep


def sup_con_rows(
    features: Tensor,
    labels: Tensor,
    *,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    own: Tensor | None = None,
    scale: float | Tensor,
    normalize: bool = True,
    threshold: Tensor | None = None,
    backend: str = "auto",
    shards: Shards | None = None,
) -> SupConRows:
    """The rows of `sup_con`, for candidates that may be other features.

    An anchor with one positive has the loss softplus(lse of the negatives - its logit), which does
    not cancel near convergence; with more the loss is at least log 2.

    Args:
        features, labels: anchors (N, D) and their integers (N,).
        ref, ref_labels: candidates (M, D) and (M,); None: the other features.
        own: (N,), where each anchor is in ref itself, which is no candidate then.
        shards: without ref, the features of other ranks are candidates too.
    """
    n, m = features.shape[0], (features if ref is None else ref).shape[0]
    # a class has the place of its first anchor in the order of the labels, or n without an anchor
    ordered = (labels if shards is None else shards.all_ids(labels)).sort().values
    # 32 bits: kernels take such ids as they are
    place = ref_place = torch.searchsorted(ordered, labels, out_int32=True)
    if ref is None:
        count = torch.searchsorted(ordered, labels, right=True, out_int32=True) - place - 1
        only = ref_only = count == 1
    else:
        itself = 0 if own is None else 1
        count = count_equal_ids(labels, ref_labels) - itself
        ref_place = torch.searchsorted(ordered, ref_labels).clamp(max=n - 1)
        ref_place = torch.where(ordered[ref_place] == ref_labels, ref_place, n)
        only = count == 1
        ref_only = count_equal_ids(ref_labels, ref_labels) == 1 + itself
    # ids drop the anchor itself, and with it the only positive
    first = 1 + (n if shards is None else shards.total + shards.starts[shards.rank])
    ref_ids = torch.arange(first, first + m, dtype=torch.int32, device=labels.device)
    ref_ids = torch.where(ref_only, ref_place, ref_ids)
    ids = ref_ids
    if ref is not None:
        ids = torch.where(only, place, -1 if own is None else n + 1 + own)
    out = sweep(
        features, ref, scale=scale, exclude=(ids, ref_ids), normalize=normalize,
        threshold=threshold, backend=backend, shards=shards,
    )  # fmt: skip

    z = features.to(statistics_dtype(features))
    z = z_ref = F.normalize(z, dim=-1) if normalize else z
    if ref is not None:
        z_ref = ref.to(z.dtype)
        z_ref = F.normalize(z_ref, dim=-1) if normalize else z_ref
    # the sum over the positives of a row is one dot product, with the sum of its class
    if shards is None:
        class_sum = z.new_zeros(n + 1, z.shape[1]).index_add(0, ref_place, z_ref)
        class_sum = class_sum.index_select(0, place)
    else:  # a table of the classes that there are, which every rank needs
        classes = ordered.unique()
        which = torch.searchsorted(classes, labels)
        table = z.new_zeros(len(classes), z.shape[1]).index_add(0, which, z)
        class_sum = shards.sum(table).index_select(0, which)
    if ref is None:
        class_sum = class_sum - z
    elif own is not None:
        class_sum = class_sum - z_ref.index_select(0, own)
    pos = scale * (z * class_sum).sum(-1)
    gap = out.lse - pos / count.clamp(min=1)
    loss = torch.where(count > 1, gap, softplus(gap.masked_fill(count == 0, -torch.inf)))
    return SupConRows(loss, pos, count, out)


def _join_views(
    group: Group | None, exchange: str, loss: str, z1: Tensor, z2: Tensor, **arguments
) -> Shards | None:
    """Check the views; what `join` says of the N samples that they are of."""
    n = check_views("z1", z1, "z2", z2, rows=group is None)
    shards, _ = join(group, exchange, loss, n, z1=z1, z2=z2, **arguments)
    check_other_rows("z1", total_rows(n, shards))
    return shards


def _twice(shards: Shards | None) -> Shards | None:
    """The 2N anchors of N samples."""
    return None if shards is None else shards.times(2)


def _sweep_negatives(
    z1: Tensor,
    z2: Tensor,
    scale: float,
    normalize: bool,
    backend: str,
    threshold: Tensor | None = None,
    shards: Shards | None = None,
) -> Sweep:
    """Statistics of each of the 2N features against all but itself and its positive."""
    anchors = _twice(shards)
    if shards is None:
        ids = torch.arange(z1.shape[0], dtype=torch.int32, device=z1.device).repeat(2)
    else:
        ids = anchors.own_ids(z1.device, repeat=2)
    return sweep(
        torch.cat((z1, z2)), None, scale=scale, exclude=(ids, ids), normalize=normalize,
        threshold=threshold, backend=backend, shards=anchors,
    )  # fmt: skip


def _positives_and_negatives(
    z1: Tensor,
    z2: Tensor,
    scale: float,
    normalize: bool,
    backend: str,
    ranks: bool,
    shards: Shards | None,
) -> tuple[Tensor, Tensor, Sweep]:
    """(similarity of the positives (N,), their logits (2N,), the sweep over the negatives)."""
    dot = row_dot(z1, z2, normalize=normalize, backend=backend, shards=shards)
    pos = (scale * dot).repeat(2)
    threshold = pos.detach() if ranks else None
    return dot, pos, _sweep_negatives(z1, z2, scale, normalize, backend, threshold, shards)


def _log_debiased(log_r: Tensor, log_nu: Tensor, tau_plus: float) -> Tensor:
    """log((R - tau_plus n u) / (1 - tau_plus)), -inf where that is not positive."""
    if tau_plus == 0:
        return log_r
    share = torch.exp((math.log(tau_plus) + log_nu - log_r).clamp(max=0))
    positive = share < 1
    share = torch.where(positive, share, 0.0)  # the log must not see 0, not even in its gradient
    log_g = log_r + torch.log1p(-share) - math.log1p(-tau_plus)
    return torch.where(positive, log_g, -torch.inf)
