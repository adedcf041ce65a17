"""The schedules: which kernels run on which side of a similarity matrix, and in how many parts."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
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
# Programs for each multiprocessor that keep it busy to the end.
WAVES = 4
# Pairs (x_i, y_ik) of a program.
PAIRS = 1024 if INTERPRETED else 64


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, tile: Tile | None = None, **constants):
    """Starts a kernel. Everything here goes through it, so that tests can compile instead."""
    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel[grid](*args, **constants, enable_fp_fusion=True, **options)


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
        self.packed: dict[int, Side] = {}
        self.dim = x.shape[-1]
        if self.paired:
            self.products = paired_products(*self.features, normalize)
            self.dim = 0
            self.arithmetic = self.arithmetic._replace(kind="single", operand=self.arithmetic.sum)

    def size(self, which: int) -> int:
        return self.inputs[which].shape[-2]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def pack(self, which: int, **statistics: Tensor) -> None:
        """Makes a side ready for the kernels, with what the backward pass knows of it."""
        features = self.products if self.paired else self.features[which]
        size, dim = self.size(which), features.shape[-1]
        source = Side(
            features, features.stride(-2), features.stride(-1), size,
            bias=self.bias if which == COLUMNS else None, exclude=self.exclude[which],
            keep=self.keep[which], **statistics,
        )  # fmt: skip
        normalize = self.normalize and not self.paired
        blocks = triton.cdiv(size, PADDING) * (PADDING // RANGE.value)
        made = {name: self.empty(RANGE.value * blocks) for name in statistics}
        if source.bias is not None:
            made["bias"] = self.empty(RANGE.value * blocks)
        if normalize:
            made["inverse"] = self.empty(RANGE.value * blocks)
        for name in ("exclude", "keep"):
            if getattr(source, name) is not None:
                made[name] = self.empty(RANGE.value * blocks, dtype=torch.int32)
        if source.exclude is not None:
            made["ranges"] = self.empty(blocks, 2, dtype=torch.int32)
        packed = Side(*source[:4], **made)
        if made:
            launch(
                tiles.pack_kernel, (blocks,), source, packed, DIM=dim, NORMALIZE=normalize,
                ACC=self.arithmetic.sum, BLOCK_K=min(64, triton.next_power_of_2(dim)),
            )  # fmt: skip
        self.packed[which] = packed

    def side(self, which: int) -> Side:
        if which not in self.packed:
            if self.symmetric:
                self.pack(ROWS)
                self.packed[COLUMNS] = self.packed[ROWS]
            else:
                self.pack(which)
        return self.packed[which]

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

    def parts(self, own: int, tiles: int, block: int, vectors: bool) -> tuple[int, int]:
        """(parts, tiles of each) of the other side, so that every multiprocessor has work."""
        blocks, width = triton.cdiv(own, block), processors(self.device)
        parts = 1
        if blocks < 2 * width:
            parts = min(tiles, triton.cdiv(WAVES * width, blocks))
            bytes_each = own * (self.dim if vectors else 6) * self.scale.element_size()
            parts = max(1, min(parts, PARTIAL_BYTES // bytes_each))
        each = triton.cdiv(tiles, parts)
        return triton.cdiv(tiles, each), each

    def gain(self, weights: Tensor | float, *sides: int) -> Tensor | None:
        """A power of two that brings weights of this size, times 1 / norm of sides, into the range
        of float16; None for types that have the range of float32."""
        if self.arithmetic.operand != triton.language.float16:
            return None
        largest = torch.as_tensor(weights, dtype=self.dtype, device=self.device)
        for which in sides if self.normalize else ():
            inverse = self.side(which).inverse
            largest = largest * torch.where(inverse < 1e11, inverse, 0.0).amax()
        return torch.exp2(torch.floor(14 - torch.log2(largest)).clamp(-60, 60))


def stats(
    problem: Problem, which: int, *, softplus: bool = False, mean: bool = False,
    threshold: Tensor | None = None, attend: bool = False,
) -> Outputs:  # fmt: skip
    """Statistics of every row (which = ROWS) or column; 2 N M D, or with `attend`, which brings
    their gradient by the own vectors too, 4 N M D."""
    chosen = problem.tile("attend" if attend else "stats")
    own, other = problem.side(which), problem.side(1 - which)
    n = own.size
    monitors = [problem.empty(n) if threshold is not None else None for _ in range(3)]
    out = Outputs(
        problem.empty(n), problem.empty(n) if mean else None, *monitors,
        problem.empty(n, problem.dim, dtype=problem.inputs[which].dtype) if attend else None,
        problem.empty(n) if attend else None,
    )  # fmt: skip
    gain = problem.gain(1.0, 1 - which) if attend else None
    fixed = problem.normalize and problem.bias is None and not problem.paired
    fixed = fixed and not softplus and gain is None
    headroom = HEADROOM_WEIGHTED if attend else HEADROOM
    parts, each = problem.parts(n, triton.cdiv(other.size, chosen.block_n), chosen.block_m, attend)
    partial = Partial()
    if parts > 1:
        partial = Partial(
            problem.empty(parts, 6, n), problem.empty(parts, n, problem.dim) if attend else None
        )  # fmt: skip
    done = folds.softplus_done if softplus else folds.softmax_done
    arguments = (own, other, problem.scale, gain, threshold, out)
    online = {
        "PUSH": folds.softplus_push if softplus else folds.softmax_push,
        "DONE": done, "FIXED": False, "TOP": 0.0 if softplus else -math.inf, "HEADROOM": headroom,
        "REPAIR": False,
    }  # fmt: skip
    fold = online | {"PUSH": folds.shifted_push, "FIXED": True} if fixed else online
    constants = problem.constants(chosen)
    grid = (triton.cdiv(n, chosen.block_m), parts)
    launch(sweep.stats_kernel, grid, *arguments, partial, each, **fold, **constants)
    if parts > 1:
        merge(problem, own, other.size, out, partial, parts, done, gain, fixed, headroom, width=6)
    if fixed:
        repair = online | {"REPAIR": True}
        each = triton.cdiv(other.size, chosen.block_n)
        launch(sweep.stats_kernel, grid[:1], *arguments, Partial(), each, **repair, **constants)
    return out


def merge(
    problem: Problem, own: Side, pairs: int, out: Outputs, partial: Partial, parts: int, done: Any,
    gain: Tensor | None, fixed: bool, headroom: float, width: int,
) -> None:  # fmt: skip
    width_k = bucket(problem.dim) if out.gradient is not None else 1
    block = max(1, min(128, 2048 // width_k))
    launch(
        sweep.merge_kernel, (triton.cdiv(own.size, block),), own, pairs, problem.scale, gain, out,
        partial, parts, DIM=problem.dim, DONE=done, FIXED=fixed, HEADROOM=headroom, WIDTH=width,
        BLOCK_M=block, BLOCK_K=width_k,
    )  # fmt: skip


def two_way(problem: Problem) -> tuple[Tensor, Tensor]:
    """lse of rows and of columns of unit vectors in one sweep, 2 N M D; N^2 D for x with itself."""
    chosen = problem.tile("two_way")
    own, other = problem.side(COLUMNS), problem.side(ROWS)
    other_tiles = triton.cdiv(other.size, chosen.block_m)
    own_tiles = triton.cdiv(own.size, chosen.block_n)
    programs = WAVES * processors(problem.device)
    if problem.symmetric:
        groups = min(own_tiles, math.isqrt(2 * programs))
        own_each = other_each = triton.cdiv(own_tiles, groups)
        groups = triton.cdiv(own_tiles, own_each)
        sums = torch.zeros((2 * groups, own.size), dtype=problem.dtype, device=problem.device)
        own_sums, other_sums = sums[:groups], sums[groups:]
        grid = (groups * (groups + 1) // 2,)
    else:
        own_each = triton.cdiv(own_tiles, min(own_tiles, math.isqrt(programs)))
        own_groups = triton.cdiv(own_tiles, own_each)
        other_each = triton.cdiv(other_tiles, min(other_tiles, triton.cdiv(programs, own_groups)))
        grid = (own_groups, triton.cdiv(other_tiles, other_each))
        own_sums = torch.zeros((grid[1], own.size), dtype=problem.dtype, device=problem.device)
        other_sums = torch.zeros((grid[0], other.size), dtype=problem.dtype, device=problem.device)
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
        problem, own, pairs, out, Partial(sums), sums.shape[0], folds.softmax_done, None, True,
        HEADROOM, width=1,
    )  # fmt: skip
    launch(
        sweep.stats_kernel, (triton.cdiv(own.size, chosen.block_m),), own, other, problem.scale,
        None, None, out, Partial(), triton.cdiv(other.size, chosen.block_n),
        PUSH=folds.softmax_push, DONE=folds.softmax_done, FIXED=False, TOP=-math.inf,
        HEADROOM=HEADROOM, REPAIR=True, **problem.constants(chosen),
    )  # fmt: skip
    return out.first


class Upstream:
    """What the backward pass knows of each side's statistics: lse, mean, and their gradients."""

    def __init__(self, softplus: bool = False):
        self.sides: list[dict[str, Tensor]] = [{}, {}]
        self.coefficient = folds.softplus_coefficient if softplus else folds.softmax_coefficient
        self.largest: Tensor | float = 0.0

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
    problem.pack(ROWS, **upstream.sides[ROWS])
    if problem.symmetric:
        problem.packed[COLUMNS] = problem.packed[ROWS]
    else:
        problem.pack(COLUMNS, **upstream.sides[COLUMNS])
    if problem.paired:
        return paired_gradients(problem, upstream, needs)
    by_side = [needs[0] or (needs[2] and not needs[1]), needs[1] or needs[3]]
    if problem.symmetric:
        by_side = [needs[0] or needs[2], False]
    if problem.dim > RESIDENT_DIM:
        own = COLUMNS if needs[3] or not by_side[ROWS] else ROWS
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


def side_gradient(
    problem: Problem, upstream: Upstream, which: int, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of one side, its derivative by the scale (size,), and sums of dL/dz."""
    chosen = problem.tile("gradient")
    own, other = problem.side(which), problem.side(1 - which)
    n = own.size
    gain = problem.gain(upstream.largest, 1 - which)
    gradient = problem.empty(n, problem.dim, dtype=problem.inputs[which].dtype)
    slope = problem.empty(n)
    count, each = problem.parts(n, triton.cdiv(other.size, chosen.block_n), chosen.block_m, True)
    parts = problem.empty(count, n, problem.dim) if count > 1 else None
    bias_sums = problem.empty(count, n) if with_bias else None
    launch(
        sweep.gradient_kernel, (triton.cdiv(n, chosen.block_m), count), own, other, problem.scale,
        gain, gradient, slope, bias_sums, parts, each, COEFFICIENT=upstream.coefficient,
        **problem.constants(chosen),
    )  # fmt: skip
    if count > 1:
        finish(problem, own, gain, gradient, slope, parts, scaled=False)
    return gradient, slope, None if bias_sums is None else bias_sums.sum(0)


def finish(
    problem: Problem, own: Side, gain: Tensor | None, gradient: Tensor, slope: Tensor,
    parts: Tensor, scaled: bool,
) -> None:  # fmt: skip
    width = triton.next_power_of_2(problem.dim)
    block = max(1, 2048 // width)
    launch(
        sweep.finish_kernel, (triton.cdiv(own.size, block),), own, problem.scale, gain, gradient,
        slope, parts, parts.shape[0], DIM=problem.dim, SCALED=scaled, BLOCK_M=block, BLOCK_K=width,
    )  # fmt: skip


def stored_gradients(
    problem: Problem, upstream: Upstream, which: int, both: bool, with_bias: bool
) -> tuple[list[Tensor | None], Tensor, Tensor | None]:
    """Gradients by chunks of dL/dz that are stored: 2 N M D, and 2 more by a library's products for
    each side. Returns them by side, the derivative by the scale, and sums of dL/dz."""
    chosen = problem.tile("coefficient")
    own, other = problem.side(which), problem.side(1 - which)
    gain = problem.gain(upstream.largest, which, 1 - which)
    operand = problem.inputs[which].dtype
    if operand != problem.inputs[1 - which].dtype:
        operand = problem.dtype
    n, m, dim = own.size, other.size, problem.dim
    width = min(m, CHUNK_COLUMNS)
    height = CHUNK_BYTES // (torch.empty((), dtype=operand).element_size() * width)
    height = min(n, max(1, height // chosen.block_m) * chosen.block_m)
    chunk = problem.empty(height * width, dtype=operand)
    own_sum = problem.empty(height, dim)
    other_sum = torch.zeros((m, dim), dtype=problem.dtype, device=problem.device) if both else None
    gradient, slope = problem.empty(n, dim, dtype=problem.inputs[which].dtype), problem.empty(n)
    bias = problem.empty(n) if with_bias else None
    for start in range(0, n, height):
        rows_here = min(height, n - start)
        mine = problem.features[which][start : start + rows_here]
        own_sum.zero_()
        if bias is not None:
            bias[start : start + rows_here] = 0
        for column in range(0, m, width):
            columns_here = min(width, m - column)
            theirs = problem.features[1 - which][column : column + columns_here]
            c = chunk[: rows_here * columns_here].view(rows_here, columns_here)
            column_tiles = triton.cdiv(columns_here, chosen.block_n)
            bias_sums = problem.empty(column_tiles, rows_here) if with_bias else None
            launch(
                sweep.coefficient_kernel, (triton.cdiv(rows_here, chosen.block_m) * column_tiles,),
                own, other, problem.scale, gain, c, None, bias_sums, start, column, rows_here,
                columns_here, COEFFICIENT=upstream.coefficient, PUSH=folds.softplus_push,
                **problem.constants(chosen),
            )  # fmt: skip
            if bias is not None:
                bias[start : start + rows_here] += bias_sums.sum(0)
            add_product(own_sum[:rows_here], c, theirs)
            if both:
                add_product(other_sum[column : column + columns_here], c.T, mine)
        block = slice(start, start + rows_here)
        inverse = None if own.inverse is None else own.inverse[block]
        part = Side(mine, own.stride, own.inner, rows_here, inverse=inverse)
        finish(
            problem, part, gain, gradient[block], slope[block], own_sum[:rows_here].unsqueeze(0),
            scaled=True,
        )  # fmt: skip
    results: list[Tensor | None] = [None, None]
    results[which] = gradient
    if both:
        results[1 - which] = problem.empty(m, dim, dtype=problem.inputs[1 - which].dtype)
        unused = problem.empty(m)
        finish(problem, other, gain, results[1 - which], unused, other_sum.unsqueeze(0), scaled=True)
    return results, slope, bias


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
    return sizes, {"DIM": dim, "ACC": acc, "BLOCK_K": min(128, triton.next_power_of_2(dim))}


def paired_products(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    """<x_i, y_ik>, (N, K)."""
    (n, keys, *strides), constants = paired_arguments(x, y)
    out = torch.empty((n, keys), dtype=statistics_dtype(x), device=x.device)
    launch(
        rows.row_dot_kernel, (triton.cdiv(n * keys, PAIRS),), x, y, out, n * keys, keys, *strides,
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
    weights = along = None
    if needs[0]:
        weights, along = torch.empty_like(grad), torch.empty_like(grad)
    launch(
        rows.row_dot_keys_kernel, (triton.cdiv(n * keys, PAIRS),), x, y, grad,
        dy if needs[1] else None, weights, along, n * keys, keys, *strides, NORMALIZE=normalize,
        BLOCK=PAIRS, **constants,
    )  # fmt: skip
    if needs[0]:
        block_n = min(PAIRS, triton.next_power_of_2(keys))
        block_m = PAIRS // block_n
        grid = (triton.cdiv(n, block_m), triton.cdiv(constants["DIM"], constants["BLOCK_K"]))
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
    tiles = triton.cdiv(own.size, chosen.block_m) * triton.cdiv(other.size, chosen.block_n)
    launch(
        sweep.coefficient_kernel, (tiles,), own, other, problem.scale, None, c, None, None, 0, 0,
        own.size, other.size, COEFFICIENT=upstream.coefficient, PUSH=folds.softplus_push,
        **problem.constants(chosen),
    )  # fmt: skip
    empty = problem.empty(0)
    dbias = c.sum(0) if needs[3] else empty
    dscale = (c * problem.products).sum() if needs[2] else empty
    dx, dy = paired_products_backward(
        *problem.features, c.mul_(problem.scale), problem.normalize, needs
    )  # fmt: skip
    return dx, dy, dscale, dbias
