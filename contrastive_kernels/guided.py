"""GISTEmbed: a guide model names the false negatives.

The options all losses share are described in `common.py`.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    Loss,
    LossStats,
    all_keys,
    check_reduction,
    check_views,
    gather_only,
    mean_of,
    reduce_rows,
    resolve_scale,
    scalar,
)
from .distributed import Group, collective, join
from .ops import check_features, check_pair, full_precision, row_dot
from .registration import NAMESPACE, statistics_dtype

MARGINS = ("absolute", "relative")
PAIRS = 2**20  # of which similarities are in memory at a time


@collective
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
    in the forward and again in the backward pass. That takes a few times 4 MiB (float32) whatever N
    is; the gradient cannot be differentiated again. With a `group` each rank also holds anchors,
    positives and their guides of all ranks, O(N (D + G)): there is no exchange="ring".

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

    Returns:
        0-d, or (N,) with reduction="none"; with return_stats=True also LossStats of
        positive_similarity and lse.
    """
    whole = group is None  # else the rank's part may be empty
    n = check_views("anchor", anchor, "positive", positive, rows=whole)
    _check_guide("anchor", anchor, anchor_guide)
    check_views("anchor_guide", anchor_guide, "positive_guide", positive_guide, rows=whole)
    check_reduction(reduction)
    scale, margin = resolve_scale(temperature, scale), scalar("margin", margin)
    if margin_strategy not in MARGINS:
        raise ValueError(
            f"margin_strategy must be one of {', '.join(MARGINS)}, got {margin_strategy!r}"
        )
    if (negatives is None) != (negatives_guide is None):
        raise ValueError("negatives and negatives_guide must be given together or not at all")
    if sharded_negatives and (whole or negatives is None):
        raise ValueError("sharded_negatives needs a group and negatives")
    m = 0
    if negatives is not None:
        check_features("negatives", negatives, (2,), rows=not sharded_negatives)
        check_pair(anchor, negatives, "anchor", "negatives")
        _check_guide("negatives", negatives, negatives_guide)
        check_pair(anchor_guide, negatives_guide, "anchor_guide", "negatives_guide")
        m = negatives.shape[0]
    gather_only("gist", exchange)
    shards, others = join(
        group, exchange, "gist", n, m, anchor=anchor, positive=positive,
        anchor_guide=anchor_guide.detach(), positive_guide=positive_guide.detach(),
        negatives=negatives, negatives_guide=negatives_guide, scale=scale, margin=margin,
        margin_strategy=margin_strategy, contrast_anchors=contrast_anchors,
        contrast_positives=contrast_positives, sharded_negatives=sharded_negatives or m,
        normalize=normalize, reduction=reduction, backend=backend, return_stats=return_stats,
    )  # fmt: skip

    dtype, dtype_guide = statistics_dtype(anchor), statistics_dtype(anchor_guide)
    anchor, positive = _unit(anchor, dtype, normalize), _unit(positive, dtype, normalize)
    with torch.no_grad():
        anchor_guide = _unit(anchor_guide, dtype_guide, normalize)
        positive_guide = _unit(positive_guide, dtype_guide, normalize)
        limit = row_dot(anchor_guide, positive_guide, backend=backend, shards=shards)
        # a pair as similar as the positive stays, however the two similarities were rounded
        rounding = 32 * torch.finfo(limit.dtype).eps * (1 + limit.abs())
        limit = limit + rounding - margin * (limit.abs() if margin_strategy == "relative" else 1)
    dot = row_dot(anchor, positive, backend=backend, shards=shards)
    pos = scale * dot

    anchors, positives = (scale * anchor, anchor_guide), (scale * positive, positive_guide)
    every_positive = all_keys(positive, shards), all_keys(positive_guide, shards)
    first = 0 if shards is None else shards.own.start
    contrasts = [_guided_lse(*anchors, *every_positive, limit, first)]
    if contrast_anchors:
        every_anchor = all_keys(anchor, shards), all_keys(anchor_guide, shards)
        contrasts.append(_guided_lse(*anchors, *every_anchor, limit, None))
    if contrast_positives:
        contrasts.append(_guided_lse(*positives, *every_positive, limit, None))
    if negatives is not None:
        others = others if sharded_negatives else None  # else every rank has them all
        keys = all_keys(_unit(negatives, dtype, normalize), others)
        keys_guide = all_keys(_unit(negatives_guide.detach(), dtype_guide, normalize), others)
        contrasts.append(_guided_lse(*anchors, keys, keys_guide, limit, None))
    rows = reduce(torch.logaddexp, (lse - pos for lse in contrasts), torch.zeros_like(pos))
    loss = reduce_rows(rows, reduction, shards)
    if not return_stats:
        return loss
    return loss, LossStats(positive_similarity=mean_of(dot, shards), lse=(rows + pos).detach())


def _check_guide(name: str, features: Tensor, guide: Tensor) -> None:
    """Raise unless `guide` has the rows and the device of `features`."""
    check_features(f"{name}_guide", guide, (2,), rows=False)
    if guide.shape[0] != features.shape[0] or guide.device != features.device:
        raise ValueError(
            f"{name}_guide must have the {features.shape[0]} rows of {name} on {features.device}, "
            f"got {guide.shape[0]} on {guide.device}"
        )


def _unit(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    return F.normalize(x.to(dtype), dim=1) if normalize else x.to(dtype)


@torch.library.custom_op(f"{NAMESPACE}::guided_lse", mutates_args=())
def _guided_lse(
    x: Tensor, x_guide: Tensor, y: Tensor, y_guide: Tensor, limit: Tensor, first: int | None
) -> Tensor:
    """lse_i = log sum_j exp(<x_i, y_j>) over the pairs with <x_guide_i, y_guide_j> <= limit_i, with
    `first` without j = first + i; -inf and no gradient for a row without a pair."""
    lse = torch.empty_like(limit, dtype=x.dtype)
    with full_precision(x):
        for rows in _blocks(x, y):
            lse[rows] = _logits(rows, x, x_guide, y, y_guide, limit, first).logsumexp(1)
    return lse


@torch.library.custom_op(f"{NAMESPACE}::guided_lse_backward", mutates_args=())
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
        for rows in _blocks(x, y):
            weights = _logits(rows, x, x_guide, y, y_guide, limit, first)
            weights.sub_(lse[rows, None]).exp_().mul_(grad[rows, None])
            torch.mm(weights, y, out=dx[rows])
            dy.addmm_(weights.T, x[rows])
    return dx, dy


def _blocks(x: Tensor, y: Tensor) -> list[slice]:
    """Blocks of rows of x that make about PAIRS pairs with y."""
    size = max(1, PAIRS // max(1, y.shape[0]))
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def _logits(
    rows: slice,
    x: Tensor,
    x_guide: Tensor,
    y: Tensor,
    y_guide: Tensor,
    limit: Tensor,
    first: int | None,
) -> Tensor:
    drop = x_guide[rows] @ y_guide.T > limit[rows, None]
    if first is not None:
        drop.diagonal(first + rows.start).fill_(True)
    return (x[rows] @ y.T).masked_fill_(drop, -torch.inf)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.first = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lse = ctx.saved_tensors
    dx, dy = _guided_lse_backward(*tensors, ctx.first, lse, grad)
    return dx, None, dy, None, None, None


_guided_lse.register_fake(lambda x, x_guide, y, y_guide, limit, first: x.new_empty(x.shape[0]))
_guided_lse_backward.register_fake(
    lambda x, x_guide, y, *_: (torch.empty_like(x), torch.empty_like(y))
)
_guided_lse.register_autograd(_backward, setup_context=_setup)
