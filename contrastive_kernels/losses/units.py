"""Features of unit length that are made block by block, where a product takes them, for losses
whose pairs no sweep knows. Nothing here is a node of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import statistics_dtype
from . import algebra
from .algebra import SHORTEST

BLOCK_ROWS = 1024


class Units(NamedTuple):
    """Features (N, D) in the type of the statistics, divided by their lengths (N, 1), None: as
    they are."""

    features: Tensor
    lengths: Tensor | None

    def of(self, rows: slice | Tensor) -> Tensor:
        """A block of rows, which is not to be written to."""
        x = self.features[rows]
        x = x.to(statistics_dtype(x))
        return x if self.lengths is None else x / self.lengths[rows]

    def blocks(self, count: int | None = None) -> list[slice]:
        """Blocks of all rows, or of so many, of at most BLOCK_PAIRS numbers."""
        rows, dim = self.features.shape
        return algebra.row_blocks(rows if count is None else count, dim)

    def zeros(self, like: Tensor) -> Tensor:
        """A sum of gradients to begin with; of several at once where `like` is several."""
        return like.new_zeros(self.features.shape, dtype=statistics_dtype(self.features))

    def gradient(self, of_units: Tensor) -> Tensor:
        """That of the features, from that of the units, which is overwritten."""
        for rows in self.blocks():
            self.gradient_of(rows, of_units[rows])
        return of_units.to(self.features.dtype)

    def gradient_of(self, rows: slice, of_units: Tensor) -> Tensor:
        """That of a block of rows, in the place of the one of its units."""
        if self.lengths is None:
            return of_units
        unit, lengths = self.of(rows), self.lengths[rows]
        along = (of_units * unit).sum(1, keepdim=True)
        along.masked_fill_(lengths <= SHORTEST, 0.0)  # whose length is no part of it
        return of_units.addcmul_(unit, along, value=-1).div_(lengths)


def units(features: Tensor, normalize: bool) -> Units:
    if not normalize:
        return Units(features, None)
    lengths = torch.linalg.vector_norm(
        features, dim=1, keepdim=True, dtype=statistics_dtype(features)
    )
    return Units(features, lengths.clamp_min_(SHORTEST))


def row_and_column_blocks(
    rows: int, columns: int, dim: int
) -> Iterator[tuple[slice, Iterator[slice]]]:
    """Blocks of at most BLOCK_PAIRS pairs, whose rows of `dim` features have no more numbers: of
    rows, and for each those of columns."""
    height = max(1, min(rows, BLOCK_ROWS, algebra.BLOCK_PAIRS // dim))
    width = max(1, algebra.BLOCK_PAIRS // max(height, dim))
    for i in range(0, rows, height):
        yield (
            slice(i, min(i + height, rows)),
            (slice(j, min(j + width, columns)) for j in range(0, columns, width)),
        )
