"""GISTEmbed: a guide model names the false negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd import define, no_second_order, precise, register_rules
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
from ..distributed import join
from ..ops import NAMESPACE, full_precision, row_dot
from ..reference import masked_softmax_stats
from ..types import Group, Loss, LossStats
from .algebra import gather_only, log_add, row_blocks, unit
from .base import ContrastiveLoss, loss
from .nested import nested
from .stats import tie_limit

MARGINS = ("absolute", "relative")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@loss
@nested("anchor", "positive", "negatives", fuses=lambda given: False)
def gist(
    anchor: Tensor,
    positive: Tensor,
    anchor_guide: Tensor,
    positive_guide: Tensor,
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

    No sweep knows the guide: similarities are made for blocks of rows, about 2**20 pairs at a time,
    in the forward and again in the backward pass, by torch's products on every backend but
    "reference". That takes a few times 4 MiB (float32) whatever N is. With a `group` each rank also
    holds anchors, positives and their guides of all ranks, O(N (D + G)): there is no
    exchange="ring".

    Args:
        anchor, positive: (N, D), row i of one belongs to row i of the other.
        anchor_guide, positive_guide: (N, G), the same texts in the guide; they get no gradient.
        negatives, negatives_guide: (M, D) and (M, G), shared by all anchors.
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
    _check_guide("anchor", anchor, anchor_guide)
    check_views("anchor_guide", anchor_guide, "positive_guide", positive_guide, whole=whole)
    check_reduction(reduction)
    scale, margin = resolve_scale(temperature, scale), scalar("margin", margin)
    check_choice("margin_strategy", margin_strategy, MARGINS)
    if (negatives is None) != (negatives_guide is None):
        raise ValueError("negatives and negatives_guide must be given together or not at all")
    if sharded_negatives and (whole or negatives is None):
        raise ValueError("sharded_negatives needs a group and negatives")
    m = 0
    if negatives is not None and negatives_guide is not None:
        check_features("negatives", negatives, (2,), whole=not sharded_negatives)
        check_pair(anchor, negatives, "anchor", "negatives")
        _check_guide("negatives", negatives, negatives_guide)
        check_pair(anchor_guide, negatives_guide, "anchor_guide", "negatives_guide")
        m = negatives.shape[0]
    gather_only("gist", exchange)
    backend = resolve_backend(backend, anchor.device)
    batch, others = join(
        group, n, m, exchange=exchange, anchor_guide=anchor_guide.detach(),
        positive_guide=positive_guide.detach(), replicated=not sharded_negatives,
    )  # fmt: skip

    anchor, positive = unit(anchor, normalize), unit(positive, normalize)
    with torch.no_grad():
        anchor_guide = unit(anchor_guide, normalize)
        positive_guide = unit(positive_guide, normalize)
        similar = row_dot(anchor_guide, positive_guide, backend=backend)
        # a pair as similar as the positive stays; the products of pairs are torch's
        limit = tie_limit(similar, anchor_guide, positive_guide, 1.0, normalize, "reference")
        limit = limit - margin * (similar.abs() if margin_strategy == "relative" else 1)
    dot = row_dot(anchor, positive, backend=backend)
    pos = scale * dot

    lse = _dense_guided_lse if backend == "reference" else _guided_lse
    anchors, positives = (scale * anchor, anchor_guide), (scale * positive, positive_guide)
    every_positive = batch.gather_keys(positive), batch.gather_keys(positive_guide)
    contrasts = [lse(*anchors, *every_positive, limit, batch.own.start)]
    if contrast_anchors:
        every_anchor = batch.gather_keys(anchor), batch.gather_keys(anchor_guide)
        contrasts.append(lse(*anchors, *every_anchor, limit, None))
    if contrast_positives:
        contrasts.append(lse(*positives, *every_positive, limit, None))
    if negatives is not None and negatives_guide is not None:
        keys, keys_guide = unit(negatives, normalize), unit(negatives_guide.detach(), normalize)
        if sharded_negatives:  # else every rank has them all
            keys, keys_guide = others.gather_keys(keys), others.gather_keys(keys_guide)
        contrasts.append(lse(*anchors, keys, keys_guide, limit, None))
    rows = log_add(torch.zeros_like(pos), *(part - pos for part in contrasts))
    value = batch.reduce_rows(rows, reduction)
    if not return_stats:
        return value
    return value, LossStats(positive_similarity=batch.mean(dot), lse=(rows + pos).detach())


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


@define(_library)
def _guided_lse(
    x: Tensor, x_guide: Tensor, y: Tensor, y_guide: Tensor, limit: Tensor, first: int | None
) -> Tensor:
    """lse_i = log sum_j exp(<x_i, y_j>) over the pairs with <x_guide_i, y_guide_j> <= limit_i, with
    `first` without j = first + i; -inf and no gradient for a row without a pair."""
    lse = torch.empty_like(limit, dtype=x.dtype)
    with full_precision(x):
        for rows in row_blocks(len(x), len(y)):
            lse[rows] = _logits(rows, x, x_guide, y, y_guide, limit, first).logsumexp(1)
    return lse


@define(_library)
def _guided_lse_backward(
    x: Tensor,
    x_guide: Tensor,
    y: Tensor,
    y_guide: Tensor,
    limit: Tensor,
    first: int | None,
    lse: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    dx, dy = torch.empty_like(x), torch.zeros_like(y)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # no pair: exp(-inf) below, not exp(nan)
    with full_precision(x):
        for rows in row_blocks(len(x), len(y)):
            weights = _logits(rows, x, x_guide, y, y_guide, limit, first)
            weights.sub_(lse[rows, None]).exp_().mul_(grad[rows, None])
            torch.mm(weights, y, out=dx[rows])
            dy.addmm_(weights.T, x[rows])
    return dx, dy


@precise
def _dense_guided_lse(
    x: Tensor, x_guide: Tensor, y: Tensor, y_guide: Tensor, limit: Tensor, first: int | None
) -> Tensor:
    """The same from the whole matrix, differentiable any number of times."""
    dropped = _dropped(slice(0, len(x)), x_guide, y_guide, limit, first)
    return masked_softmax_stats(x @ y.T, ~dropped)[0]


def _dropped(
    rows: slice, x_guide: Tensor, y_guide: Tensor, limit: Tensor, first: int | None
) -> Tensor:
    drop = x_guide[rows] @ y_guide.T > limit[rows, None]
    if first is not None:
        drop.diagonal(first + rows.start).fill_(True)
    return drop


def _logits(
    rows: slice,
    x: Tensor,
    x_guide: Tensor,
    y: Tensor,
    y_guide: Tensor,
    limit: Tensor,
    first: int | None,
) -> Tensor:
    drop = _dropped(rows, x_guide, y_guide, limit, first)
    return (x[rows] @ y.T).masked_fill_(drop, -torch.inf)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.first = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lse = ctx.saved_tensors
    dx, dy = _guided_lse_backward(*tensors, ctx.first, lse, grad)
    return dx, None, dy, None, None, None


register_rules(
    _library, _guided_lse, lambda x, x_guide, y, y_guide, limit, first: x.new_empty(x.shape[0]),
    _backward, _setup,
)  # fmt: skip
register_rules(
    _library, _guided_lse_backward,
    lambda x, x_guide, y, *_: (torch.empty_like(x), torch.empty_like(y)), no_second_order,
)  # fmt: skip
