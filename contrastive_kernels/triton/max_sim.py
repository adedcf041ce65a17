"""The operators of late interaction on Triton kernels; their schemas are in ops/max_sim.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import statistics_dtype
from . import engine
from . import max_sim_kernels as kernels
from .configs import INTERPRETED, Tile, arithmetic
from .engine import cdiv, next_power_of_2
from .launching import device_of

# Tokens of a query and tokens of a document; features of a slice.
BLOCK = 64
SLICES = {"half": 64, "single": 32, "double": 16}
SUM_BLOCK = 128
# Programs that share a document's tokens: the kernels go on in strides of so many blocks.
DOCUMENT_PROGRAMS = 1 if INTERPRETED else 4


class _Pairs:
    """The operands of all kernels."""

    def __init__(
        self, x: Tensor, y: Tensor, x_ends: Tensor, y_ends: Tensor, x_kept: Tensor | None,
        y_kept: Tensor | None, own: int, temperature: float, normalize: bool,
    ) -> None:  # fmt: skip
        self.x, self.y, self.x_ends, self.y_ends = x, y, x_ends, y_ends
        self.kept = (x_kept, y_kept)
        self.tokens, self.slots = x.shape[0], own or y_ends.shape[0]
        self.documents, self.own = y_ends.shape[0], own
        self.rate = None  # in the type of the sums, which a number is not
        if temperature:
            self.rate = torch.full((), 1 / temperature, dtype=statistics_dtype(x), device=x.device)
        self.strides = (*x.stride(), *y.stride())
        self.arithmetic = arithmetic(x, y)
        most = SLICES[self.arithmetic.kind]
        self.block_k = min(most, max(16, next_power_of_2(x.shape[1])))
        self.tile = Tile(BLOCK, BLOCK, self.block_k, 8, 2)
        self.inverse: tuple[Tensor | None, ...] = (None, None)
        if normalize:
            self.inverse = tuple(self._inverse_norms(t) for t in (x, y))

    def _inverse_norms(self, t: Tensor) -> Tensor:
        out = torch.empty(t.shape[0], dtype=statistics_dtype(t), device=t.device)
        if len(out):
            engine.launch(
                kernels.inverse_norms_kernel, (cdiv(len(out), BLOCK),), t, out, len(out),
                *t.stride(), DIM=t.shape[1], ACC=self.arithmetic.sum, BLOCK=BLOCK,
                BLOCK_K=self.block_k,
            )  # fmt: skip
        return out

    @property
    def constants(self) -> dict[str, Any]:
        a = self.arithmetic
        return {
            "DIM": self.x.shape[1], "OWN": self.own > 0, "ACC": a.sum, "DTYPE": a.operand,
            "PRECISION": a.precision, "BLOCK_M": BLOCK, "BLOCK_N": BLOCK, "BLOCK_K": self.block_k,
        }  # fmt: skip

    @property
    def backward_constants(self) -> dict[str, Any]:
        # half operands keep all their bits in TF32, and gradients their range
        half = self.arithmetic.kind == "half"
        return self.constants | {"ACC_PRECISION": "tf32" if half else self.arithmetic.precision}

    def owners(self) -> Tensor:
        """The query of each token."""
        tokens = torch.arange(self.tokens, device=self.x.device)
        return torch.searchsorted(self.x_ends, tokens, right=True)


def max_sim(
    x: Tensor,
    y: Tensor,
    x_ends: Tensor,
    y_ends: Tensor,
    x_kept: Tensor | None,
    y_kept: Tensor | None,
    own: int,
    temperature: float,
    normalize: bool,
    zeros: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with device_of(x):
        given = _Pairs(x, y, x_ends, y_ends, x_kept, y_kept, own, temperature, normalize)
        shape, dtype = (given.slots, given.tokens), statistics_dtype(x)
        values = torch.empty(shape, dtype=dtype, device=x.device)
        winners = torch.empty((0,) if temperature else shape, dtype=torch.int32, device=x.device)
        scores = torch.zeros(x_ends.shape[0], given.slots, dtype=dtype, device=x.device)
        if given.tokens == 0:
            return scores, winners, values
        blocks = DOCUMENT_PROGRAMS if own else cdiv(given.tokens, BLOCK)
        engine.launch(
            kernels.max_sim_kernel, (given.documents, blocks), x, y, *given.inverse, x_ends,
            y_ends, x_kept, y_kept, values, None if temperature else winners, given.tokens, own,
            given.rate, *given.strides, tile=given.tile, ZEROS=zeros, **given.constants,
        )  # fmt: skip
        engine.launch(
            kernels.max_sim_sum_kernel, (x_ends.shape[0], given.slots), values, x_ends, scores,
            given.tokens, given.slots, given.rate, ACC=given.arithmetic.sum,
            BLOCK=SUM_BLOCK,
        )  # fmt: skip
        return scores, winners, values


def max_sim_backward(
    x: Tensor,
    y: Tensor,
    x_ends: Tensor,
    y_ends: Tensor,
    x_kept: Tensor | None,
    y_kept: Tensor | None,
    own: int,
    temperature: float,
    normalize: bool,
    zeros: bool,
    winners: Tensor,
    values: Tensor,
    grad: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    with device_of(x):
        given = _Pairs(x, y, x_ends, y_ends, x_kept, y_kept, own, temperature, normalize)
        dx, dy = (torch.empty(t.shape if need else (0,), dtype=t.dtype, device=t.device)
                  for t, need in zip((x, y), needs, strict=True))  # fmt: skip
        owners, grad = given.owners(), grad.contiguous()
        state = (values, None if temperature else winners, grad)
        sizes = (given.tokens, given.slots, own, given.rate, *given.strides)
        slices = cdiv(x.shape[1], given.block_k)
        if needs[0] and given.tokens:
            engine.launch(
                kernels.max_sim_queries_kernel, (cdiv(given.tokens, BLOCK), slices), x, y,
                *given.inverse, owners, y_ends, x_kept, y_kept, *state, dx, *sizes,
                tile=given.tile, **given.backward_constants,
            )  # fmt: skip
        if needs[1] and y.shape[0]:
            engine.launch(
                kernels.max_sim_documents_kernel, (given.documents, DOCUMENT_PROGRAMS, slices), x,
                y, *given.inverse, x_ends, owners, y_ends, x_kept, y_kept, *state, dy, *sizes,
                tile=given.tile, **given.backward_constants,
            )  # fmt: skip
        return dx, dy
