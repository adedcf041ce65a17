"""The triplet loss, of triplets that are mined in the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..autograd import define, no_second_order, precise, register_rules
from ..backends import resolve_backend
from ..checks import (
    check_choice,
    check_device,
    check_features,
    check_ids,
    check_other_rows,
    check_reduction,
    finite,
)
from ..distributed import Batch, Shards, join
from ..ops import NAMESPACE, full_precision, take_rows, top_k
from ..types import Group, TopK, known, statistics_dtype
from .algebra import add_up, count_equal_ids, row_blocks, softplus, unit
from .base import ContrastiveLoss, loss
from .nearest import distances_to, in_blocks
from .units import Units, units

MINING = ("hard", "semihard")
DISTANCES = ("euclidean", "squared_euclidean", "cosine")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@loss
def triplet(
    features: Tensor,
    labels: Tensor,
    *,
    mining: str = "hard",
    margin: float | None = 0.2,
    distance: str = "euclidean",
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """Triplet loss of the hard or the semi-hard triplets of a batch.

    "hard" (Hermans et al. 2017, eq. 5): loss_i = max(d_ip - d_in + margin, 0), p the farthest other
    row of the label of i and n the nearest row of another label; without a margin
    log(1 + exp(d_ip - d_in)), their soft margin.

    "semihard" (Schroff et al. 2015, FaceNet, sec. 3.2): loss_i = N / P sum_p max(d_ip - d_in(p) +
    margin, 0) over all p of the label of i, n(p) the nearest of those rows of another label that
    are farther than p, or where none is the farthest of all; P is the number of pairs (i, p) in the
    batch, so that the mean is over these.

    A row with no p or no n has loss 0. Of equals the first is taken.

    "hard" is `top_k` twice. "semihard" needs for each pair a row of its own in such a sweep, so
    that distances are made and sorted for blocks of rows, 2**18 pairs at a time, in the
    forward and again in the backward pass, by torch on every backend.

    Args:
        features: (N, D).
        labels: integers or bools (N,).
        mining: "hard" or "semihard".
        margin: a number; None: the soft margin, of "hard" only.
        distance: "euclidean"; "squared_euclidean" (FaceNet's); or "cosine", 1 - cos, which needs
            normalize=True.
    """
    check_features("features", features, (2,), whole=group is None)
    labels = check_ids("labels", labels, features.shape[:1]).contiguous()
    check_device("labels", labels, features.device)
    check_choice("mining", mining, MINING)
    check_choice("distance", distance, DISTANCES)
    check_reduction(reduction)
    if margin is not None:
        finite("margin", margin)
    elif mining != "hard":
        raise ValueError(f'margin must be a number with mining="{mining}", got None')
    if distance == "cosine" and not normalize:
        raise ValueError('distance must be a Euclidean one with normalize=False, got "cosine"')
    backend = resolve_backend(backend, features.device)
    batch, _ = join(group, features.shape[0])
    check_other_rows("features", batch.total)
    if mining == "hard":
        if in_blocks(features, batch, backend):
            rows = _hard_in_blocks(features, labels, margin, distance, normalize, backend)
        else:
            rows = _hard(unit(features, normalize), labels, margin, distance, batch, backend)
        return batch.reduce_rows(rows, reduction)
    every = batch.all_ids(labels)
    chosen = labels, every, batch.own.start, float(margin or 0), distance
    if backend == "reference":
        x = unit(features, normalize)
        rows = _dense_semi_hard(x, batch.gather_keys(x), *chosen)
    else:
        keys = batch.gather_keys(features) if isinstance(batch, Shards) else None
        rows = _semi_hard(features, keys, *chosen, normalize)
    pairs = batch.total_of(count_equal_ids(labels, every).sum()) - batch.total
    rows = rows * (batch.total / pairs.clamp(min=1).to(rows.dtype))
    return batch.reduce_rows(rows, reduction)


class Triplet(ContrastiveLoss):
    function = staticmethod(triplet)


def _hard(
    x: Tensor, labels: Tensor, margin: float | None, distance: str, batch: Batch, backend: str
) -> Tensor:
    ids, every = batch.own_ids(x.device), batch.all_ids(labels)
    keys, places = batch.gather_keys(x), batch.all_ids(ids)
    if len(x) == 0:  # a rank without rows
        return keys[:0].sum(1)
    with torch.no_grad():
        origin = keys.detach().nanmean(0)
        own = _Rows(x.detach() - origin, labels, ids)
        others = _Rows(keys.detach() - origin, every, places)
        farthest, nearest = (found.ids.squeeze(1) for found in _mine(own, others, backend))
        there = (farthest >= 0) & (nearest >= 0)
    of_positive, of_negative = (
        _length(x - take_rows(keys, which.clamp(min=0), backend), distance)
        for which in (farthest, nearest)
    )
    return _excess(of_positive - of_negative, there, margin)


def _hard_in_blocks(
    features: Tensor,
    labels: Tensor,
    margin: float | None,
    distance: str,
    normalize: bool,
    backend: str,
) -> Tensor:
    """The same, of features that are made unit where they are taken."""
    x, ids = units(features.detach(), normalize), torch.arange(len(features))
    origin = add_up(x.of(rows).nansum(0) for rows in x.blocks()) / len(features)

    def block(rows: slice) -> _Rows:
        return _Rows(x.of(rows) - origin, labels[rows], ids[rows])

    found = []
    for rows in x.blocks():
        own = block(rows)
        best: list[TopK | None] = [None, None]
        for columns in x.blocks():
            made = _mine(own, block(columns), backend)
            best = [
                reference.merged(*pair, columns.start, 1) for pair in zip(best, made, strict=True)
            ]
        found.append(torch.cat([known(each).ids for each in best], 1))
    which = torch.cat(found)
    there = (which >= 0).all(1)
    which = torch.where(there.unsqueeze(1), which, ids.unsqueeze(1))
    lengths = distances_to(features, which, normalize=normalize, backend=backend)
    of_positive, of_negative = _of_length(lengths, distance).unbind(1)
    return _excess(of_positive - of_negative, there, margin)


class _Rows(NamedTuple):
    """Some rows of the batch, from an origin, with their labels and places in it."""

    x: Tensor
    labels: Tensor
    places: Tensor


def _mine(own: _Rows, keys: _Rows, backend: str) -> tuple[TopK, TopK]:
    """(The farthest of the label of each row, the nearest of another), the first of both by
    `values`."""
    # the order of <x_i, y_j> - |y_j|^2 / 2 is that of distances, whatever lies at the origin
    y = torch.cat((keys.x, -0.5 * keys.x.square().sum(1, keepdim=True)), 1)
    x = torch.cat((own.x, own.x.new_ones(len(own.x), 1)), 1)
    same, itself = (own.labels, keys.labels), (own.places, keys.places)
    options: dict[str, Any] = {"normalize": False, "backend": backend}
    return (
        top_k(-x, y, 1, keep=same, exclude=itself, **options),
        top_k(x, y, 1, exclude=same, **options),
    )


def _excess(difference: Tensor, there: Tensor, margin: float | None) -> Tensor:
    rows = softplus(difference) if margin is None else (difference + margin).relu()
    return torch.where(there, rows, 0.0)


def _length(difference: Tensor, distance: str) -> Tensor:
    if distance == "euclidean":
        return difference.norm(dim=1)
    return _of_square(difference.square().sum(1), distance)


def _of_length(length: Tensor, distance: str) -> Tensor:
    return length if distance == "euclidean" else _of_square(length.square(), distance)


def _of_square(square: Tensor, distance: str) -> Tensor:
    """|x - y|^2 as a distance; 1 - cos = |x - y|^2 / 2 on the sphere."""
    if distance == "euclidean":
        zero = square <= 0
        return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
    return square if distance == "squared_euclidean" else 0.5 * square


@define(_library)
def _semi_hard(
    features: Tensor,
    keys: Tensor | None,
    labels: Tensor,
    every: Tensor,
    first: int,
    margin: float,
    distance: str,
    normalize: bool,
) -> Tensor:
    """The losses (N,) of features (N, D), which are keys[first : first + N]; None: all of them."""
    x, y = _sides(features, keys, normalize)
    rows = features.new_empty(len(features), dtype=statistics_dtype(features))
    for block in _blocks(x, y):
        rows[block] = _mined(block, x, y, labels, every, first, margin, distance)[0]
    return rows


@define(_library)
def _semi_hard_backward(
    features: Tensor,
    keys: Tensor | None,
    labels: Tensor,
    every: Tensor,
    first: int,
    margin: float,
    distance: str,
    normalize: bool,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of features and keys, without these an empty one."""
    x, y = _sides(features, keys, normalize)
    of_x = x.zeros(grad)
    of_y = of_x if keys is None else y.zeros(grad)
    with full_precision(features):
        for block in _blocks(x, y):
            _, weight, length = _mined(block, x, y, labels, every, first, margin, distance)
            weight *= grad[block, None]
            if distance == "euclidean":  # to those of |x - y|^2 / 2
                weight = torch.where(length > 0, weight / length, 0.0)
            elif distance == "squared_euclidean":
                weight *= 2
            own = x.of(block)
            of_x[block].addcmul_(weight.sum(1, keepdim=True), own)
            for columns in y.blocks():
                part, others = weight[:, columns], y.of(columns)
                of_x[block].addmm_(part, others, alpha=-1)
                of_y[columns].addcmul_(part.sum(0).unsqueeze(1), others)
                of_y[columns].addmm_(part.T, own, alpha=-1)
    return x.gradient(of_x), features.new_empty(0) if keys is None else y.gradient(of_y)


def _sides(features: Tensor, keys: Tensor | None, normalize: bool) -> tuple[Units, Units]:
    x = units(features, normalize)
    return x, x if keys is None else units(keys, normalize)


def _blocks(x: Units, y: Units) -> list[slice]:
    rows, dim = x.features.shape
    return row_blocks(rows, max(dim, 4 * len(y.features)))  # of so many matrices at a time


@precise
def _dense_semi_hard(
    x: Tensor, y: Tensor, labels: Tensor, every: Tensor, first: int, margin: float, distance: str
) -> Tensor:
    """The same from the whole matrix, differentiable any number of times: between the places where
    a choice changes the loss is linear in the distances."""
    given = Units(x.detach(), None), Units(y.detach(), None), labels, every, first, margin, distance
    rows, weight, length = _mined(slice(0, len(x)), *given)
    square = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T
    square = square.masked_fill((weight == 0) | (length == 0), 0.0)
    linear = weight * _of_square(square, distance)
    return rows + (linear - linear.detach()).sum(1)


def _mined(
    block: slice,
    x: Units,
    y: Units,
    labels: Tensor,
    every: Tensor,
    first: int,
    margin: float,
    distance: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses of a block of rows, their derivatives (n, M) in the distances, |x - y|), nothing of
    which is scattered: on a GPU that adds in no fixed order."""
    own, mode = x.of(block), "donot_use_mm_for_euclid_dist"
    parts = [torch.cdist(own, y.of(columns), compute_mode=mode) for columns in y.blocks()]
    length = torch.cat(parts, 1)
    far = _of_length(length, distance)
    unknown = far.isnan()  # neither near nor far
    far = far.masked_fill(unknown, 0.0)
    same = labels[block, None] == every
    ordered, order = far.masked_fill(same, torch.inf).sort(dim=1, stable=True)
    count = (~same).sum(1, keepdim=True)
    # the first of the farthest
    last = torch.searchsorted(ordered, ordered.gather(1, (count - 1).clamp(min=0)))
    place = torch.searchsorted(ordered, far, right=True).minimum(last)
    excess = far - ordered.gather(1, place) + margin
    positive = same & (count > 0)
    positive.diagonal(first + block.start).fill_(False)
    excess = torch.where(positive, excess.relu(), 0.0)
    active = excess > 0
    # of the positives that count, those before a negative have chosen it or one before
    before = torch.searchsorted(far.masked_fill(~active, torch.inf).sort(1).values, ordered)
    before = torch.where(
        torch.arange(len(every), device=every.device) < last, before, active.sum(1, True)
    )
    chosen = before.diff(dim=1, prepend=torch.zeros_like(before[:, :1]))
    weight = active.to(far.dtype) - chosen.gather(1, order.argsort(1))
    rows = torch.where(unknown.any(1) & positive.any(1), torch.nan, excess.sum(1))
    return rows, weight, length


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.first, ctx.margin, ctx.distance, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, keys, *ids = ctx.saved_tensors
    chosen = *ids, ctx.first, ctx.margin, ctx.distance, ctx.normalize
    of_features, of_keys = _semi_hard_backward(features, keys, *chosen, grad)
    return of_features, None if keys is None else of_keys, *6 * (None,)


def _fake(features: Tensor, *_: Any) -> Tensor:
    return features.new_empty(features.shape[0], dtype=statistics_dtype(features))


def _fake_backward(features: Tensor, keys: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    of_features = torch.empty_like(features, memory_format=torch.contiguous_format)
    if keys is None:
        return of_features, features.new_empty(0)
    return of_features, torch.empty_like(keys, memory_format=torch.contiguous_format)


register_rules(_library, _semi_hard, _fake, _backward, _setup)
register_rules(_library, _semi_hard_backward, _fake_backward, no_second_order)
