"""The pairs of pytorch-metric-learning's losses, as labels instead of index tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..losses.algebra import count_equal_ids
from ..losses.sup_con import SupConRows, sup_con_rows
from ..ops import checked_operands, row_dot, softplus_sweep, sweep


class LabelPairs:
    """An `indices_tuple` of all pairs that labels make; its tensors are made when they are read.

    own: (N,), where the anchors are among the references: these pairs are left out.
    one_each: whether every anchor is known to have one positive.
    """

    def __init__(
        self, make: Callable[[], tuple], *, own: Tensor | None = None, one_each: bool = False
    ) -> None:
        self.own, self.one_each = own, one_each
        self._make = make
        self._made: tuple | None = None

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        return tuple(self)[index]

    def __iter__(self) -> Iterator[Tensor]:
        self._made = self._made or self._make()
        return iter(self._made)


class Candidates(NamedTuple):
    """Anchors x (N, D) and the references y (M, D) they are compared with; y = None: x.

    own: (N,), where an anchor is among the references itself and no candidate, or None.
    """

    x: Tensor
    labels: Tensor
    y: Tensor | None
    ref_labels: Tensor
    own: Tensor | None
    scale: float | Tensor
    normalize: bool

    @property
    def backend(self) -> str:
        return resolve_backend("auto", self.x.device)

    def row_dot(self, x: Tensor, y: Tensor) -> Tensor:
        return row_dot(x, y, normalize=self.normalize, backend=self.backend)

    @property
    def few(self) -> bool:
        """Whether the peer finds too few pairs for a loss."""
        n, m = len(self.labels), len(self.ref_labels)
        return n * m - (0 if self.own is None else n) <= 2

    def count_positives(self, labels: Tensor) -> Tensor:
        """The number of positives that an anchor of each of the labels has."""
        count = count_equal_ids(labels, self.ref_labels)
        return count if self.own is None else count - 1

    def sup_con_rows(self) -> SupConRows:
        return sup_con_rows(
            self.x, self.labels, ref=self.y, ref_labels=self.ref_labels, own=self.own,
            scale=self.scale, normalize=self.normalize, backend=self.backend,
        )  # fmt: skip

    def pair_losses(self) -> Tensor:
        """(M,): of each reference, the sum over its anchors a of -log(e^s / (e^s + sum_n e^s_an)),
        n the negatives of a. That is softplus(log sum_n e^s_an - s)."""
        negatives = sweep(
            checked_operands(
                self.x, self.y, scale=self.scale, exclude=(self.labels, self.ref_labels),
                normalize=self.normalize,
            )
        )  # fmt: skip
        itself = None
        if self.own is not None:
            itself = torch.arange(len(self.ref_labels), device=self.own.device), self.own
        flipped = checked_operands(
            self.x if self.y is None else self.y, self.x, scale=-self.scale, bias=negatives.lse,
            keep=(self.ref_labels, self.labels), exclude=itself, normalize=self.normalize,
        )  # fmt: skip
        return softplus_sweep(flipped).value
