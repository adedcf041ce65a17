"""GISTEmbed: a guide model, or the model itself, names the false negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..checks import (
    check_choice,
    check_features,
    check_pair,
    check_reduction,
    check_views,
    resolve_scale,
    scalar,
)
from ..distributed import Shards, join
from ..ops import row_dot
from ..types import Group, Loss, LossStats, known
from .algebra import gather_only, log_add
from .base import ContrastiveLoss, loss
from .guided_lse import dense_guided_lse, guided_lse, prefix_dots
from .nested import nested, weigh
from .stats import tie_limit

MARGINS = ("absolute", "relative")


@loss
@nested("anchor", "positive", "negatives", swept=False)
def gist(
    anchor: Tensor,
    positive: Tensor,
    anchor_guide: Tensor | None = None,
    positive_guide: Tensor | None = None,
    *,
    negatives: Tensor | None = None,
    negatives_guide: Tensor | None = None,
    temperature: float = 0.01,
    scale: float | Tensor | None = None,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
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
    """GISTEmbed (Solatorio 2024): InfoNCE without the negatives that a guide finds too similar.

    loss_i = log(1 + sum_c exp(s_ic - s_i+)) over the pairs c of row i whose guide similarity is at
    most limit_i = g_i+ - margin ("absolute") or g_i+ - |g_i+| margin ("relative"); s = <., .> /
    temperature and g are similarities in the model and in the guide, s_i+ and g_i+ those of anchor
    i and its positive. The pairs: anchor i with the other positives, with `negatives`, with all
    anchors, and positive i with all positives. A pair of a feature with itself is dropped as all
    others are: not where the guide calls the positive as similar.

    Without guides the model is its own: g is <., .>, a constant to the gradient, of which there is
    no second product, and no feature is paired with itself. margin=-0.1 is then the mask of
    Qwen3-Embedding (Zhang et al. 2025, eq. 2), which keeps s_ic <= s_i+ + 0.1 of similarities s.

    No sweep knows the guide: similarities are made for blocks of at most 2**20 pairs, in the
    forward and again in the backward pass, by torch's products on every backend but "reference".
    Those of all `dims` come from one pass, in smaller blocks, with the products of one call. That
    takes a few times 4 MiB (float32) whatever N is, and gradients of half features are summed
    in float32. With a `group` each rank also holds anchors, positives and their guides of all
    ranks, O(N (D + G)): there is no exchange="ring".

    Args:
        anchor, positive: (N, D), row i of one belongs to row i of the other.
        anchor_guide, positive_guide: (N, G), the same texts in the guide, without gradient; None,
            both: the model is the guide.
        negatives, negatives_guide: (M, D) and, with a guide, (M, G), shared by all anchors.
        scale: number or tensor of one element (may be learned), instead of 1 / temperature.
        margin: how much less similar than the positive a negative has to be.
        margin_strategy: "absolute" or "relative".
        sharded_negatives: with a `group`, whether `negatives` and their guide are this rank's part
            of them; else every rank has all of them.
        contrast_anchors: whether anchors are contrasted with anchors.
        contrast_positives: whether positives are contrasted with positives.
        normalize: of the guide too.
        exchange: "auto" or "gather".

    Returns:
        0-d, or (N,) with reduction="none"; with return_stats=True also LossStats of
        positive_similarity and lse.
    """
    whole = group is None  # else the rank's part may be empty
    n = check_views("anchor", anchor, "positive", positive, whole=whole)
    guided = anchor_guide is not None
    if guided != (positive_guide is not None):
        raise ValueError("anchor_guide and positive_guide must be given together or not at all")
    if anchor_guide is not None and positive_guide is not None:
        _check_guide("anchor", anchor, anchor_guide)
        check_views("anchor_guide", anchor_guide, "positive_guide", positive_guide, whole=whole)
        anchor_guide, positive_guide = anchor_guide.detach(), positive_guide.detach()
    check_reduction(reduction)
    scale, margin = resolve_scale(temperature, scale), scalar("margin", margin)
    check_choice("margin_strategy", margin_strategy, MARGINS)
    if not guided and negatives_guide is not None:
        raise ValueError("negatives_guide must be None without anchor_guide and positive_guide")
    if guided and (negatives is None) != (negatives_guide is None):
        raise ValueError("negatives and negatives_guide must be given together or not at all")
    if sharded_negatives and (whole or negatives is None):
        raise ValueError("sharded_negatives needs a group and negatives")
    m = 0
    if negatives is not None:
        check_features("negatives", negatives, (2,), whole=not sharded_negatives)
        check_pair(anchor, negatives, "anchor", "negatives")
        m = negatives.shape[0]
    if anchor_guide is not None and negatives is not None and negatives_guide is not None:
        _check_guide("negatives", negatives, negatives_guide)
        check_pair(anchor_guide, negatives_guide, "anchor_guide", "negatives_guide")
    gather_only("gist", exchange)
    backend = resolve_backend(backend, anchor.device)
    batch, others = join(
        group, n, m, exchange=exchange, anchor_guide=anchor_guide,
        positive_guide=positive_guide, replicated=not sharded_negatives,
    )  # fmt: skip

    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    shorter = [] if dims is None else list(dims[:-1])
    dot, anchor, positive = prefix_dots(anchor, positive, shorter, **options)  # (K, N)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=dot.dtype, device=dot.device)
    pos = scale * dot
    if anchor_guide is None or positive_guide is None:
        similar = dot.detach()
        ends = [*shorter, None]
        pairs = [(anchor.detach()[:, :end], positive.detach()[:, :end]) for end in ends]
    else:
        pairs = [(anchor_guide, positive_guide)]
        similar = row_dot(*pairs[0], **options).unsqueeze(0)
    # a pair as similar as the positive stays; the products of pairs are torch's
    limit = torch.stack(
        [
            tie_limit(own, *pair, 1.0, normalize, "reference")
            for own, pair in zip(similar, pairs, strict=True)
        ]
    )
    limit = limit - margin * (similar.abs() if margin_strategy == "relative" else 1)

    features: list[Tensor | None] = [anchor, positive, negatives, None, None]
    of_guide: list[Tensor | None] = [anchor_guide, positive_guide, negatives_guide, None, None]
    for given in (features, of_guide) if guided else (features,):
        if isinstance(batch, Shards):
            given[3:] = [batch.gather_keys(known(t).to(dot.dtype)) for t in given[:2]]
        if sharded_negatives:  # else every rank has them all
            given[2] = others.gather_keys(known(given[2]).to(dot.dtype))
    lse = dense_guided_lse if backend == "reference" else guided_lse
    kinds = [contrast_anchors, contrast_positives, normalize]
    made = lse(*features, *of_guide, limit, scale.to(dot.dtype), batch.own.start, kinds, shorter)
    # of large logits what is left of the difference of two, before anything smaller is added
    parts = (made[0].detach() - pos) + made[1]
    rows = log_add(torch.zeros_like(pos), *parts.unbind())
    value = batch.reduce_rows(weigh(rows, weights or [1.0]), reduction)
    if not return_stats:
        return value
    return value, LossStats(positive_similarity=batch.mean(dot[-1]), lse=(rows + pos)[-1].detach())


class GIST(ContrastiveLoss):
    function = staticmethod(gist)


def _check_guide(name: str, features: Tensor, guide: Tensor) -> None:
    """Raise unless `guide` has the rows and the device of `features`."""
    check_features(f"{name}_guide", guide, (2,), whole=False)
    if guide.shape[0] != features.shape[0] or guide.device != features.device:
        raise ValueError(
            f"{name}_guide must have the {features.shape[0]} rows of {name} on {features.device}, "
            f"got {guide.shape[0]} on {guide.device}"
        )
