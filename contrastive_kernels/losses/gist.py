"""GISTEmbed: a guide model, or the model itself, names the false negatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
from ..distributed import Shards, join
from ..ops import NAMESPACE, can_tie, full_precision, row_dot, tied
from ..reference import masked_softmax_stats
from ..types import Group, Loss, LossStats, known
from .algebra import gather_only, log_add, unit
from .base import ContrastiveLoss, loss
from .nested import nested
from .stats import tie_limit
from .units import row_and_column_blocks, units

MARGINS = ("absolute", "relative")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@loss
@nested("anchor", "positive", "negatives", fuses=lambda given: False)
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
    That takes a few times 4 MiB (float32) whatever N is, and gradients of half features are summed
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
    if can_tie(backend, anchor):
        dot, anchor, tied_positive = tied(_UnitDots(**options), anchor, positive)
        dot, positive = dot.squeeze(1), known(tied_positive)
    else:
        dot = row_dot(unit(anchor, normalize), unit(positive, normalize), backend=backend)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=dot.dtype, device=dot.device)
    pos = scale * dot
    if anchor_guide is None or positive_guide is None:
        similar, pair = dot.detach(), (anchor.detach(), positive.detach())
    else:
        pair = anchor_guide, positive_guide
        similar = row_dot(*pair, **options)
    # a pair as similar as the positive stays; the products of pairs are torch's
    limit = tie_limit(similar, *pair, 1.0, normalize, "reference")
    limit = limit - margin * (similar.abs() if margin_strategy == "relative" else 1)

    features: list[Tensor | None] = [anchor, positive, negatives, None, None]
    of_guide: list[Tensor | None] = [anchor_guide, positive_guide, negatives_guide, None, None]
    for given in (features, of_guide) if guided else (features,):
        if isinstance(batch, Shards):
            given[3:] = [batch.gather_keys(known(t).to(dot.dtype)) for t in given[:2]]
        if sharded_negatives:  # else every rank has them all
            given[2] = others.gather_keys(known(given[2]).to(dot.dtype))
    lse = _dense_guided_lse if backend == "reference" else _guided_lse
    kinds = [contrast_anchors, contrast_positives, normalize]
    made = lse(*features, *of_guide, limit, scale.to(dot.dtype), batch.own.start, kinds)
    # of large logits what is left of the difference of two, before anything smaller is added
    parts = (made[0].detach() - pos) + made[1]
    rows = log_add(torch.zeros_like(pos), *parts.unbind())
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


class _UnitDots(NamedTuple):
    """<x_i, y_i> of the very vectors that the other pairs are products of, whose rounding then is
    the same in both."""

    normalize: bool
    backend: str

    def values(self, x: Tensor, y: Tensor | None) -> Tensor:
        pair = (unit(t, self.normalize) for t in (x, known(y).squeeze(1)))
        return row_dot(*pair, backend=self.backend).unsqueeze(1)

    def gradients(
        self, x: Tensor, y: Tensor | None, values: Tensor, grad: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        of_x, of_y = (units(t, self.normalize) for t in (x, known(y).squeeze(1)))
        every = slice(None)
        dx = of_x.gradient(grad * of_y.of(every)) if needs[0] else None
        dy = of_y.gradient(grad * of_x.of(every)) if needs[1] else None
        return dx, None if dy is None else dy.unsqueeze(1)


class _Contrast(NamedTuple):
    """Anchors or positives x against keys y, by their places among features. first: key first + i
    is row i's own, its positive or without a guide itself, which is left out; None: none is."""

    x: int
    y: int
    first: int | None = None


def _contrasts(
    features: Sequence[Tensor | None], guided: bool, first: int, kinds: Sequence[bool]
) -> list[_Contrast]:
    anchors, positives = (0, 1) if features[3] is None else (3, 4)
    itself = None if guided else first
    found = [_Contrast(0, positives, first)]
    if kinds[0]:
        found.append(_Contrast(0, anchors, itself))
    if kinds[1]:
        found.append(_Contrast(1, positives, itself))
    if features[2] is not None:
        found.append(_Contrast(0, 2))
    return found


@define(_library)
def _guided_lse(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    anchors: Tensor | None,
    positives: Tensor | None,
    anchor_guide: Tensor | None,
    positive_guide: Tensor | None,
    negatives_guide: Tensor | None,
    anchors_guide: Tensor | None,
    positives_guide: Tensor | None,
    limit: Tensor,
    scale: Tensor,
    first: int,
    kinds: Sequence[bool],
) -> Tensor:
    """(2, C, N), for each contrast the two parts of lse_i = top_i + log sum_j exp(scale <x_i, y_j>
    - top_i) over the pairs with <x_guide_i, y_guide_j>, without guides <x_i, y_j>, <= limit_i, of
    which top_i is the largest logit. -inf and no gradient for a row without a pair.

    In two parts, as softmax exp(z - top - log sum) adds up to 1 however large logits are. top is a
    constant to the gradient: what it does cancels.

    anchors, positives: those of all ranks, None: the same. kinds: whether anchors and positives are
    contrasted among themselves; whether all are normalised.
    """
    features = (anchor, positive, negatives, anchors, positives)
    guides = (anchor_guide, positive_guide, negatives_guide, anchors_guide, positives_guide)
    contrasts = _contrasts(features, anchor_guide is not None, first, kinds)
    sums = scale.new_zeros(len(contrasts), len(anchor))
    tops = torch.full_like(sums, torch.finfo(sums.dtype).min)  # -inf less this is -inf
    for i, rows, _, _, _, z in _blocks(features, guides, limit, scale, contrasts, kinds[2]):
        top = torch.maximum(tops[i, rows], z.amax(1))
        sums[i, rows] *= (tops[i, rows] - top).exp_()
        sums[i, rows] += z.sub_(top[:, None]).exp_().sum(1)
        tops[i, rows] = top
    return torch.stack((tops, sums.log_()))


@define(_library)
def _guided_lse_backward(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    anchors: Tensor | None,
    positives: Tensor | None,
    anchor_guide: Tensor | None,
    positive_guide: Tensor | None,
    negatives_guide: Tensor | None,
    anchors_guide: Tensor | None,
    positives_guide: Tensor | None,
    limit: Tensor,
    scale: Tensor,
    first: int,
    kinds: Sequence[bool],
    lse: Tensor,
    grad: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    features = (anchor, positive, negatives, anchors, positives)
    guides = (anchor_guide, positive_guide, negatives_guide, anchors_guide, positives_guide)
    contrasts, normalize = _contrasts(features, anchor_guide is not None, first, kinds), kinds[2]
    tops, sums = lse
    sums = sums.masked_fill(sums == -torch.inf, 0.0)  # no pair: exp(-inf) below, not exp(nan)
    made = [
        units(t, False).zeros(grad) if need and t is not None else None
        for t, need in zip(features, needs, strict=False)
    ]
    of_scale = torch.zeros_like(scale)
    for i, rows, columns, x, y, z in _blocks(features, guides, limit, scale, contrasts, normalize):
        weights = z.sub_(tops[i, rows, None]).sub_(sums[i, rows, None]).exp_()
        weights.mul_(grad[i, rows, None])
        to_x, to_y = made[contrasts[i].x], made[contrasts[i].y]
        if to_x is not None or needs[5]:
            attended = weights @ y
            of_scale += (attended * x).sum()
            if to_x is not None:
                to_x[rows].addcmul_(attended, scale)
        if to_y is not None:
            to_y[columns].addmm_(weights.T, scale * x)
    found = [
        scale.new_empty(0) if total is None else units(known(t), normalize).gradient(total)
        for t, total in zip(features, made, strict=True)
    ]
    return found[0], found[1], found[2], found[3], found[4], of_scale


def _blocks(
    features: Sequence[Tensor | None],
    guides: Sequence[Tensor | None],
    limit: Tensor,
    scale: Tensor,
    contrasts: list[_Contrast],
    normalize: bool,
) -> Iterator[tuple[int, slice, slice, Tensor, Tensor, Tensor]]:
    """(number of the contrast, rows, columns, x and y of these, their logits, -inf where a pair is
    dropped, to be written to) of one block of pairs after another."""
    all_units = [None if t is None else units(t, normalize) for t in features]
    all_guides = [None if t is None else units(t, normalize) for t in guides]
    dim = max(t.shape[1] for t in (features[0], guides[0]) if t is not None)
    with full_precision(limit):
        for i, contrast in enumerate(contrasts):
            x, y = (known(all_units[k]) for k in contrast[:2])
            x_guide, y_guide = (all_guides[k] for k in contrast[:2])
            sizes = len(x.features), len(y.features)
            for rows, blocks in row_and_column_blocks(*sizes, dim):
                x_rows = x.of(rows)
                guide_rows = None if x_guide is None else x_guide.of(rows)
                for columns in blocks:
                    y_rows = y.of(columns)
                    z = similar = x_rows @ y_rows.T
                    if guide_rows is not None:
                        similar = guide_rows @ known(y_guide).of(columns).T
                    dropped = similar > limit[rows, None]
                    if contrast.first is not None:
                        shift = contrast.first + rows.start - columns.start
                        if -dropped.shape[0] < shift < dropped.shape[1]:
                            dropped.diagonal(shift).fill_(True)
                    z.mul_(scale).masked_fill_(dropped, -torch.inf)
                    del similar, dropped
                    yield i, rows, columns, x_rows, y_rows, z


@precise
def _dense_guided_lse(*given: Any) -> Tensor:
    """The same from whole matrices, differentiable any number of times."""
    features, guides, (limit, scale, first, kinds) = given[:5], given[5:10], given[10:]
    guided = guides[0] is not None
    tops, sums = [], []
    for contrast in _contrasts(features, guided, first, kinds):
        x, y = (unit(features[k], kinds[2]) for k in contrast[:2])
        z = similar = x @ y.T
        if guided:
            x_guide, y_guide = (unit(guides[k], kinds[2]) for k in contrast[:2])
            similar = x_guide @ y_guide.T
        dropped = similar.detach() > limit[:, None]
        if contrast.first is not None:
            dropped.diagonal(contrast.first).fill_(True)
        z = scale * z
        top = z.detach().masked_fill(dropped, torch.finfo(z.dtype).min).amax(1)
        tops.append(top)
        sums.append(masked_softmax_stats(z - top[:, None], ~dropped)[0])
    return torch.stack((torch.stack(tops), torch.stack(sums)))


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.first, ctx.kinds = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lse = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:5], ctx.needs_input_grad[11]]
    made = _guided_lse_backward(*tensors, ctx.first, ctx.kinds, lse, grad[1], needs)
    found = [t if need else None for t, need in zip(made, needs, strict=True)]
    return *found[:5], *6 * (None,), found[5], None, None


def _fake(*given: Any) -> Tensor:
    contrasts = _contrasts(given[:5], given[5] is not None, *given[12:])
    return given[11].new_empty(2, len(contrasts), given[0].shape[0])


def _fake_backward(*given: Any) -> tuple[Tensor, ...]:
    features, scale, needs = given[:5], given[11], given[-1]
    return *(
        t.new_empty(t.shape) if need and t is not None else scale.new_empty(0)
        for t, need in zip(features, needs, strict=False)
    ), torch.empty_like(scale)  # fmt: skip


register_rules(_library, _guided_lse, _fake, _backward, _setup)
register_rules(_library, _guided_lse_backward, _fake_backward, no_second_order)
