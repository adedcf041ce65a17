"""One block of a matrix that is spread over ranks, or whose keys come in chunks: the operators
forward and backward, by hand, and how the statistics of blocks merge.

`statistics` and their gradients in the backward functions are those of whole rows and columns, of
which the block has a part. Keys None: the rows against themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference, registration
from .registration import statistics_dtype
from .sources import NegativeSource

Gradients = tuple[Tensor | None, ...]
# of (exclude rows, exclude columns, keep rows, keep columns), as the operators take them
Ids = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Block(NamedTuple):
    """Rows x (n, D) against keys y (m, D)."""

    backend: str
    normalize: bool
    x: Tensor
    y: Tensor | None
    scale: Tensor
    bias: Tensor | None
    ids: Ids

    @property
    def operands(self) -> tuple:
        return (self.x, self.y, self.scale, self.bias, *self.ids)

    def softmax(
        self, threshold: Tensor | None, mean: bool, columns: bool, attend: bool = False
    ) -> Gradients:
        """The fields of a Sweep, and of operators also (attended, slope), which `attend` asks for;
        what was not asked for is None or empty."""
        if self.backend == "reference":
            return reference.sweep(
                self.x, self.y, mean=mean, columns=columns, threshold=threshold, **self._dense()
            )
        return registration.row_stats(self.backend)(
            *self.operands, threshold, mean, self.normalize, columns, attend
        )

    def softplus(self, threshold: Tensor | None) -> Gradients:
        """The fields of a SoftplusSweep likewise."""
        if self.backend == "reference":
            bias = 0.0 if self.bias is None else self.bias
            options = {**self._dense(), "bias": bias, "threshold": threshold}
            return reference.softplus_sweep(self.x, self.y, **options)
        return registration.row_softplus(self.backend)(
            *self.operands, threshold, self.normalize, 4 * [False]
        )[:4]

    def softmax_backward(
        self, statistics: Gradients, grads: Gradients, needs: list[bool]
    ) -> Gradients:
        """Gradients of (x, y, scale, bias), from those of (lse, mean, col_lse, col_mean).

        `statistics`: these, attended and slope.
        """
        if self.backend == "reference":
            return self._dense_backward(needs, statistics, grads)
        empty = self.x.new_empty(0, dtype=statistics_dtype(self.x))
        given = [empty if t is None else t for t in statistics]
        return registration.backward("row_stats", self.backend)(
            *self.operands, *given, *grads, self.normalize, needs
        )

    def softplus_backward(self, grad: Tensor, needs: list[bool]) -> Gradients:
        """Gradients of (x, y, scale, bias), from that of the value."""
        if self.backend == "reference":
            return self._dense_backward(needs, None, (grad,))
        return registration.backward("row_softplus", self.backend)(
            *self.operands, grad, self.normalize, needs
        )

    def _dense(self) -> dict:
        pairs = [
            None if rows is None else (rows, rows if columns is None else columns)
            for rows, columns in (self.ids[:2], self.ids[2:])
        ]
        return {
            "scale": self.scale, "bias": self.bias, "normalize": self.normalize,
            "exclude": pairs[0], "keep": pairs[1],
        }  # fmt: skip

    def _dense_backward(
        self, needs: list[bool], statistics: Gradients | None, grads: Gradients
    ) -> Gradients:
        inputs = (self.x, self.y, self.scale, self.bias)
        leaves = [t if t is None else t.detach() for t in inputs]
        wanted = [t.requires_grad_() for t, need in zip(leaves, needs, strict=True) if need]
        with torch.enable_grad():
            block = self._replace(x=leaves[0], y=leaves[1], scale=leaves[2], bias=leaves[3])
            if statistics is None:
                outputs = [block.softplus(None)[0]]
            else:
                _, mean, columns, _ = (g is not None for g in grads)
                outputs = block.softmax(None, mean, columns)[:4]
                grads = [
                    *_shares(outputs[:2], statistics[:2], grads[:2]),
                    *_shares(outputs[2:], statistics[2:4], grads[2:]),
                ]
        given = [(t, g) for t, g in zip(outputs, grads, strict=True) if g is not None]
        outputs, grads = zip(*given, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, materialize_grads=True))
        return tuple(next(found) if need else None for need in needs)


def merge(a: Tensor, b: Tensor) -> Tensor:
    """Statistics (K, 1 + C) of two sets of pairs as those of their union: lse, and C means with the
    weights exp(z - lse)."""
    lse = torch.logaddexp(a[:, :1], b[:, :1])
    finite = lse.masked_fill(lse == -torch.inf, 0.0)  # no pair at all: means stay 0
    means = (a[:, :1] - finite).exp() * a[:, 1:] + (b[:, :1] - finite).exp() * b[:, 1:]
    return torch.cat((lse, means), 1)


def operand_dtype(backend: str, t: Tensor | NegativeSource, device: torch.device) -> torch.dtype:
    """What the operators of Triton make of features under autocast; of the others as they are."""
    if backend != "triton" or t.dtype == torch.float64:
        return t.dtype
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else t.dtype


def _shares(part: Gradients, whole: Gradients, grads: Gradients) -> list[Tensor | None]:
    """Gradients of the lse and mean of a part of a row, from those of the whole row."""
    if grads[0] is None:
        return [None, None]
    lse, mean = (t if t is None else t.detach() for t in part)
    share = (lse - whole[0].masked_fill(whole[0] == -torch.inf, 0.0)).exp()
    if mean is None:
        return [share * grads[0], None]
    return [share * (grads[0] + grads[1] * (mean - whole[1])), share * grads[1]]
