"""Gradients: a sweep for each side, or dL/dz in stored parts where vectors are long."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..types import known
from . import engine, folds, forward, hopper, row_dots, stored
from .configs import Tile
from .engine import COLUMNS, ROWS, Into, Needs, Problem, cdiv, next_power_of_2
from .gradient import coefficient_kernel, finish_kernel, gradient_kernel
from .sweep import Partial
from .tiles import Side


class Gradients(NamedTuple):
    """What is not needed is empty."""

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor


class Upstream:
    """What the backward pass knows of each side's statistics: lse, mean, and their gradients."""

    def __init__(self, softplus: bool = False):
        self.sides: list[dict[str, Tensor]] = [{}, {}]
        self.coefficient = folds.softplus_coefficient if softplus else folds.softmax_coefficient
        self.largest: Tensor | float = 0.0
        self.partner: Tensor | None = None  # the gradient of the rows' logits with their partners
        self.values: Tensor | None = None  # if set, receives the sums of the fold too

    def add(
        self, which: int, lse: Tensor | None, mean: Tensor | None, grad_lse: Tensor | None,
        grad_mean: Tensor | None, half: bool, low: Tensor | None = None,
    ) -> None:  # fmt: skip
        if grad_lse is None and grad_mean is None:
            return
        if grad_lse is None:
            grad_lse = torch.zeros_like(known(grad_mean))
        side = {"grad_lse": grad_lse.contiguous()}
        if lse is not None:
            side["lse"] = lse
            if low is not None and len(low):
                side["low"] = low
        if grad_mean is not None:
            side |= {"mean": known(mean), "grad_mean": grad_mean.contiguous()}
        self.sides[which] = side
        if half:  # |dL/dz| <= |a| + |b| (1 + max of p |z - mean|), and that is at most log M
            self.largest = self.largest + grad_lse.abs().amax()
            if grad_mean is not None:
                self.largest = self.largest + 32 * grad_mean.abs().amax()

    def add_partner(self, grad: Tensor | None, lse: Tensor, half: bool, low: Tensor) -> None:
        """The gradient of the logits of rows and their partners, which may be the only one."""
        if grad is None:
            return
        if not any(self.sides):
            self.add(ROWS, lse, None, torch.zeros_like(lse), None, half, low)
        self.partner = grad.contiguous()


def no_gradients(x: Tensor, y: Tensor, dtype: torch.dtype) -> Gradients:
    """Of scale and bias in this type."""
    scale, bias = (x.new_empty(0, dtype=dtype) for _ in range(2))
    return Gradients(x.new_empty(0), y.new_empty(0), scale, bias)


def gradients(
    problem: Problem, upstream: Upstream, needs: Needs, into: Into = (None, None)
) -> Gradients:
    """4 N M D for each side; those of x and y are added to `into`."""
    problem.pack(upstream.sides[ROWS], upstream.sides[COLUMNS])
    if problem.paired:
        return paired_gradients(problem, upstream, needs, into)
    by_side: list[Tensor | None] = [None, None]
    slope = bias = None
    rows = needs.x or (needs.scale and (problem.symmetric or not needs.y))
    columns = not problem.symmetric and (needs.y or needs.bias)
    if problem.dim > problem.resident:
        own = problem.stored_side(needs)
        by_side, slope, bias = stored_gradients(
            problem, upstream, own, rows and columns, needs.bias, into
        )
    else:
        sides = [which for which, wanted in ((ROWS, rows), (COLUMNS, columns)) if wanted]
        whole = problem.few and all(len(problem.blocks(which)) == 1 for which in sides)
        # of one launch no two programs may add to the same rows
        whole = whole and not (into[ROWS] is not None and into[COLUMNS] is not None)
        for together in [sides] if whole else [[which] for which in sides]:
            for made in side_gradients(problem, upstream, together, needs.bias, into):
                by_side[made.which], bias = made.gradient, made.bias
                slope = made.slope if slope is None else slope
    if bias is not None and upstream.partner is not None:
        bias[: len(upstream.partner)] += upstream.partner
    dx, dy = by_side
    absent = no_gradients(*problem.inputs, problem.dtype)
    return Gradients(
        known(dx) if needs.x else absent.x,
        known(dy) if needs.y else absent.y,
        known(slope).sum() * (0.5 if problem.symmetric else 1.0) if needs.scale else absent.scale,
        known(bias) if needs.bias else absent.bias,
    )


def summed_softplus(problem: Problem, needs: Needs) -> tuple[Tensor, Gradients]:
    """The sum of softplus over all pairs, and its gradients: 6 N M D by stored parts, else 8."""
    n = problem.size(ROWS)
    upstream = Upstream(softplus=True)
    ones = torch.ones(n, dtype=problem.dtype, device=problem.device)
    upstream.add(ROWS, None, None, ones, None, problem.arithmetic.operand == tl.float16)
    if problem.dim > problem.resident:
        upstream.values = problem.empty(problem.size(problem.stored_side(needs)))
        made = gradients(problem, upstream, needs)
        return upstream.values.sum(), made
    out = forward.stats(problem, ROWS, softplus=True, attend=True)
    made = gradients(problem, upstream, needs._replace(x=False, scale=False))
    if needs.x:
        made = made._replace(x=known(out.gradient))
    if needs.scale:
        made = made._replace(scale=known(out.slope).sum())
    return known(out.first).sum(), made


class Work(NamedTuple):
    """Gradient of one side, its derivative by the scale (size,), and sums of dL/dz (size,). add: to
    what is in `gradient`."""

    which: int
    gradient: Tensor
    slope: Tensor | None
    bias: Tensor | None
    float16_scale: Tensor | None
    add: bool

    @classmethod
    def into(
        cls, problem: Problem, which: int, there: Tensor | None, slope: Tensor | None,
        bias: Tensor | None, float16_scale: Tensor | None,
    ) -> Work:  # fmt: skip
        gradient = there
        if gradient is None:
            dtype = problem.inputs[which].dtype
            gradient = problem.empty(problem.size(which), problem.length, dtype=dtype)
        return cls(which, gradient, slope, bias, float16_scale, there is not None)


class Parts(NamedTuple):
    """A block of own vectors from `start` on, and their sums over so many parts of the other side,
    of `each` tiles. `on_hopper`: the tile where that engine makes them."""

    own: Side
    start: int
    sums: Tensor
    bias_sums: Tensor | None
    number: int
    each: int
    on_hopper: Tile | None = None


def side_gradients(
    problem: Problem, upstream: Upstream, sides: list[int], with_bias: bool, into: Into
) -> list[Work]:
    """Those of one side, or of both by as many launches, for a block of vectors each."""
    chosen = problem.tile("gradient")
    works: list[Work] = []
    for which in sides:
        n = problem.size(which)
        bias = problem.empty(n) if with_bias and which == COLUMNS else None
        float16_scale = problem.float16_scale(upstream.largest, problem.side(1 - which))
        slope = None if works else problem.empty(n)
        works.append(Work.into(problem, which, into[which], slope, bias, float16_scale))
    blocks = [problem.blocks(which) for which in sides]
    for bounds in zip(*blocks, strict=True):
        parts = [
            parts_of(problem, work, start, stop, chosen, alone=len(works) == 1)
            for work, (start, stop) in zip(works, bounds, strict=True)
        ]
        launch_gradient(problem, upstream, works, parts, chosen)
        finish(problem, upstream, works, parts, scaled=False)
        for work, part in zip(works, parts, strict=True):
            if work.bias is not None:
                stop = part.start + part.own.size
                torch.sum(known(part.bias_sums), 0, out=work.bias[part.start : stop])
    return works


def parts_of(
    problem: Problem, work: Work, start: int, stop: int, chosen: Tile, alone: bool
) -> Parts:
    own, other = problem.side(work.which), problem.side(1 - work.which)
    own = problem.part(own, work.which, start, stop)
    on_hopper = hopper.tile(problem, own, other) if alone else None
    count, each = problem.parts(own.size, other.size, on_hopper or chosen, True)
    sums = problem.empty(count, own.size, problem.dim)
    bias_sums = None if work.bias is None else problem.empty(count, own.size)
    return Parts(own, start, sums, bias_sums, count, each, on_hopper)


def launch_gradient(
    problem: Problem, upstream: Upstream, works: list[Work], parts: list[Parts], chosen: Tile
) -> None:
    first, other = parts[0], problem.side(1 - works[0].which)
    if first.on_hopper:
        hopper.gradient(
            problem, first.own, other, works[0].float16_scale,
            Partial(first.bias_sums, first.sums), first.on_hopper, first.number, first.each,
            upstream.coefficient,
        )  # fmt: skip
        return
    blocks = [cdiv(part.own.size, chosen.block_m) for part in parts]
    programs = [count * part.number for count, part in zip(blocks, parts, strict=True)]
    grid = (sum(programs),) if len(parts) > 1 else (blocks[0], first.number)
    second: tuple[Any, ...] = (None, None, None, 0)
    if len(parts) > 1:
        second = (works[1].float16_scale, parts[1].sums, parts[1].bias_sums, parts[1].each)
    engine.launch(
        gradient_kernel, grid, first.own, other, problem.scale, works[0].float16_scale,
        first.sums, first.bias_sums, first.each, programs[0], *second, BOTH=len(parts) > 1,
        COEFFICIENT=upstream.coefficient, **problem.constants(chosen),
    )  # fmt: skip


def finish(
    problem: Problem, upstream: Upstream, works: list[Work], parts: list[Parts], scaled: bool
) -> None:
    """Writes the gradients of a block of one side, or of both whole sides."""
    width = next_power_of_2(problem.dim)
    block = max(1, min(128, 2048 // width))
    programs = [cdiv(part.own.size, block) for part in parts]
    first, work = parts[0], works[0]
    rows = slice(first.start, first.start + first.own.size)
    second: tuple[Any, ...] = (None, None, None, 0)
    if len(parts) > 1:
        second = (works[1].float16_scale, works[1].gradient, parts[1].sums, parts[1].number)
    engine.launch(
        finish_kernel, (sum(programs),), first.own, problem.side(1 - work.which), problem.scale,
        upstream.partner, work.float16_scale, work.gradient[rows],
        None if work.slope is None else work.slope[rows], first.sums,
        first.number, first.start, programs[0], *second, BOTH=len(parts) > 1,
        SYMMETRIC=problem.symmetric, DIM=problem.dim, LENGTH=problem.length, SCALED=scaled,
        ADD=work.add, OTHER_ADD=len(works) > 1 and works[1].add, BLOCK_M=block, BLOCK_K=width,
    )  # fmt: skip


def stored_gradients(
    problem: Problem, upstream: Upstream, which: int, both: bool, with_bias: bool, into: Into
) -> tuple[list[Tensor | None], Tensor, Tensor | None]:
    """Gradients by chunks of dL/dz that are stored: 2 N M D, and 2 more by a library's products for
    each side. Returns them by side, the derivative by the scale, and sums of dL/dz."""
    # with sums of softplus there is so much else to do that it hides behind products of one kernel
    piece = stored.shape(problem) if upstream.values is None else None
    chosen = problem.tile("coefficient") if piece is None else stored.TILE
    buffer = None if piece is None else problem.empty(math.prod(piece))
    own, other = problem.side(which), problem.side(1 - which)
    float16_scale = problem.float16_scale(upstream.largest, own, other)
    operand = problem.inputs[which].dtype
    if operand != problem.inputs[1 - which].dtype:
        operand = problem.dtype
    n, m, dim = own.size, other.size, problem.dim
    width = min(m, engine.CHUNK_COLUMNS)
    height = engine.CHUNK_BYTES // (operand.itemsize * width)
    height = min(n, max(1, height // engine.PADDING) * engine.PADDING)
    chunk = problem.empty(height * width, dtype=operand)
    own_sum = problem.empty(height, dim)
    other_sum = problem.zeros(m, dim) if both else None
    bias = problem.zeros(n) if with_bias else None
    work = Work.into(problem, which, into[which], problem.empty(n), bias, float16_scale)
    if upstream.values is not None:
        upstream.values.zero_()
    for start in range(0, n, height):
        stop = min(start + height, n)
        mine = problem.part(own, which, start, stop)
        total = own_sum[: stop - start].zero_()
        for begin in range(0, m, width):
            end = min(begin + width, m)
            columns = problem.part(other, 1 - which, begin, end)
            c = chunk[: mine.size * columns.size].view(mine.size, columns.size)
            for here, across in stored.pieces(piece, slice(start, stop), slice(begin, end)):
                rows = problem.part(own, which, here.start, here.stop)
                others = problem.part(other, 1 - which, across.start, across.stop)
                target = c[here.start - start :, across.start - begin :]
                shape = cdiv(others.size, chosen.block_n), rows.size
                bias_sums = problem.empty(*shape) if with_bias else None
                values = None if upstream.values is None else problem.empty(*shape)
                if buffer is not None:
                    rows, others = stored.products(rows, others, buffer)
                coefficients(
                    problem, upstream, rows, others, float16_scale, target, values, bias_sums,
                    chosen, 0 if piece else problem.dim,
                )  # fmt: skip
                for total_of, sums in ((bias, bias_sums), (upstream.values, values)):
                    if total_of is not None and sums is not None:
                        total_of[here] += sums.sum(0)
            stored.multiply(total, c, columns.features, total)
            if both:
                theirs_sum = known(other_sum)[begin:end]
                stored.multiply(theirs_sum, c.T, mine.features, theirs_sum)
        whole_rows = Parts(mine, start, total.unsqueeze(0), None, 1, 0)
        finish(problem, upstream, [work], [whole_rows], scaled=True)
    results: list[Tensor | None] = [None, None]
    results[which] = work.gradient
    if other_sum is not None:
        theirs = Work.into(problem, 1 - which, into[1 - which], None, None, float16_scale)
        whole = Parts(other, 0, other_sum.unsqueeze(0), None, 1, 0)
        finish(problem, upstream, [theirs], [whole], scaled=True)
        results[1 - which] = theirs.gradient
    return results, known(work.slope), bias


def coefficients(
    problem: Problem, upstream: Upstream, own: Side, other: Side, float16_scale: Tensor | None,
    c: Tensor, values: Tensor | None, bias_sums: Tensor | None, chosen: Tile, dim: int,
) -> None:  # fmt: skip
    """dL/dz into c; `dim` is 0 where the sides have inner products in the place of features."""
    tiles_here = cdiv(own.size, chosen.block_m) * cdiv(other.size, chosen.block_n)
    engine.launch(
        coefficient_kernel, (tiles_here,), own, other, problem.scale, float16_scale, c, c.stride(0),
        values, bias_sums, COEFFICIENT=upstream.coefficient, PUSH=folds.softplus_push,
        DONE=folds.softplus_done, **problem.constants(chosen) | {"DIM": dim},
    )  # fmt: skip


def paired_gradients(problem: Problem, upstream: Upstream, needs: Needs, into: Into) -> Gradients:
    """`gradients` for keys of their own: dL/dz is as large as the products, y is D times larger."""
    chosen = problem.tile("stats")
    own, other = problem.side(ROWS), problem.side(COLUMNS)
    products = known(problem.products)
    c = torch.empty_like(products)
    coefficients(problem, upstream, own, other, None, c, None, None, chosen, 0)
    dbias = c.sum(0) if needs.bias else problem.empty(0)
    dscale = (c * products).sum() if needs.scale else problem.empty(0)
    dx, dy = row_dots.products_backward(
        *problem.features, c.mul_(problem.scale), problem.normalize, needs.x, needs.y, into=into
    )
    return Gradients(dx, dy, dscale, dbias)
