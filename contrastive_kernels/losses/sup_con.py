"""The supervised contrastive loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import once_differentiable
from ..backends import resolve_backend
from ..checks import (
    check_features,
    check_ids,
    check_other_rows,
    check_positive,
    check_reduction,
    resolve_scale,
)
from ..distributed import Batch, Shards, join
from ..ops import (
    BLOCK_ELEMENTS,
    add_class_dot_gradient,
    can_tie,
    class_dot,
    has_row_kernels,
    operands,
    own_gradient,
    squares,
    sum_rows,
    sweep,
    take_rows,
)
from ..types import Group, Loss, LossStats, Sweep, known, statistics_dtype
from .algebra import SHORTEST, count_equal_ids, may_look, softplus, unit
from .base import ContrastiveLoss, loss


@loss
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
        labels: integers or bools (N,).
        base_temperature: None: the temperature, so that the factor is 1.

    Returns:
        0-d, or with reduction="none" one loss for each anchor: (N,), or (N, V).
    """
    check_features("features", features, (2, 3), whole=group is None)
    check_reduction(reduction)
    scale = resolve_scale(temperature)
    if base_temperature is not None:
        check_positive("base_temperature", base_temperature)
    labels = check_ids("labels", labels, features.shape[:1])
    if labels.device != features.device:
        raise ValueError(
            f"labels and features must be on one device, got {labels.device} and {features.device}"
        )
    backend = resolve_backend(backend, features.device)
    batch, _ = join(group, features.shape[0], exchange=exchange)
    shape = features.shape[:-1]
    if features.dim() == 3:
        batch = batch.times(features.shape[1])
        labels = labels.repeat_interleave(features.shape[1])
        features = features.flatten(0, 1)
    n = features.shape[0]
    check_other_rows("features", batch.total)

    out = sup_con_rows(
        features, labels, scale=scale, normalize=normalize, batch=batch,
        threshold=features.new_zeros(n) if return_stats else None, backend=backend,
    )  # fmt: skip
    rows = out.loss
    if base_temperature is not None:
        rows = rows * (temperature / base_temperature)
    value = batch.reduce_rows(rows.view(shape) if reduction == "none" else rows, reduction)
    if not return_stats:
        return value
    # an only positive is not in the sweep
    lone, pos = out.positives == 1, out.positive.detach()
    lse, counts = out.sweep.lse.detach(), known(out.sweep.counts)
    positives = batch.total_of(out.positives.sum())
    negatives = batch.total_of((counts.pairs - torch.where(lone, 0, out.positives)).sum())
    total = batch.total_of((counts.total - torch.where(lone, 0.0, pos)).sum())
    stats = LossStats(
        positive_similarity=batch.total_of(pos.sum()) / (scale * positives),
        negative_similarity=total / (scale * negatives),
        lse=torch.where(lone, torch.logaddexp(lse, pos), lse),
    )
    return value, stats


class SupCon(ContrastiveLoss):
    function = staticmethod(sup_con)


class SupConRows(NamedTuple):
    """Of each anchor: its loss, the sum of the logits of its positives, the number of positives.

    sweep: the statistics of its candidates, without a positive that is the only one.
    """

    loss: Tensor
    positive: Tensor
    positives: Tensor
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
    backend: str,
    batch: Batch | None = None,
) -> SupConRows:
    """The rows of `sup_con`, for candidates that may be other features.

    An anchor with one positive has the loss softplus(lse of the negatives - its logit), which does
    not cancel near convergence; with more the loss is at least log 2.

    Args:
        features, labels: anchors (N, D) and their integers (N,).
        ref, ref_labels: candidates (M, D) and (M,); None: the other features.
        own: (N,), where each anchor is in ref itself, which is no candidate then.
        batch: without ref, the batch of the features, all of which are candidates.
    """
    batch = Batch(len(features)) if batch is None else batch
    n, m = features.shape[0], (features if ref is None else ref).shape[0]
    # a class has the place of its first anchor in the order of the labels, or n without an anchor
    ordered = batch.all_ids(labels).sort().values
    # 32 bits: kernels take such ids as they are
    place = ref_place = torch.searchsorted(ordered, labels, out_int32=True)
    if ref is None:
        count = torch.searchsorted(ordered, labels, right=True, out_int32=True) - place - 1
        only = ref_only = count == 1
    else:
        ref_labels, itself = known(ref_labels), 0 if own is None else 1
        count = count_equal_ids(labels, ref_labels) - itself
        ref_place = torch.searchsorted(ordered, ref_labels).clamp(max=n - 1)
        ref_place = torch.where(ordered[ref_place] == ref_labels, ref_place, n)
        only = count == 1
        ref_only = count_equal_ids(ref_labels, ref_labels) == 1 + itself
    # ids drop the anchor itself, and with it the only positive
    first = 1 + batch.total + batch.own.start
    ref_ids = torch.arange(first, first + m, dtype=torch.int32, device=labels.device)
    ref_ids = torch.where(ref_only, ref_place, ref_ids)
    ids = ref_ids
    if ref is not None:
        itself_ids = -1 if own is None else n + 1 + own
        ids = torch.where(only, place, itself_ids)
    dot = None
    if ref is None and not isinstance(batch, Shards):
        if can_tie(backend, features):
            dot, features = _ClassProducts.apply(features, place, normalize, backend)
        elif has_row_kernels(backend):
            dot = class_dot(features, place, normalize)
    pairs = operands(
        features, ref, scale=scale, exclude=(ids, ref_ids), normalize=normalize, backend=backend,
        batch=batch,
    )  # fmt: skip
    out = sweep(pairs, threshold=threshold)

    if dot is None:
        dot = _class_products(
            features, place, ref, ref_place, own, ordered, labels, normalize, batch, backend
        )
    pos = scale * dot
    gap = torch.addcmul(out.lse, dot, scale / count.clamp(min=1).to(dot.dtype), value=-1)
    loss = gap
    if not (may_look(count) and (count > 1).all()):
        loss = torch.where(count > 1, gap, softplus(gap.masked_fill(count == 0, -torch.inf)))
    return SupConRows(loss, pos, count, out)


def _class_products(
    features: Tensor,
    place: Tensor,
    ref: Tensor | None,
    ref_place: Tensor,
    own: Tensor | None,
    ordered: Tensor,
    labels: Tensor,
    normalize: bool,
    batch: Batch,
    backend: str,
) -> Tensor:
    """<z_i, the sum of the positives of i> (N,): one dot product, with the sum of its class."""
    n = features.shape[0]
    z = z_ref = unit(features, normalize)
    if ref is not None:
        z_ref = unit(ref, normalize)
    if not isinstance(batch, Shards):
        class_sum = take_rows(sum_rows(z_ref, ref_place, n + 1, backend), place, backend)
    else:  # a table of the classes that there are, which every rank needs
        classes = ordered.unique()
        which = torch.searchsorted(classes, labels)
        table = batch.sum(sum_rows(z, which, len(classes), backend))
        class_sum = take_rows(table, which, backend)
    if ref is None:
        class_sum = class_sum - z
    elif own is not None:
        class_sum = class_sum - take_rows(z_ref, own, backend)
    return (z * class_sum).sum(-1)


class _ClassProducts(torch.autograd.Function):
    """(`_class_products` of features among themselves, the features for a sweep and nothing else),
    by kernels or a few columns of the features at a time. Its gradient is added to that of the
    sweep in place.

    `_class_products` makes the same sums in plain torch, for autograd, compilers, other candidates
    and ranks. It could serve here too, but keeps three copies of the features until the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, place: Tensor, normalize: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.normalize, ctx.backend = normalize, backend
        ctx.set_materialize_grads(False)
        if has_row_kernels(backend):
            ctx.save_for_backward(x, place)
            return class_dot(x, place, normalize), x.view_as(x)
        norm = squares(x, backend=backend)[0].sqrt().unsqueeze(1) if normalize else None
        dot = x.new_zeros(x.shape[0], dtype=statistics_dtype(x))
        for columns in _column_blocks(x):
            z = _unit_columns(x, norm, columns)
            dot += (z * _others(z, place, backend)).sum(1)
        ctx.save_for_backward(x, place, norm)
        return dot, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_x: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return grad_x, None, None, None
        x, place, *norms = ctx.saved_tensors
        grad_x = own_gradient(x, grad_x, grad)
        if not norms:
            add_class_dot_gradient(grad_x, x, place, grad, ctx.normalize)
            return grad_x, None, None, None
        norm = norms[0]
        blocks, weight = _column_blocks(x), grad.unsqueeze(1)
        made = None
        along = torch.zeros_like(weight)
        for columns in blocks if norm is not None else ():
            z = _unit_columns(x, norm, columns)
            made = _gradient(z, place, weight, ctx.backend)
            along += (z * made).sum(1, keepdim=True)
        for columns in blocks:
            z = _unit_columns(x, norm, columns)
            if made is None or len(blocks) > 1:
                made = _gradient(z, place, weight, ctx.backend)
            if norm is not None:  # a norm that was raised to SHORTEST is a constant
                made = torch.addcmul(made, z, along.masked_fill(norm <= SHORTEST, 0.0), value=-1)
                made /= norm.clamp(min=SHORTEST)
            grad_x.narrow(1, columns.start, made.shape[1]).add_(made)
        return grad_x, None, None, None


def _column_blocks(x: Tensor) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // x.shape[0])
    return [slice(i, i + size) for i in range(0, x.shape[1], size)]


def _unit_columns(x: Tensor, norm: Tensor | None, columns: slice) -> Tensor:
    z = x[:, columns].to(statistics_dtype(x))
    return z if norm is None else z / norm.clamp(min=SHORTEST)


def _others(z: Tensor, place: Tensor, backend: str) -> Tensor:
    """For each row the sum of the other rows of its class."""
    return take_rows(sum_rows(z, place, len(z), backend), place, backend).sub_(z)


def _gradient(z: Tensor, place: Tensor, weight: Tensor, backend: str) -> Tensor:
    """Of sum_i weight_i <z_i, sum of the others>."""
    return (weight * _others(z, place, backend)).add_(_others(weight * z, place, backend))
