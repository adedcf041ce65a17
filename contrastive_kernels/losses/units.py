"""Features of unit length that are made block by block, where a product takes them, for losses
whose pairs no sweep knows. Nothing here is a node of a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import known, statistics_dtype
from . import algebra
from .algebra import SHORTEST

BLOCK_ROWS = 1024


class Units(NamedTuple):
    """Features (N, D) in the type of the statistics, divided by their lengths (N, 1), None: as
    they are. shorter: the prefixes besides the whole, each with its end and its lengths."""

    features: Tensor
    lengths: Tensor | None
    shorter: Sequence[tuple[int, Tensor | None]] = ()

    def of(self, rows: slice | Tensor) -> Tensor:
        """A block of rows, which is not to be written to."""
        x = self.features[rows]
        x = x.to(statistics_dtype(x))
        return x if self.lengths is None else x / self.lengths[rows]

    def share(self, prefix: int, rows: slice) -> Tensor:
        """The length of a shorter prefix of units, (n, 1) or what broadcasts to it."""
        length = self.shorter[prefix][1]
        if self.lengths is None or length is None:
            return self.features.new_ones(1, 1, dtype=statistics_dtype(self.features))
        return length[rows] / self.lengths[rows]

    def blocks(self, count: int | None = None) -> list[slice]:
        """Blocks of all rows, or of so many, of at most BLOCK_PAIRS numbers."""
        rows, dim = self.features.shape
        return algebra.row_blocks(rows if count is None else count, dim)

    def zeros(self, like: Tensor) -> Tensor:
        """A sum of gradients to begin with; of several at once where `like` is several."""
        return like.new_zeros(self.features.shape, dtype=statistics_dtype(self.features))

    def gradient(self, of_units: Tensor, along: Tensor | None = None) -> Tensor:
        """That of the features, from that of the units, which is overwritten. along (K, N) or
        more: for each shorter prefix u <u, g> of the gradient g where it is of unit length."""
        for rows in self.blocks():
            self.gradient_of(rows, of_units[rows], along)
        return of_units.to(self.features.dtype)

    def gradient_of(self, rows: slice, of_units: Tensor, along: Tensor | None = None) -> Tensor:
        """That of a block of rows, in the place of the one of its units."""
        if self.lengths is None:
            return of_units
        unit, lengths = self.of(rows), self.lengths[rows]
        for k, (end, length) in enumerate(self.shorter):
            share, constant = self.share(k, rows), known(length)[rows] <= SHORTEST
            radial = known(along)[k, rows, None] / share / share
            of_units[:, :end].addcmul_(unit[:, :end], radial.masked_fill_(constant, 0.0), value=-1)
        radial = (of_units * unit).sum(1, keepdim=True)
        radial.masked_fill_(lengths <= SHORTEST, 0.0)  # whose length is no part of it
        return of_units.addcmul_(unit, radial, value=-1).div_(lengths)


def units(features: Tensor, normalize: bool, shorter: Sequence[int] = ()) -> Units:
    """`shorter`: the ends of prefixes besides the whole."""

    def lengths(end: int | None) -> Tensor | None:
        if not normalize:
            return None
        found = torch.linalg.vector_norm(
            features[:, :end], dim=1, keepdim=True, dtype=statistics_dtype(features)
        )
        return found.clamp_min_(SHORTEST)

    return Units(features, lengths(None), [(end, lengths(end)) for end in shorter])


def row_and_column_blocks(
    rows: int, columns: int, dim: int, matrices: int = 1
) -> Iterator[tuple[slice, Iterator[slice]]]:
    """Blocks of pairs with at most BLOCK_PAIRS numbers in `matrices`, whose rows of `dim` features
    have no more: of rows, and for each those of columns."""
    height = max(1, min(rows, BLOCK_ROWS, algebra.BLOCK_PAIRS // dim))
    width = max(1, algebra.BLOCK_PAIRS // max(height * matrices, dim))
    for i in range(0, rows, height):
        yield (
            slice(i, min(i + height, rows)),
            (slice(j, min(j + width, columns)) for j in range(0, columns, width)),
        )
