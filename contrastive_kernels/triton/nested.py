"""Sweeps at several prefixes of the features, by a library's products of one block of features
after the other, a piece of the matrix at a time; for ops/nested.py.

The products of a prefix are those of the one before it and of the block that it has more. What
scales, drops and folds them is the kernel of one sweep, with the sides of that prefix. Backward a
piece has the products of all prefixes: from the longest on their dL/dz add up, and each block of
features is multiplied once, by the sum over all prefixes that it is in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..backends import check_ends
from ..types import known
from . import configs, engine, forward, stored, sweep
from .backward import Gradients, Upstream, no_gradients
from .configs import Tile
from .engine import COLUMNS, ROWS, Needs, Problem, cdiv, narrow
from .launching import device_of
from .nested_kernels import nested_coefficient_kernel, nested_finish_kernel
from .sweep import Outputs, Partial
from .tiles import Side

# Of gradients, which have the products, the logits and the sums of dL/dz at once; and of float64.
TILE, DOUBLE = Tile(32, 64, 16, 4, 1), Tile(32, 32, 16, 4, 1)
FINISHED = 8  # vectors of a program


class Prefixes:
    """The problem of each prefix, and the products of all."""

    def __init__(
        self, x: Tensor, y: Tensor | None, scale: Tensor, bias: Tensor | None,
        exclude: tuple[Tensor | None, Tensor | None], keep: tuple[Tensor | None, Tensor | None],
        normalize: bool, ends: list[int],
    ):  # fmt: skip
        check_ends(ends, x.shape[1])
        if y is None:
            exclude, keep = (exclude[0], exclude[0]), (keep[0], keep[0])
        ids = narrow(*exclude), narrow(*keep)
        self.problems = [
            Problem(x[:, :end], None if y is None else y[:, :end], scale, bias, *ids, normalize,
                    aligned=False)
            for end in ends
        ]  # fmt: skip
        self.whole = self.problems[-1]
        self.blocks = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        same = x.dtype == self.whole.inputs[COLUMNS].dtype
        self.operand = x.dtype if same else self.whole.dtype

    def block(self, which: int, vectors: slice, features: slice) -> Tensor:
        """Operands of products."""
        return self.whole.inputs[which][vectors, features].to(self.operand)

    def products(
        self, rows: slice, columns: slice, into: list[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Those of each prefix, from the shortest on; `into`: where, which may be one place for
        all."""
        shape, before = (rows.stop - rows.start, columns.stop - columns.start), None
        for k, (features, buffer) in enumerate(zip(self.blocks, into, strict=True)):
            z = buffer[: math.prod(shape)].view(shape)
            x, y = (self.block(w, at, features) for w, at in ((ROWS, rows), (COLUMNS, columns)))
            stored.multiply(z, x, y.T, before)
            before = z
            yield k, z

    def sides(self, k: int, rows: slice, columns: slice, z: Tensor) -> tuple[Side, Side]:
        """Those of a piece of prefix k, for kernels with DIM = 0."""
        problem = self.problems[k]
        found = (
            problem.part(problem.side(which), which, at.start, at.stop)
            for which, at in ((ROWS, rows), (COLUMNS, columns))
        )
        here, across = (side._replace(features=z, stride=z.stride(0), inner=1) for side in found)
        return here, across

    def piece(self, size: float) -> tuple[int, int]:
        """The largest of so many bytes of products, of whole tiles."""
        rows, columns = stored.of_bytes(size * 4 // self.whole.scale.element_size())
        return max(engine.PADDING, rows), max(engine.PADDING, columns)

    def pieces(self, piece: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
        rows, columns = (slice(0, self.whole.size(which)) for which in (ROWS, COLUMNS))
        return stored.pieces(piece, rows, columns)

    def buffer(self, piece: tuple[int, int]) -> Tensor:
        fits = (min(size, self.whole.size(which)) for which, size in enumerate(piece))
        return self.whole.empty(math.prod(fits))


class Fold:
    """What a sweep keeps of own vectors for each prefix, between the pieces of the other side: a
    state for each part of a piece."""

    def __init__(
        self, given: Prefixes, which: int, own: slice, piece: tuple[int, int], fold: dict[str, Any],
        out: tuple[Tensor, Tensor],
    ):  # fmt: skip
        whole, count, size = given.whole, len(given.problems), own.stop - own.start
        self.given, self.fold = given, fold | {"SUM_EXPONENT": engine.SUM_EXPONENT}
        self.out = [Outputs(first=a[own], low=b[own]) for a, b in zip(*out, strict=True)]
        self.chosen = stored.TILE
        if whole.arithmetic.kind == "double":
            self.chosen = self.chosen._replace(block_n=64)
        others = min(piece[1 - which], whole.size(1 - which))
        parts, _ = whole.parts(size, others, self.chosen, False)
        # rows come to their end one strip after the other, all columns with the last of them
        kept = size if which == ROWS else whole.size(COLUMNS)
        most = engine.PARTIAL_BYTES // (count * kept * 6 * whole.scale.element_size())
        tiles = cdiv(others, self.chosen.block_n)
        self.each = cdiv(tiles, max(1, min(parts, most)))
        self.parts = cdiv(tiles, self.each)
        self.states: Tensor | None = None
        if self.parts > 1 or others < whole.size(1 - which):  # else a program comes to the end
            self.states = whole.empty(count, self.parts, 6, size)

    def push(self, k: int, own: Side, other: Side, first: bool) -> None:
        problem, states = self.given.problems[k], self.states
        partial = Partial() if states is None else Partial(states[k])
        engine.launch(
            sweep.stats_kernel, (cdiv(own.size, self.chosen.block_m), self.parts), own, other,
            problem.scale, None, None, None, self.out[k], partial, self.each, 0,
            None, None, 0, BOTH=False, FIXED=False, REPAIR=False, CONTINUED=not first, **self.fold,
            **problem.constants(self.chosen) | {"DIM": 0},
        )  # fmt: skip

    def end(self, k: int, own: Side, other: Side) -> None:
        if self.states is None:
            return
        partial = Partial(self.states[k])
        work = forward.Work(own, other, self.out[k], partial, self.parts, self.each)
        forward.merge_parts(self.given.whole, [work], None, self.fold, fixed=False)


class Sums:
    """Of own vectors: their gradient before it is finished, block of features by block, and for
    each prefix the sums of dL/dz times products of normalised features."""

    def __init__(self, given: Prefixes, which: int, own: slice, needed: bool):
        size, count = own.stop - own.start, len(given.problems)
        self.given, self.which, self.own = given, which, own
        widths = [block.stop - block.start for block in given.blocks] if needed else []
        self.totals = [given.whole.empty(size, width) for width in widths]
        self.along = given.whole.zeros(count, size)

    def add(self, at: slice, others: slice, chunks: Tensor) -> None:
        """Products of dL/dz (prefixes, own, others) of a piece, where a sum begins with the first
        of the others; each block of features is in its prefix and all that are longer."""
        for c, total, block in zip(chunks, self.totals, self.given.blocks, strict=False):
            features, here = self.given.block(1 - self.which, others, block), total[at]
            stored.multiply(here, c, features, here if others.start else None)

    def finish(self, float16_scale: Tensor | None, gradient: Tensor) -> None:
        problems, size = self.given.problems, self.own.stop - self.own.start
        sides = (
            one.part(one.side(self.which), self.which, self.own.start, self.own.stop)
            for one in problems
        )
        engine.launch(
            nested_finish_kernel, (cdiv(size, FINISHED),), tuple(sides),
            tuple(one.length for one in problems), tuple(self.totals), self.along,
            self.given.whole.scale, float16_scale, gradient[self.own], COUNT=len(problems),
            LENGTH=gradient.shape[1], BLOCK_M=FINISHED, BLOCK_K=64,
        )  # fmt: skip


def nested_stats(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude_rows: Tensor | None,
    exclude_cols: Tensor | None,
    keep_rows: Tensor | None,
    keep_cols: Tensor | None,
    ends: list[int],
    softplus: bool,
    normalize: bool,
    columns: bool,
    together: bool,
    aligned: bool,
) -> tuple[Tensor, ...]:
    """(lse, col_lse, partner, lse_low, col_lse_low)."""
    assert not together  # backends.can_join
    exclude, keep = (exclude_rows, exclude_cols), (keep_rows, keep_cols)
    with device_of(x):
        given = Prefixes(x, y, scale, bias, exclude, keep, normalize, ends)
        whole, count = given.whole, len(ends)
        partner = whole.empty(*(count, whole.size(ROWS)) if aligned else (0,))
        for of_prefix, into in zip(given.problems, partner, strict=False):
            of_prefix.pack_partners(keep_rows, into)
        lse, low = (whole.empty(count, whole.size(ROWS)) for _ in range(2))
        of_keys = (count, whole.size(COLUMNS)) if columns else (0,)
        col_lse, col_low = (whole.empty(*of_keys) for _ in range(2))
        fold = forward.SOFTPLUS if softplus else forward.SOFTMAX
        l2 = stored.SHARE * configs.properties(whole.device).l2
        piece = given.piece(max(l2, stored.LEAST_BYTES))
        buffer = given.buffer(piece)
        keys: dict[int, Fold] = {}
        rows: Fold | None = None
        for here, across in given.pieces(piece):
            last = across.stop == whole.size(COLUMNS), here.stop == whole.size(ROWS)
            if across.start == 0:
                rows = Fold(given, ROWS, here, piece, fold, (lse, low))
            if columns and here.start == 0:
                out = (col_lse, col_low)
                keys[across.start] = Fold(given, COLUMNS, across, piece, fold, out)
            for k, z in given.products(here, across, [buffer] * count):
                own, other = given.sides(k, here, across, z)
                for found, first, final, sides in (
                    (rows, across.start == 0, last[0], (own, other)),
                    (keys.get(across.start), here.start == 0, last[1], (transposed(other), own)),
                ):
                    if found is not None:
                        found.push(k, *sides, first)
                        if final:
                            found.end(k, *sides)
        return lse, col_lse, partner, low, col_low


def transposed(columns: Side) -> Side:
    """Those of a piece as own vectors."""
    return columns._replace(stride=1, inner=columns.stride)


def nested_stats_backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude_rows: Tensor | None,
    exclude_cols: Tensor | None,
    keep_rows: Tensor | None,
    keep_cols: Tensor | None,
    lse: Tensor,
    col_lse: Tensor | None,
    lse_low: Tensor,
    col_lse_low: Tensor | None,
    grad_lse: Tensor | None,
    grad_col_lse: Tensor | None,
    grad_partner: Tensor | None,
    ends: list[int],
    softplus: bool,
    normalize: bool,
    needs: list[bool],
    together: bool,
) -> Gradients:
    assert not together
    exclude, keep = (exclude_rows, exclude_cols), (keep_rows, keep_cols)
    with device_of(x):
        given = Prefixes(x, y, scale, bias, exclude, keep, normalize, ends)
        half = x.dtype == torch.float16
        largest: Tensor | float = 0.0
        if grad_partner is not None:
            grad_partner = grad_partner.contiguous()
            if half:
                largest = 2 * len(ends) * grad_partner.abs().amax()
        upstream = Upstream(softplus)
        for k, problem in enumerate(given.problems):
            upstream = Upstream(softplus)
            for which, values, lows, grads in (
                (ROWS, lse, lse_low, grad_lse), (COLUMNS, col_lse, col_lse_low, grad_col_lse)
            ):  # fmt: skip
                if grads is not None and softplus:
                    upstream.add(which, None, None, grads[k], None, half)
                elif grads is not None:
                    low = known(lows)[k]
                    upstream.add(which, known(values)[k], None, grads[k], None, half, low)
            partner = None if grad_partner is None else grad_partner[k]
            upstream.add_partner(partner, lse[k], half, lse_low[k])
            problem.pack(upstream.sides[ROWS], upstream.sides[COLUMNS])
            largest = largest + upstream.largest
        return gradients(given, upstream.coefficient, largest, grad_partner, Needs(*needs))


def gradients(
    given: Prefixes, coefficient: Any, largest: Tensor | float, grad_partner: Tensor | None,
    needs: Needs,
) -> Gradients:  # fmt: skip
    """By pieces that have the products and dL/dz of every prefix at once: 2 N M D, and 2 more for
    each side. `largest`: the sum of those of the prefixes."""
    whole, count = given.whole, len(given.problems)
    float16_scale = None
    if whole.arithmetic.operand == tl.float16:
        scales = (
            one.float16_scale(largest, one.side(ROWS), one.side(COLUMNS)) for one in given.problems
        )
        float16_scale = torch.stack([known(one) for one in scales]).amin()
    itemsize = whole.scale.element_size()
    share = itemsize / (itemsize + given.operand.itemsize) / count
    piece = given.piece(engine.CHUNK_BYTES * share)
    chosen = DOUBLE if whole.arithmetic.kind == "double" else TILE
    logits = [given.buffer(piece) for _ in range(count)]
    chunk = whole.empty(count * len(logits[0]), dtype=given.operand)
    n, m = whole.size(ROWS), whole.size(COLUMNS)
    absent = no_gradients(*whole.inputs, whole.dtype)
    dx = torch.empty_like(whole.inputs[ROWS], memory_format=torch.contiguous_format)
    keys = Sums(given, COLUMNS, slice(0, m), needs.y and not whole.symmetric)
    slope, bias = whole.zeros(count, n), whole.zeros(m) if needs.bias else None
    rows = Sums(given, ROWS, slice(0, 0), False)
    for here, across in given.pieces(piece):
        if across.start == 0:
            rows = Sums(given, ROWS, here, needs.x)
        sides = [given.sides(k, here, across, z) for k, z in given.products(here, across, logits)]
        height, width = here.stop - here.start, across.stop - across.start
        row_tiles, column_tiles = cdiv(height, chosen.block_m), cdiv(width, chosen.block_n)
        c = chunk[: count * height * width].view(count, height, width)
        row_along = whole.empty(count, column_tiles, height)
        column_along = whole.empty(count, row_tiles, width) if keys.totals else None
        bias_sums = whole.empty(count, row_tiles, width) if needs.bias else None
        engine.launch(
            nested_coefficient_kernel, (row_tiles * column_tiles,),
            tuple(own for own, _ in sides), tuple(other for _, other in sides), whole.scale,
            float16_scale, grad_partner, c, row_along, column_along, bias_sums, here.start,
            across.start, 0 if grad_partner is None else grad_partner.shape[1], COUNT=count,
            HALF=whole.symmetric, COEFFICIENT=coefficient, BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n, DTYPE=whole.arithmetic.operand, tile=chosen,
        )  # fmt: skip
        rows.along += row_along.sum(1)
        if column_along is not None:
            keys.along[:, across] += column_along.sum(1)
        if bias is not None:
            bias[across] += known(bias_sums).sum((0, 1))
        rows.add(slice(0, height), across, c)
        keys.add(across, here, c.mT)
        if across.stop == m:
            slope[:, here] = rows.along
            if needs.x:
                rows.finish(float16_scale, dx)
    dy = absent.y
    if keys.totals:
        dy = torch.empty_like(whole.inputs[COLUMNS], memory_format=torch.contiguous_format)
        keys.finish(float16_scale, dy)
    return Gradients(
        dx if needs.x else absent.x,
        dy,
        slope.sum() * (0.5 if whole.symmetric else 1.0) if needs.scale else absent.scale,
        known(bias) if needs.bias else absent.bias,
    )
