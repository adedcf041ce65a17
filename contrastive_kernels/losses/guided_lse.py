"""logsumexp of logits without the pairs that a guide finds too similar, at several prefixes of the
features at once. A plain call has one, the whole; `shorter` are the ends of others.

A block of pairs adds the products of one slice of features after the other. Of units of all D, what
a prefix has so far is its similarity once it is divided by the lengths of both prefixes. The
backward pass goes from the longest prefix to the shortest, so that each slice is multiplied once,
by the sum of the coefficients of all the prefixes that have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import define, no_second_order, precise, register_rules
from ..ops import NAMESPACE, can_tie, full_precision, row_dot, tied
from ..reference import masked_softmax_stats
from ..types import known
from .algebra import SHORTEST, unit
from .units import Units, row_and_column_blocks, units

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def prefix_dots(
    x: Tensor, y: Tensor, shorter: Sequence[int], normalize: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(<x_i, y_i> (K, N) of all prefixes, x and y for the other products): of the very vectors that
    the other pairs are products of, whose rounding then is the same in both."""
    if can_tie(backend, x):
        dots, x, tied_y = tied(_UnitDots(shorter, normalize, backend), x, y)
        return dots.T, x, known(tied_y)
    of_x, of_y = unit(x, normalize), unit(y, normalize)
    dots = row_dot(of_x, of_y, backend=backend)
    parts = []
    for end in shorter:
        part = row_dot(of_x[:, :end], of_y[:, :end], backend=backend)
        parts.append(part / _share(x, end) / _share(y, end) if normalize else part)
    return torch.stack([*parts, dots]), x, y


def _share(x: Tensor, end: int) -> Tensor:
    """`Units.share`, (N,), as a node of the graph."""
    x = unit(x, False)
    part, whole = (t.norm(dim=1).clamp_min(SHORTEST) for t in (x[:, :end], x))
    return part / whole


class _UnitDots(NamedTuple):
    """The dots of all prefixes, (N, K), where x and y are tied."""

    shorter: Sequence[int]
    normalize: bool
    backend: str

    def values(self, x: Tensor, y: Tensor | None) -> Tensor:
        of_x, of_y = self._units(x, y)
        every = slice(None)
        pair = of_x.of(every), of_y.of(every)
        found = [
            row_dot(*(t[:, :end] for t in pair), backend=self.backend)
            / of_x.share(k, every).squeeze(1)
            / of_y.share(k, every).squeeze(1)
            for k, end in enumerate(self.shorter)
        ]
        return torch.stack([*found, row_dot(*pair, backend=self.backend)], 1)

    def gradients(
        self, x: Tensor, y: Tensor | None, values: Tensor, grad: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        of_x, of_y = self._units(x, y)
        every = slice(None)
        along = (grad * values).T
        coefficients = [
            grad[:, k, None] / of_x.share(k, every) / of_y.share(k, every)
            for k in range(len(self.shorter))
        ]

        def of(own: Units, other: Units) -> Tensor:
            vectors = other.of(every)
            total = grad[:, -1:] * vectors
            for end, each in zip(self.shorter, coefficients, strict=True):
                total[:, :end].addcmul_(each, vectors[:, :end])
            return own.gradient(total, along)

        dx = of(of_x, of_y) if needs[0] else None
        return dx, of(of_y, of_x).unsqueeze(1) if needs[1] else None

    def _units(self, x: Tensor, y: Tensor | None) -> tuple[Units, Units]:
        of_x, of_y = (units(t, self.normalize, self.shorter) for t in (x, known(y).squeeze(1)))
        return of_x, of_y


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
def guided_lse(
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
    shorter: Sequence[int],
) -> Tensor:
    """(2, C, K, N), for each contrast and prefix the two parts of lse_i = top_i + log sum_j
    exp(scale <x_i, y_j> - top_i) over the pairs with <x_guide_i, y_guide_j>, without guides
    <x_i, y_j>, <= limit_i, of which top_i is the largest logit. -inf and no gradient for a row
    without a pair. limit: (K, N), (1, N) with guides, which have no prefixes.

    In two parts, as softmax exp(z - top - log sum) adds up to 1 however large logits are. top is a
    constant to the gradient: what it does cancels.

    anchors, positives: those of all ranks, None: the same. kinds: whether anchors and positives are
    contrasted among themselves; whether all are normalised.
    """
    features = (anchor, positive, negatives, anchors, positives)
    guides = (anchor_guide, positive_guide, negatives_guide, anchors_guide, positives_guide)
    contrasts = _contrasts(features, anchor_guide is not None, first, kinds)
    sums = scale.new_zeros(len(contrasts), 1 + len(shorter), len(anchor))
    tops = torch.full_like(sums, torch.finfo(sums.dtype).min)  # -inf less this is -inf
    all_units = [None if t is None else units(t, kinds[2], shorter) for t in features]
    for i, rows, _, _, _, logits in _blocks(
        all_units, guides, limit, scale, contrasts, kinds[2], shorter
    ):
        for z, top, total in zip(logits, tops[i, :, rows], sums[i, :, rows], strict=True):
            above = torch.maximum(top, z.amax(1))
            total *= (top - above).exp_()
            total += z.sub_(above[:, None]).exp_().sum(1)
            top.copy_(above)
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
    shorter: Sequence[int],
    lse: Tensor,
    grad: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    features = (anchor, positive, negatives, anchors, positives)
    guides = (anchor_guide, positive_guide, negatives_guide, anchors_guide, positives_guide)
    contrasts, normalize = _contrasts(features, anchor_guide is not None, first, kinds), kinds[2]
    tops, sums = lse
    sums = sums.masked_fill(sums == -torch.inf, 0.0)  # no pair: exp(-inf) below, not exp(nan)
    all_units = [None if t is None else units(t, normalize, shorter) for t in features]
    made = [
        t.zeros(grad) if need and t is not None else None
        for t, need in zip(all_units, needs, strict=False)
    ]
    # of each feature and shorter prefix: the sum of dL/dz z, for the gradient of its length
    along = [None if t is None else grad.new_zeros(len(shorter), len(t)) for t in features]
    of_scale = torch.zeros_like(scale)
    for i, rows, columns, x, y, logits in _blocks(
        all_units, guides, limit, scale, contrasts, normalize, shorter
    ):
        of_x, of_y = contrasts[i][:2]
        to_x, to_y = made[of_x], made[of_y]
        total: Tensor | None = None
        for k in reversed(range(len(logits))):
            z = logits.pop()
            kept = None if k == len(shorter) else z.clamp_min(torch.finfo(z.dtype).min)
            weights = z.sub_(tops[i, k, rows, None]).sub_(sums[i, k, rows, None]).exp_()
            weights.mul_(grad[i, k, rows, None])
            if kept is not None:
                kept.mul_(weights)
                known(along[of_x])[k, rows] += kept.sum(1)
                known(along[of_y])[k, columns] += kept.sum(0)
                weights.div_(known(all_units[of_x]).share(k, rows))
                weights.div_(known(all_units[of_y]).share(k, columns).T)
            total = weights if total is None else total.add_(weights)
            part = _slice(shorter, k)
            if to_x is not None or needs[5]:
                attended = total @ y[:, part]
                of_scale += (attended * x[:, part]).sum()
                if to_x is not None:
                    to_x[rows, part].addcmul_(attended, scale)
            if to_y is not None:
                to_y[columns, part].addmm_(total.T, scale * x[:, part])
    found = [
        scale.new_empty(0) if each is None else known(t).gradient(each, known(radial))
        for t, each, radial in zip(all_units, made, along, strict=True)
    ]
    return found[0], found[1], found[2], found[3], found[4], of_scale


def _slice(shorter: Sequence[int], k: int) -> slice:
    """The features that prefix k has and shorter ones have not."""
    return slice(shorter[k - 1] if k else 0, shorter[k] if k < len(shorter) else None)


def _blocks(
    all_units: Sequence[Units | None],
    guides: Sequence[Tensor | None],
    limit: Tensor,
    scale: Tensor,
    contrasts: list[_Contrast],
    normalize: bool,
    shorter: Sequence[int],
) -> Iterator[tuple[int, slice, slice, Tensor, Tensor, list[Tensor]]]:
    """(number of the contrast, rows, columns, x and y of these, their logits at each prefix, -inf
    where a pair is dropped, to be written to) of one block of pairs after another."""
    all_guides = [None if t is None else units(t, normalize) for t in guides]
    dim = max(t.features.shape[1] for t in (all_units[0], all_guides[0]) if t is not None)
    with full_precision(limit):
        for i, contrast in enumerate(contrasts):
            x, y = (known(all_units[k]) for k in contrast[:2])
            x_guide, y_guide = (all_guides[k] for k in contrast[:2])
            sizes = len(x.features), len(y.features)
            for rows, blocks in row_and_column_blocks(*sizes, dim, 1 + len(shorter)):
                x_rows = x.of(rows)
                guide_rows = None if x_guide is None else x_guide.of(rows)
                for columns in blocks:
                    y_rows = y.of(columns)
                    shift = None
                    if contrast.first is not None:
                        shift = contrast.first + rows.start - columns.start
                    dropped = None
                    if guide_rows is not None:
                        similar = guide_rows @ known(y_guide).of(columns).T
                        dropped = _dropped(similar, limit[0, rows], shift)
                        del similar
                    logits: list[Tensor] = []
                    product = x_rows.new_zeros(())
                    for k in range(1 + len(shorter)):
                        part = _slice(shorter, k)
                        if k == 0:
                            product = x_rows[:, part] @ y_rows[:, part].T
                        else:
                            product.addmm_(x_rows[:, part], y_rows[:, part].T)
                        z = product
                        if k < len(shorter):
                            z = (product / x.share(k, rows)).div_(y.share(k, columns).T)
                        without = dropped
                        if without is None:
                            without = _dropped(z, limit[k, rows], shift)
                        logits.append(z.mul_(scale).masked_fill_(without, -torch.inf))
                    del product, z, without, dropped
                    yield i, rows, columns, x_rows, y_rows, logits


def _dropped(similar: Tensor, limit: Tensor, shift: int | None) -> Tensor:
    """The pairs above their row's limit, and those of row i and column i + shift."""
    dropped = similar > limit[:, None]
    if shift is not None and -dropped.shape[0] < shift < dropped.shape[1]:
        dropped.diagonal(shift).fill_(True)
    return dropped


@precise
def dense_guided_lse(*given: Any) -> Tensor:
    """The same of the whole alone, from whole matrices, differentiable any number of times."""
    features, guides, (limit, scale, first, kinds, _) = given[:5], given[5:10], given[10:]
    guided = guides[0] is not None
    tops, sums = [], []
    for contrast in _contrasts(features, guided, first, kinds):
        x, y = (unit(features[k], kinds[2]) for k in contrast[:2])
        z = similar = x @ y.T
        if guided:
            x_guide, y_guide = (unit(guides[k], kinds[2]) for k in contrast[:2])
            similar = x_guide @ y_guide.T
        dropped = similar.detach() > limit.T
        if contrast.first is not None:
            dropped.diagonal(contrast.first).fill_(True)
        z = scale * z
        top = z.detach().masked_fill(dropped, torch.finfo(z.dtype).min).amax(1)
        tops.append(top)
        sums.append(masked_softmax_stats(z - top[:, None], ~dropped)[0])
    return torch.stack((torch.stack(tops), torch.stack(sums))).unsqueeze(2)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.first, ctx.kinds, ctx.shorter = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lse = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:5], ctx.needs_input_grad[11]]
    made = _guided_lse_backward(*tensors, ctx.first, ctx.kinds, ctx.shorter, lse, grad[1], needs)
    found = [t if need else None for t, need in zip(made, needs, strict=True)]
    return *found[:5], *6 * (None,), found[5], None, None, None


def _fake(*given: Any) -> Tensor:
    contrasts = _contrasts(given[:5], given[5] is not None, *given[12:14])
    return given[11].new_empty(2, len(contrasts), 1 + len(given[14]), given[0].shape[0])


def _fake_backward(*given: Any) -> tuple[Tensor, ...]:
    features, scale, needs = given[:5], given[11], given[-1]
    return *(
        t.new_empty(t.shape) if need and t is not None else scale.new_empty(0)
        for t, need in zip(features, needs, strict=False)
    ), torch.empty_like(scale)  # fmt: skip


register_rules(_library, guided_lse, _fake, _backward, _setup)
register_rules(_library, _guided_lse_backward, _fake_backward, no_second_order)
