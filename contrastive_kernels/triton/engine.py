"""The schedules: which kernels run on which side of a similarity matrix, and in how many parts."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..registration import statistics_dtype
from . import folds, rows, sweep, tiles
from .configs import INTERPRETED, RESIDENT_DIM, Tile, arithmetic, bucket, processors, tile
from .sweep import Outputs, Partial
from .tiles import RANGE, Side

ROWS, COLUMNS = 0, 1

# A part of dL/dz that is stored where vectors are too long to be held, and its columns at most.
CHUNK_BYTES, CHUNK_COLUMNS = 256 << 20, 1 << 20
# Results of programs that share rows, before they are merged.
PARTIAL_BYTES = 32 << 20
# Offsets within a tile are of 32 bit.
LARGEST_STRIDE = 1 << 22
# log2 of the largest term of a sum with a fixed shift, times their number; less where terms are
# multiplied by 1 / norm, which is at most 1e12.
HEADROOM, HEADROOM_WEIGHTED = 120.0, 80.0
# What is packed for a side is padded to a multiple of the largest tile.
PADDING = 256
# From so many pairs on, what a fixed shift saves is more than the launches it may take.
FIXED_PAIRS = 0 if INTERPRETED else 1 << 26
# Programs for each multiprocessor that keep it busy to the end.
WAVES = 4
# Pairs (x_i, y_ik) of a program.
PAIRS = 1024 if INTERPRETED else 64


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, tile: Tile | None = None, **constants):
    """Starts a kernel. Everything here goes through it, so that tests can compile instead."""
    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel[grid](*args, **constants, enable_fp_fusion=True, **options)


def cdiv(a: int, b: int) -> int:
    """Triton's own takes microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def narrow(rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Ids of at most 32 bits that are equal where these are: the position in sorted order."""
    if rows is None:
        return None, None
    if max(rows.dtype.itemsize, columns.dtype.itemsize) > 4:
        ordered = (rows if rows is columns else torch.cat((rows, columns))).sort().values
        rows, columns = (
            torch.searchsorted(ordered, ids.contiguous(), out_int32=True) for ids in (rows, columns)
        )
    return rows.contiguous(), columns.contiguous()


def plain(features: Tensor) -> Tensor:
    """Features whose offsets within a tile fit 32 bit."""
    widest = max(features.stride(-2), features.stride(-1) * features.shape[-1])
    return features if widest < LARGEST_STRIDE else features.contiguous()


class Problem:
    """A similarity matrix: its two sides, and how their products are computed.

    y is None: x with itself. y (N, M, D): the products are stored, and `dim` is 0.
    """

    def __init__(
        self, x: Tensor, y: Tensor | None, scale: Tensor, bias: Tensor | None,
        exclude: tuple[Tensor | None, Tensor | None], keep: tuple[Tensor | None, Tensor | None],
        normalize: bool,
    ):  # fmt: skip
        self.symmetric = y is None
        self.paired = y is not None and y.dim() == 3
        self.scale = scale
        self.device = x.device
        self.normalize = normalize
        self.arithmetic = arithmetic(x, x if y is None else y)
        self.dtype = statistics_dtype(x)
        self.inputs = (x, x if y is None else y)
        self.features = tuple(plain(t) for t in self.inputs)
        self.bias = None if bias is None else bias.contiguous()
        if self.symmetric:
            exclude, keep = (exclude[0], exclude[0]), (keep[0], keep[0])
        self.exclude, self.keep = narrow(*exclude), narrow(*keep)
        self.packed: tuple[Side, Side] | None = None
        self.dim = x.shape[-1]
        if self.paired:
            self.products = paired_products(*self.features, normalize)
            self.dim = 0
            self.arithmetic = self.arithmetic._replace(kind="single", operand=self.arithmetic.sum)

    def size(self, which: int) -> int:
        return self.inputs[which].shape[-2]

    @property
    def unit(self) -> bool:
        """Whether the scale bounds the logits."""
        return self.normalize and self.bias is None and not self.paired

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def pack(self, rows: dict[str, Tensor], columns: dict[str, Tensor]) -> None:
        """Makes both sides ready for the kernels, with what the backward pass knows of them."""
        features = (self.products, self.products) if self.paired else self.features
        dim = features[ROWS].shape[-1]
        normalize = self.normalize and not self.paired
        sources, packed, blocks = [], [], []
        for which, statistics in enumerate((rows, columns)[: 1 if self.symmetric else 2]):
            t, size = features[which], self.size(which)
            source = Side(
                t, t.stride(0), t.stride(1), size, bias=self.bias if which == COLUMNS else None,
                exclude=self.exclude[which], keep=self.keep[which], **statistics,
            )  # fmt: skip
            names = [name for name in Side._fields[4:] if getattr(source, name) is not None]
            names += ["inverse"] if normalize else []
            padded = cdiv(size, PADDING) * PADDING
            made = {}
            for name in names:
                ids = name in ("exclude", "keep")
                made[name] = self.empty(padded, dtype=torch.int32 if ids else None)
            if source.exclude is not None:
                made["ranges"] = self.empty(padded // RANGE.value, 2, dtype=torch.int32)
            sources.append(source)
            packed.append(Side(*source[:4], **made))
            blocks.append(padded // RANGE.value if made else 0)
        if sum(blocks):
            both = [t for pair in zip(sources, packed, strict=True) for t in pair]
            launch(
                tiles.pack_kernel, (sum(blocks),), *both, *([None] * (4 - len(both))), blocks[0],
                DIM=dim, NORMALIZE=normalize, ACC=self.arithmetic.sum,
                BLOCK_K=min(64, next_power_of_2(dim)),
            )  # fmt: skip
        self.packed = (packed[0], packed[-1])

    def side(self, which: int) -> Side:
        if self.packed is None:
            self.pack({}, {})
        return self.packed[which]

    def part(self, side: Side, which: int, start: int, stop: int) -> Side:
        """Vectors of a side from `start`, a multiple of the largest tile, to `stop`."""
        if start == 0 and stop == side.size:
            return side
        fields = {name: t[start:] for name, t in side._asdict().items() if isinstance(t, Tensor)}
        fields["features"] = self.features[which][start:stop]
        if side.ranges is not None:
            fields["ranges"] = side.ranges[start // RANGE.value :]
        return side._replace(size=stop - start, **fields)

    def constants(self, chosen: Tile) -> dict[str, Any]:
        """What the sweeps of this problem are compiled for."""
        return {
            "DIM": self.dim,
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "BLOCK_K": chosen.block_k,
            "DTYPE": self.arithmetic.operand,
            "PRECISION": self.arithmetic.precision,
            "tile": chosen,
        }

    def tile(self, schedule: str) -> Tile:
        return tile(schedule, self.dim, self.arithmetic.kind, self.device)

    def parts(self, own: int, other: int, chosen: Tile, vectors: bool) -> tuple[int, int]:
        """(parts, tiles of each) of the other side, so that every multiprocessor has work."""
        blocks, tiles = cdiv(own, chosen.block_m), cdiv(other, chosen.block_n)
        parts, width = 1, processors(self.device)
        if blocks < 2 * width:
            parts = min(tiles, cdiv(WAVES * width, blocks))
            bytes_each = own * (self.dim if vectors else 6) * self.scale.element_size()
            parts = max(1, min(parts, PARTIAL_BYTES // bytes_each))
        each = cdiv(tiles, parts)
        return cdiv(tiles, each), each

    def blocks(self, which: int) -> list[tuple[int, int]]:
        """Rows whose weighted sums fit into a workspace of fixed size."""
        height = PARTIAL_BYTES // (self.dim * self.scale.element_size())
        height = max(1, height // PADDING) * PADDING
        n = self.size(which)
        return [(start, min(start + height, n)) for start in range(0, n, height)]

    def stored_side(self, needs: list[bool]) -> int:
        """The side whose vectors' coefficients are stored as rows: sums over these are cheap."""
        if self.symmetric or not (needs[1] or needs[3]):
            return ROWS
        return COLUMNS if needs[3] or not needs[0] else ROWS

    def gain(self, weights: Tensor | float, *sides: Side) -> Tensor | None:
        """A power of two that brings weights of this size, times 1 / norm of sides, into the range
        of float16; None for types that have the range of float32."""
        if self.arithmetic.operand != tl.float16:
            return None
        largest = weights
        if not isinstance(largest, Tensor):
            largest = torch.full((), weights, dtype=self.dtype, device=self.device)
        for inverse in (side.inverse for side in sides if side.inverse is not None):
            largest = largest * torch.where(inverse < 1e11, inverse, 0.0).amax()
        return torch.exp2(torch.floor(14 - torch.log2(largest)).clamp(-60, 60))


def stats(
    problem: Problem, which: int, *, softplus: bool = False, mean: bool = False,
    threshold: Tensor | None = None, attend: bool = False,
) -> Outputs:  # fmt: skip
    """Statistics of every row (which = ROWS) or column, 2 N M D; with `attend` their gradient by
    the own vectors too, 4 N M D."""
    n = problem.size(which)
    monitors = [problem.empty(n) if threshold is not None else None for _ in range(3)]
    out = Outputs(
        problem.empty(n), problem.empty(n) if mean else None, *monitors,
        problem.empty(n, problem.dim, dtype=problem.inputs[which].dtype) if attend else None,
        problem.empty(n) if attend else None,
    )  # fmt: skip
    if not attend:
        stats_of(problem, problem.side(which), problem.side(1 - which), softplus, threshold, out)
        return out
    for start, stop in problem.blocks(which):
        own = problem.part(problem.side(which), which, start, stop)
        here = Outputs(*(None if t is None else t[start:stop] for t in out))
        level = None if threshold is None else threshold[start:stop]
        stats_of(problem, own, problem.side(1 - which), softplus, level, here)
    return out


def stats_of(
    problem: Problem, own: Side, other: Side, softplus: bool, threshold: Tensor | None,
    out: Outputs,
) -> None:  # fmt: skip
    """The sweep, the merge of its parts, and the same again for rows that underflowed."""
    attend = out.gradient is not None
    chosen = problem.tile("attend" if attend else "stats")
    gain = problem.gain(1.0, other) if attend else None
    fixed = problem.unit and not softplus and gain is None
    fixed = fixed and own.size * other.size >= FIXED_PAIRS
    parts, each = problem.parts(own.size, other.size, chosen, attend)
    partial = Partial()
    if parts > 1 or attend:
        partial = Partial(
            problem.empty(parts, 6, own.size),
            problem.empty(parts, own.size, problem.dim) if attend else None,
        )
    fold = {
        "PUSH": folds.softplus_push if softplus else folds.softmax_push,
        "DONE": folds.softplus_done if softplus else folds.softmax_done,
        "TOP": 0.0 if softplus else -math.inf,
        "HEADROOM": HEADROOM_WEIGHTED if attend else HEADROOM,
    }
    shifted = fold | {"PUSH": folds.shifted_push} if fixed else fold
    arguments = (problem, own, other, gain, threshold, out, partial, chosen)
    sweep_and_merge(*arguments, parts, each, shifted, fixed=fixed, repair=False)
    if fixed:
        each = cdiv(other.size, chosen.block_n)
        if partial.weighted is None:
            partial = Partial()
        arguments = (problem, own, other, gain, threshold, out, partial, chosen)
        sweep_and_merge(*arguments, 1, each, fold, fixed=False, repair=True)


def sweep_and_merge(
    problem: Problem, own: Side, other: Side, gain: Tensor | None, threshold: Tensor | None,
    out: Outputs, partial: Partial, chosen: Tile, parts: int, each: int, fold: dict[str, Any], *,
    fixed: bool, repair: bool,
) -> None:  # fmt: skip
    launch(
        sweep.stats_kernel, (cdiv(own.size, chosen.block_m), parts), own, other,
        problem.scale, gain, threshold, out._replace(gradient=None, slope=None), partial, each,
        FIXED=fixed, REPAIR=repair, **fold, **problem.constants(chosen),
    )  # fmt: skip
    if partial.state is not None:
        merge(
            problem, own, other.size, gain, out, partial, parts, fold["DONE"], fold["HEADROOM"],
            fixed=fixed, repair=repair, width=6,
        )  # fmt: skip


def merge(
    problem: Problem, own: Side, pairs: int, gain: Tensor | None, out: Outputs, partial: Partial,
    parts: int, done: Any, headroom: float, *, fixed: bool, repair: bool, width: int,
) -> None:  # fmt: skip
    width_k = bucket(problem.dim) if out.gradient is not None else 1
    block = max(1, min(128, 2048 // width_k))
    launch(
        sweep.merge_kernel, (cdiv(own.size, block),), own, pairs, problem.scale, gain, out,
        partial, parts, DIM=problem.dim, DONE=done, FIXED=fixed, HEADROOM=headroom, WIDTH=width,
        REPAIR=repair, BLOCK_M=block, BLOCK_K=width_k,
    )  # fmt: skip


def two_way(problem: Problem) -> tuple[Tensor, Tensor]:
    """lse of rows and of columns of unit vectors in one sweep, 2 N M D; N^2 D for x with itself."""
    chosen = problem.tile("two_way")
    own, other = problem.side(COLUMNS), problem.side(ROWS)
    other_tiles = cdiv(other.size, chosen.block_m)
    own_tiles = cdiv(own.size, chosen.block_n)
    programs = WAVES * processors(problem.device)
    if problem.symmetric:
        own_each = cdiv(own_tiles, min(own_tiles, math.isqrt(2 * programs)))
        other_each = own_each * chosen.block_n // chosen.block_m
        groups = cdiv(own_tiles, own_each)
        grid = (groups * (groups + 1) // 2,)
        sums = problem.zeros(2 * groups, own.size)
        own_sums, other_sums = sums[:groups], sums[groups:]
    else:
        own_each = cdiv(own_tiles, min(own_tiles, math.isqrt(programs)))
        own_groups = cdiv(own_tiles, own_each)
        other_each = cdiv(other_tiles, min(other_tiles, cdiv(programs, own_groups)))
        grid = (own_groups, cdiv(other_tiles, other_each))
        own_sums, other_sums = problem.zeros(grid[1], own.size), problem.zeros(grid[0], other.size)
    pairs = max(own.size, other.size)
    launch(
        sweep.two_way_kernel, grid, own, other, problem.scale, own_sums, other_sums, own_each,
        other_each, pairs, HALF=problem.symmetric, HEADROOM=HEADROOM, **problem.constants(chosen),
    )  # fmt: skip
    if problem.symmetric:
        lse = two_way_lse(problem, ROWS, sums, pairs)
        return lse, lse
    rows_lse = two_way_lse(problem, ROWS, other_sums, pairs)
    return rows_lse, two_way_lse(problem, COLUMNS, own_sums, pairs)


def two_way_lse(problem: Problem, which: int, sums: Tensor, pairs: int) -> Tensor:
    """lse from the sums of `two_way_kernel`, (parts, size); rows that underflowed swept again."""
    chosen = problem.tile("stats")
    own, other = problem.side(which), problem.side(1 - which)
    out = Outputs(problem.empty(own.size))
    merge(
        problem, own, pairs, None, out, Partial(sums), sums.shape[0], folds.softmax_done, HEADROOM,
        fixed=True, repair=False, width=1,
    )  # fmt: skip
    online = {
        "PUSH": folds.softmax_push, "DONE": folds.softmax_done, "TOP": -math.inf,
        "HEADROOM": HEADROOM,
    }  # fmt: skip
    sweep_and_merge(
        problem, own, other, None, None, out, Partial(), chosen, 1,
        cdiv(other.size, chosen.block_n), online, fixed=False, repair=True,
    )  # fmt: skip
    return out.first


class Upstream:
    """What the backward pass knows of each side's statistics: lse, mean, and their gradients."""

    def __init__(self, softplus: bool = False):
        self.sides: list[dict[str, Tensor]] = [{}, {}]
        self.coefficient = folds.softplus_coefficient if softplus else folds.softmax_coefficient
        self.largest: Tensor | float = 0.0
        self.values: Tensor | None = None  # if set, receives the sums of the fold too

    def add(
        self, which: int, lse: Tensor | None, mean: Tensor | None, grad_lse: Tensor | None,
        grad_mean: Tensor | None, half: bool,
    ) -> None:  # fmt: skip
        if grad_lse is None and grad_mean is None:
            return
        if grad_lse is None:
            grad_lse = torch.zeros_like(grad_mean)
        side = {"grad_lse": grad_lse.contiguous()}
        if lse is not None:
            side["lse"] = lse
        if grad_mean is not None:
            side |= {"mean": mean, "grad_mean": grad_mean.contiguous()}
        self.sides[which] = side
        if half:  # |dL/dz| <= |a| + |b| (1 + max of p |z - mean|), and that is at most log M
            self.largest = self.largest + grad_lse.abs().amax()
            if grad_mean is not None:
                self.largest = self.largest + 32 * grad_mean.abs().amax()


def gradients(
    problem: Problem, upstream: Upstream, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dscale, dbias); what is not needed is empty. 4 N M D for each side."""
    out = [problem.empty(0, dtype=t.dtype) for t in problem.inputs]
    slope = bias = None
    problem.pack(*upstream.sides)
    if problem.paired:
        return paired_gradients(problem, upstream, needs)
    by_side = [needs[0] or (needs[2] and not needs[1]), needs[1] or needs[3]]
    if problem.symmetric:
        by_side = [needs[0] or needs[2], False]
    if problem.dim > RESIDENT_DIM:
        own = problem.stored_side(needs)
        both = all(by_side) and not problem.symmetric
        results, slope, bias = stored_gradients(problem, upstream, own, both, needs[3])
        out = [t if results[w] is None else results[w] for w, t in enumerate(out)]
    else:
        for which in (ROWS, COLUMNS):
            if by_side[which]:
                out[which], slope, sums = side_gradient(
                    problem, upstream, which, needs[3] and which == COLUMNS
                )  # fmt: skip
                bias = sums if which == COLUMNS else None
    empty = problem.empty(0)
    dscale = slope.sum() * (0.5 if problem.symmetric else 1.0) if needs[2] else empty
    return out[0], out[1], dscale, empty if bias is None or not needs[3] else bias


def summed_softplus(
    problem: Problem, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of softplus over all pairs, and its gradients: 6 N M D by stored parts, else 8."""
    n = problem.size(ROWS)
    upstream = Upstream(softplus=True)
    ones = torch.ones(n, dtype=problem.dtype, device=problem.device)
    upstream.add(ROWS, None, None, ones, None, problem.arithmetic.operand == tl.float16)
    if problem.dim > RESIDENT_DIM:
        upstream.values = problem.empty(problem.size(problem.stored_side(needs)))
        made = gradients(problem, upstream, needs)
        return upstream.values.sum(), *made
    out = stats(problem, ROWS, softplus=True, attend=True)
    rest = gradients(problem, upstream, [False, needs[1], False, needs[3]])
    dx = out.gradient if needs[0] else rest[0]
    return out.first.sum(), dx, rest[1], out.slope.sum() if needs[2] else rest[2], rest[3]


def side_gradient(
    problem: Problem, upstream: Upstream, which: int, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of one side, its derivative by the scale (size,), and sums of dL/dz."""
    chosen = problem.tile("gradient")
    other = problem.side(1 - which)
    n = problem.size(which)
    gain = problem.gain(upstream.largest, other)
    gradient = problem.empty(n, problem.dim, dtype=problem.inputs[which].dtype)
    slope, bias = problem.empty(n), problem.empty(n) if with_bias else None
    for start, stop in problem.blocks(which):
        own = problem.part(problem.side(which), which, start, stop)
        count, each = problem.parts(own.size, other.size, chosen, True)
        parts = problem.empty(count, own.size, problem.dim)
        bias_sums = problem.empty(count, own.size) if with_bias else None
        launch(
            sweep.gradient_kernel, (cdiv(own.size, chosen.block_m), count), own, other,
            problem.scale, gain, parts, bias_sums, each, COEFFICIENT=upstream.coefficient,
            **problem.constants(chosen),
        )  # fmt: skip
        finish(problem, own, gain, gradient[start:stop], slope[start:stop], parts, scaled=False)
        if bias is not None:
            torch.sum(bias_sums, 0, out=bias[start:stop])
    return gradient, slope, bias


def finish(
    problem: Problem, own: Side, gain: Tensor | None, gradient: Tensor, slope: Tensor | None,
    parts: Tensor, scaled: bool,
) -> None:  # fmt: skip
    width = next_power_of_2(problem.dim)
    block = max(1, min(128, 2048 // width))
    launch(
        sweep.finish_kernel, (cdiv(own.size, block),), own, problem.scale, gain, gradient,
        slope, parts, parts.shape[0], DIM=problem.dim, SCALED=scaled, BLOCK_M=block, BLOCK_K=width,
    )  # fmt: skip


def stored_gradients(
    problem: Problem, upstream: Upstream, which: int, both: bool, with_bias: bool
) -> tuple[list[Tensor | None], Tensor, Tensor | None]:
    """Gradients by chunks of dL/dz that are stored: 2 N M D, and 2 more by a library's products for
    each side. Returns them by side, the derivative by the scale, and sums of dL/dz."""
    chosen = problem.tile("coefficient")
    own, other = problem.side(which), problem.side(1 - which)
    gain = problem.gain(upstream.largest, own, other)
    operand = problem.inputs[which].dtype
    if operand != problem.inputs[1 - which].dtype:
        operand = problem.dtype
    n, m, dim = own.size, other.size, problem.dim
    width = min(m, CHUNK_COLUMNS)
    height = CHUNK_BYTES // (operand.itemsize * width)
    height = min(n, max(1, height // PADDING) * PADDING)
    chunk = problem.empty(height * width, dtype=operand)
    own_sum = problem.empty(height, dim)
    other_sum = problem.zeros(m, dim) if both else None
    gradient, slope = problem.empty(n, dim, dtype=problem.inputs[which].dtype), problem.empty(n)
    bias = problem.zeros(n) if with_bias else None
    if upstream.values is not None:
        upstream.values.zero_()
    for start in range(0, n, height):
        stop = min(start + height, n)
        mine = problem.part(own, which, start, stop)
        total = own_sum[: stop - start].zero_()
        for begin in range(0, m, width):
            end = min(begin + width, m)
            theirs = problem.part(other, 1 - which, begin, end)
            c = chunk[: mine.size * theirs.size].view(mine.size, theirs.size)
            tiles_here = cdiv(theirs.size, chosen.block_n)
            bias_sums = problem.empty(tiles_here, mine.size) if with_bias else None
            values = None if upstream.values is None else problem.empty(tiles_here, mine.size)
            coefficients(problem, upstream, mine, theirs, gain, c, values, bias_sums, chosen)
            for total_of, sums in ((bias, bias_sums), (upstream.values, values)):
                if sums is not None:
                    total_of[start:stop] += sums.sum(0)
            add_product(total, c, theirs.features)
            if both:
                add_product(other_sum[begin:end], c.T, mine.features)
        finish(
            problem, mine, gain, gradient[start:stop], slope[start:stop], total.unsqueeze(0),
            scaled=True,
        )  # fmt: skip
    results: list[Tensor | None] = [None, None]
    results[which] = gradient
    if both:
        results[1 - which] = problem.empty(m, dim, dtype=problem.inputs[1 - which].dtype)
        finish(
            problem, other, gain, results[1 - which], None, other_sum.unsqueeze(0), scaled=True
        )  # fmt: skip
    return results, slope, bias


def coefficients(
    problem: Problem, upstream: Upstream, own: Side, other: Side, gain: Tensor | None, c: Tensor,
    values: Tensor | None, bias_sums: Tensor | None, chosen: Tile,
) -> None:  # fmt: skip
    tiles_here = cdiv(own.size, chosen.block_m) * cdiv(other.size, chosen.block_n)
    launch(
        sweep.coefficient_kernel, (tiles_here,), own, other, problem.scale, gain, c, values,
        bias_sums, COEFFICIENT=upstream.coefficient, PUSH=folds.softplus_push,
        DONE=folds.softplus_done,
        **problem.constants(chosen),
    )  # fmt: skip


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, with the sum in the type of `total`."""
    b = b.to(a.dtype)
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)


def paired_arguments(x: Tensor, y: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Sizes, strides and constants of the kernels for <x_i, y_ik>."""
    dim = x.shape[1]
    sizes = (*y.shape[:2], x.stride(0), x.stride(1), *y.stride())
    acc = arithmetic(x, y).sum
    return sizes, {"DIM": dim, "ACC": acc, "BLOCK_K": min(128, next_power_of_2(dim))}


def paired_products(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    """<x_i, y_ik>, (N, K)."""
    (n, keys, *strides), constants = paired_arguments(x, y)
    out = torch.empty((n, keys), dtype=statistics_dtype(x), device=x.device)
    launch(
        rows.row_dot_kernel, (cdiv(n * keys, PAIRS),), x, y, out, n * keys, keys, *strides,
        NORMALIZE=normalize, BLOCK=PAIRS, **constants,
    )  # fmt: skip
    return out


def paired_products_backward(
    x: Tensor, y: Tensor, grad: Tensor, normalize: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y from those of <x_i, y_ik>."""
    (n, keys, *strides), constants = paired_arguments(x, y)
    dx, dy = (torch.empty(t.shape if need else (0,), dtype=t.dtype, device=t.device)
              for t, need in ((x, needs[0]), (y, needs[1])))  # fmt: skip
    if keys == 1:
        launch(
            rows.row_dot_backward_kernel, (cdiv(n, PAIRS),), x, y, grad, dx if needs[0] else None,
            dy if needs[1] else None, n, *strides, NORMALIZE=normalize, BLOCK=PAIRS, **constants,
        )  # fmt: skip
        return dx, dy
    weights = along = None
    if needs[0]:
        weights, along = torch.empty_like(grad), torch.empty_like(grad)
    launch(
        rows.row_dot_keys_kernel, (cdiv(n * keys, PAIRS),), x, y, grad,
        dy if needs[1] else None, weights, along, n * keys, keys, *strides, NORMALIZE=normalize,
        BLOCK=PAIRS, **constants,
    )  # fmt: skip
    if needs[0]:
        block_n = min(PAIRS, next_power_of_2(keys))
        block_m = PAIRS // block_n
        grid = (cdiv(n, block_m), cdiv(constants["DIM"], constants["BLOCK_K"]))
        launch(
            rows.row_dot_queries_kernel, grid, x, y, weights, along, dx, n, keys, *strides,
            NORMALIZE=normalize, BLOCK_M=block_m, BLOCK_N=block_n, **constants,
        )  # fmt: skip
    return dx, dy


def paired_gradients(
    problem: Problem, upstream: Upstream, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gradients` for keys of their own: dL/dz is as large as the products, y is D times larger."""
    chosen = problem.tile("stats")
    own, other = problem.side(ROWS), problem.side(COLUMNS)
    c = torch.empty_like(problem.products)
    coefficients(problem, upstream, own, other, None, c, None, None, chosen)
    empty = problem.empty(0)
    dbias = c.sum(0) if needs[3] else empty
    dscale = (c * problem.products).sum() if needs[2] else empty
    dx, dy = paired_products_backward(
        *problem.features, c.mul_(problem.scale), problem.normalize, needs
    )  # fmt: skip
    return dx, dy, dscale, dbias
