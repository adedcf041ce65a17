"""GISTEmbed: a guide model names the false negatives."""

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

    No sweep knows the guide: similarities are made for blocks of at most 2**20 pairs, in the
    forward and again in the backward pass, by torch's products on every backend but "reference".
    That takes a few times 4 MiB (float32) whatever N is, and gradients of half features are summed
    in float32. With a `group` each rank also holds anchors, positives and their guides of all
    ranks, O(N (D + G)): there is no exchange="ring".

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

    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    if can_tie(backend, anchor):
        dot, anchor, tied_positive = tied(_UnitDots(**options), anchor, positive)
        dot, positive = dot.squeeze(1), known(tied_positive)
    else:
        dot = row_dot(unit(anchor, normalize), unit(positive, normalize), backend=backend)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=dot.dtype, device=dot.device)
    pos = scale * dot
    guides = (anchor_guide.detach(), positive_guide.detach())
    similar = row_dot(*guides, **options)
    # a pair as similar as the positive stays; the products of pairs are torch's
    limit = tie_limit(similar, *guides, 1.0, normalize, "reference")
    limit = limit - margin * (similar.abs() if margin_strategy == "relative" else 1)

    features: list[Tensor | None] = [anchor, positive, negatives, None, None]
    of_guide: list[Tensor | None] = [*guides, negatives_guide, None, None]
    for given in (features, of_guide):
        if isinstance(batch, Shards):
            given[3:] = [batch.gather_keys(known(t).to(dot.dtype)) for t in given[:2]]
        if sharded_negatives:  # else every rank has them all
            given[2] = others.gather_keys(known(given[2]).to(dot.dtype))
    lse = _dense_guided_lse if backend == "reference" else _guided_lse
    kinds = [contrast_anchors, contrast_positives, normalize]
    contrasts = lse(*features, *of_guide, limit, scale.to(dot.dtype), batch.own.start, kinds)
    rows = log_add(torch.zeros_like(pos), *(part - pos for part in contrasts.unbind()))
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
    is the positive of row i, which is left out; None: it is not among them."""

    x: int
    y: int
    first: int | None = None


def _contrasts(features: Sequence[Tensor | None], first: int, kinds: Sequence[bool]) -> list:
    anchors, positives = (0, 1) if features[3] is None else (3, 4)
    found = [_Contrast(0, positives, first)]
    if kinds[0]:
        found.append(_Contrast(0, anchors))
    if kinds[1]:
        found.append(_Contrast(1, positives))
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
    anchor_guide: Tensor,
    positive_guide: Tensor,
    negatives_guide: Tensor | None,
    anchors_guide: Tensor | None,
    positives_guide: Tensor | None,
    limit: Tensor,
    scale: Tensor,
    first: int,
    kinds: Sequence[bool],
) -> Tensor:
    """(C, N), for each contrast lse_i = log sum_j exp(scale <x_i, y_j>) over the pairs with
    <x_guide_i, y_guide_j> <= limit_i; -inf and no gradient for a row without a pair.

    anchors, positives: those of all ranks, None: the same. kinds: whether anchors and positives are
    contrasted among themselves; whether all are normalised.
    """
    features = (anchor, positive, negatives, anchors, positives)
    guides = (anchor_guide, positive_guide, negatives_guide, anchors_guide, positives_guide)
    contrasts = _contrasts(features, first, kinds)
    lse = scale.new_full((len(contrasts), len(anchor)), -torch.inf)
    for i, rows, _, x, y, dropped in _blocks(features, guides, limit, contrasts, kinds[2]):
        z = (scale * x @ y.T).masked_fill_(dropped, -torch.inf)
        lse[i, rows] = torch.logaddexp(lse[i, rows], z.logsumexp(1))
    return lse


@define(_library)
def _guided_lse_backward(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    anchors: Tensor | None,
    positives: Tensor | None,
    anchor_guide: Tensor,
    positive_guide: Tensor,
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
    contrasts = _contrasts(features, first, kinds)
    normalize = kinds[2]
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # no pair: exp(-inf) below, not exp(nan)
    made = [
        units(t, False).zeros(grad) if need and t is not None else None
        for t, need in zip(features, needs, strict=False)
    ]
    of_scale = torch.zeros_like(scale)
    for i, rows, columns, x, y, dropped in _blocks(features, guides, limit, contrasts, normalize):
        scaled = scale * x
        weights = (scaled @ y.T).masked_fill_(dropped, -torch.inf)
        weights.sub_(lse[i, rows, None]).exp_().mul_(grad[i, rows, None])
        to_x, to_y = made[contrasts[i].x], made[contrasts[i].y]
        if to_x is not None or needs[5]:
            attended = weights @ y
            of_scale += (attended * x).sum()
            if to_x is not None:
                to_x[rows].addcmul_(attended, scale)
        if to_y is not None:
            to_y[columns].addmm_(weights.T, scaled)
    found = [
        scale.new_empty(0) if total is None else units(known(t), normalize).gradient(total)
        for t, total in zip(features, made, strict=True)
    ]
    return found[0], found[1], found[2], found[3], found[4], of_scale


def _blocks(
    features: Sequence[Tensor | None],
    guides: Sequence[Tensor | None],
    limit: Tensor,
    contrasts: list[_Contrast],
    normalize: bool,
) -> Iterator[tuple[int, slice, slice, Tensor, Tensor, Tensor]]:
    """(number of the contrast, rows, columns, x and y of these, which of their pairs are dropped)
    of one block of pairs after another."""
    all_units = [None if t is None else units(t, normalize) for t in features]
    all_guides = [None if t is None else units(t, normalize) for t in guides]
    dim = max(known(t).shape[1] for t in (features[0], guides[0]))
    with full_precision(limit):
        for i, contrast in enumerate(contrasts):
            x, y = (known(all_units[k]) for k in contrast[:2])
            x_guide, y_guide = (known(all_guides[k]) for k in contrast[:2])
            sizes = len(x.features), len(y.features)
            for rows, blocks in row_and_column_blocks(*sizes, dim):
                x_rows, guide_rows = x.of(rows), x_guide.of(rows)
                for columns in blocks:
                    dropped = guide_rows @ y_guide.of(columns).T > limit[rows, None]
                    if contrast.first is not None:
                        shift = contrast.first + rows.start - columns.start
                        if -dropped.shape[0] < shift < dropped.shape[1]:
                            dropped.diagonal(shift).fill_(True)
                    yield i, rows, columns, x_rows, y.of(columns), dropped


@precise
def _dense_guided_lse(*given: Any) -> Tensor:
    """The same from whole matrices, differentiable any number of times."""
    features, guides, (limit, scale, first, kinds) = given[:5], given[5:10], given[10:]
    contrasts = _contrasts(features, first, kinds)
    found = []
    for contrast in contrasts:
        x, y = (unit(features[k], kinds[2]) for k in contrast[:2])
        x_guide, y_guide = (unit(guides[k], kinds[2]) for k in contrast[:2])
        dropped = x_guide @ y_guide.T > limit[:, None]
        if contrast.first is not None:
            dropped.diagonal(contrast.first).fill_(True)
        found.append(masked_softmax_stats(scale * x @ y.T, ~dropped)[0])
    return torch.stack(found)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.first, ctx.kinds = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lse = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:5], ctx.needs_input_grad[11]]
    made = _guided_lse_backward(*tensors, ctx.first, ctx.kinds, lse, grad, needs)
    found = [t if need else None for t, need in zip(made, needs, strict=True)]
    return *found[:5], *6 * (None,), found[5], None, None


def _fake(*given: Any) -> Tensor:
    features, (first, kinds) = given[:5], given[12:]
    return given[11].new_empty(len(_contrasts(features, first, kinds)), given[0].shape[0])


def _fake_backward(*given: Any) -> tuple[Tensor, ...]:
    features, scale, needs = given[:5], given[11], given[-1]
    return *(
        t.new_empty(t.shape) if need and t is not None else scale.new_empty(0)
        for t, need in zip(features, needs, strict=False)
    ), torch.empty_like(scale)  # fmt: skip


register_rules(_library, _guided_lse, _fake, _backward, _setup)
register_rules(_library, _guided_lse_backward, _fake_backward, no_second_order)
