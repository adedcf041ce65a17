"""Sweeps against keys that each row has for itself, not as many as the other rows.

The logits of such pairs are 1 / D of the keys: `row_dot` makes them, where the keys lie, and the
rest is plain torch. What is left out has a logit that nothing is made of; the backward of the
kernels reads no key whose product has the gradient 0. Only the reference copies keys.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..types import Counts, IdPair, OwnKeys, SoftplusSweep, Sweep, known
from .pairs import Pairs, row_dot
from .rows import take_rows


class Layout(NamedTuple):
    """Where the pairs of the rows are: padded, (N, M), or one run after another, (T,), with the
    number of each row's and the row of each pair."""

    counts: Tensor | None = None
    owners: Tensor | None = None

    def spread(self, t: Tensor) -> Tensor:
        """What rows (N,) have, without gradient, for their pairs."""
        return t.unsqueeze(1) if self.owners is None else t.index_select(0, self.owners)

    def sum(self, t: Tensor) -> Tensor:
        """Of the pairs of each row, in their order, 0 where there is none."""
        if self.counts is None:
            return t.sum(1)
        return torch.segment_reduce(t, "sum", lengths=self.counts, unsafe=True, initial=0)

    def largest(self, t: Tensor) -> Tensor:
        """Likewise, -inf where there is none."""
        if self.counts is None:
            return t.amax(1)
        return torch.segment_reduce(t, "max", lengths=self.counts, unsafe=True, initial=-torch.inf)


class Logits(NamedTuple):
    """Those of all pairs, 0 for one that is left out; which ones are kept, None: all; and the
    number of these in each row, (N,), int64."""

    z: Tensor
    kept: Tensor | None
    number: Tensor
    layout: Layout


def softmax(given: Pairs, *, threshold: Tensor | None) -> Sweep:
    """`primitives.sweep` with `OwnKeys`: lse, and counts."""
    own = _logits(given)
    masked = own.z if own.kept is None else own.z.masked_fill(~own.kept, -torch.inf)
    empty = own.number == 0
    shift = own.layout.largest(masked.detach()).masked_fill(empty, 0.0)
    norm = own.layout.sum(torch.exp(masked - own.layout.spread(shift)))
    # neither derivative of a row without pairs meets inf - inf or log 0
    lse = torch.where(empty, -torch.inf, shift + torch.where(empty, 1.0, norm).log())
    return Sweep(lse, counts=_counts(own, threshold))


def softplus(given: Pairs, *, threshold: Tensor | None) -> SoftplusSweep:
    """`primitives.softplus_sweep` likewise."""
    own = _logits(given)
    value = -F.logsigmoid(-own.z)
    if own.kept is not None:
        value = value.masked_fill(~own.kept, 0.0)
    return SoftplusSweep(own.layout.sum(value), _counts(own, threshold))


def count_own(keys: OwnKeys, exclude: IdPair | None = None) -> Tensor:
    """The number of keys of each row, (N,), int64, less those with the id of the row."""
    layout = _layout(keys)
    return _number(layout, _kept(keys, layout, exclude, None))


def _logits(given: Pairs) -> Logits:
    if given.backend == "reference":
        given = _dense(given)
    own = cast(OwnKeys, given.y)
    layout = _layout(own)
    kept = _kept(own, layout, given.exclude, given.keep)
    ends = None if own.counts is None else own.counts.cumsum(0)
    dots = row_dot(given.x, own.keys, ends=ends, normalize=given.normalize, backend=given.backend)
    if kept is not None:
        dots = dots.masked_fill(~kept, 0.0)  # before the scale, whose gradient they would reach
    z = given.scale * dots
    bias = given.bias
    if bias is not None:
        if layout.owners is not None and bias.dim() == 2:  # of rows, with a gradient
            bias = take_rows(bias, layout.owners, given.backend).squeeze(1)
        z = (z + bias).to(z.dtype)
        if kept is not None:
            z = z.masked_fill(~kept, 0.0)
    return Logits(z, kept, _number(layout, kept), layout)


def _layout(own: OwnKeys) -> Layout:
    if own.counts is None:
        return Layout()
    rows = torch.arange(own.counts.shape[0], device=own.counts.device)
    owners = rows.repeat_interleave(own.counts, output_size=own.keys.shape[0])
    return Layout(own.counts, owners)


def _kept(
    own: OwnKeys, layout: Layout, exclude: IdPair | None, keep: IdPair | None
) -> Tensor | None:
    """Which pairs are; None: all."""
    kept = own.mask
    if exclude is not None:
        others = layout.spread(exclude[0]) != exclude[1]
        kept = others if kept is None else kept & others
    if keep is not None:
        same = layout.spread(keep[0]) == keep[1]
        kept = same if kept is None else kept & same
    return kept


def _number(layout: Layout, kept: Tensor | None) -> Tensor:
    if kept is None:
        return known(layout.counts)  # without them there is a mask
    return layout.sum(kept.double()).long()


def _counts(own: Logits, threshold: Tensor | None) -> Counts | None:
    if threshold is None:
        return None
    z = own.z.detach()
    above = z > own.layout.spread(threshold)
    if own.kept is not None:
        above = above & own.kept
    rank = own.layout.sum(above.to(z.dtype))
    return Counts(rank, own.layout.sum(z), own.number.to(z.dtype))


def _dense(given: Pairs) -> Pairs:
    """The same with padded keys, zeros where nothing counts."""
    own, bias, ids = cast(OwnKeys, given.y), given.bias, (given.exclude, given.keep)
    if own.counts is None:
        mask = known(own.mask)
        keys = own.keys.masked_fill(~mask.unsqueeze(2), 0.0)
        return given._replace(y=OwnKeys(keys, mask))
    counts = own.counts
    keys, mask = reference.padded(own.keys, counts)
    if bias is not None and bias.dim() == 1:
        bias = reference.padded(bias, counts)[0]
    exclude, keep = (
        None if pair is None else (pair[0], reference.padded(pair[1], counts)[0]) for pair in ids
    )
    return given._replace(y=OwnKeys(keys, mask), bias=bias, exclude=exclude, keep=keep)
