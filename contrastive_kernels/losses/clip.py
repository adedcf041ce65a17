"""Losses of images and texts: CLIP's softmax and SigLIP's sigmoid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..backends import resolve_backend
from ..checks import check_other_rows, check_reduction, check_views, scalar
from ..distributed import join
from ..ops import operands, softplus_sweep, swept_positives
from ..types import Group, Loss, known
from .algebra import add_rows, softplus
from .base import ContrastiveLoss, loss
from .info_nce import contrast
from .nested import nested, weigh
from .stats import pair_stats, tie_limit


@loss
@nested("image_features", "text_features")
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
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
    whole = group is None  # else the rank's part may be empty
    n = check_views("image_features", image_features, "text_features", text_features, whole=whole)
    check_reduction(reduction)
    scale = scalar("logit_scale", logit_scale)
    backend = resolve_backend(backend, image_features.device)
    batch, none = join(group, n, exchange=exchange)
    check_other_rows("image_features", batch.total)
    return contrast(
        image_features, text_features, scale=scale, symmetric=True, normalize=normalize,
        reduction=reduction, backend=backend, batch=batch, others=none, return_stats=return_stats,
        ends=dims, weights=weights,
    )  # fmt: skip


@loss
@nested("image_features", "text_features")
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    *,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
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
    whole = group is None  # else the rank's part may be empty
    n = check_views("image_features", image_features, "text_features", text_features, whole=whole)
    check_reduction(reduction)
    scale, bias = scalar("logit_scale", logit_scale), scalar("logit_bias", logit_bias)
    backend = resolve_backend(backend, image_features.device)
    batch, _ = join(group, n, exchange=exchange)

    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    aligned, dot, image_features, text_features = swept_positives(
        image_features, text_features, batch, dots=return_stats, summed=reduction != "none",
        prefixes=dims is not None, **options,
    )  # fmt: skip
    pos = None if dot is None else scale * dot + bias
    ids = batch.own_ids(image_features.device)
    pairs = operands(
        image_features, text_features, scale=scale, bias=bias, exclude=(ids, ids), batch=batch,
        aligned=aligned, ends=dims, **options,
    )  # fmt: skip
    threshold = None
    if return_stats:
        threshold = tie_limit(known(pos), image_features, text_features, scale, **options)
    out = softplus_sweep(pairs, threshold=threshold, summed=reduction != "none")
    pos = known(out.partner if aligned else pos)
    if dims is not None:  # of rows, whatever the reduction
        return batch.reduce_rows(weigh(out.value + softplus(-pos), weights), reduction)
    value = add_rows(out.value, softplus(-pos), reduction, batch)
    if not return_stats:
        return value
    return value, pair_stats(known(dot), [out.counts], scale, batch, bias=bias)


class CLIPLoss(ContrastiveLoss):
    function = staticmethod(clip_loss)


class SigLIPLoss(ContrastiveLoss):
    function = staticmethod(siglip_loss)
