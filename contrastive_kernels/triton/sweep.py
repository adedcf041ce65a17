"""The forward sweeps over the tiles of a similarity matrix. No formula of a statistic, no loss.

Own vectors stay with a program, the vectors of the other side pass by in tiles. Which side is which
is the caller's choice: the gradient of the keys is that of the queries with the sides exchanged.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .folds import LOG2, LOG2E, merge
from .gradient import block_and_part, load_part, store_gradient, store_part, weigh
from .tiles import dot, id_range, load_block, load_features, load_resident, logits

# Marks a row whose sum came out too small for the fixed shift: it is swept again.
REDO: tl.constexpr = tl.constexpr(float("inf"))


class Outputs(NamedTuple):
    """Results for each own vector; None is not computed.

    first, second: what the fold gives, (N,); low, second_low: what rounding took from them. rank,
    total, pairs: of the logits above a threshold, their sum and their number. gradient (N, D): d
    first / d own vector, and slope (N,): d first / d scale.
    """

    first: Tensor | None = None
    second: Tensor | None = None
    rank: Tensor | None = None
    total: Tensor | None = None
    pairs: Tensor | None = None
    gradient: Tensor | None = None
    slope: Tensor | None = None
    low: Tensor | None = None
    second_low: Tensor | None = None


class Partial(NamedTuple):
    """Results of parts of the other side, before they are merged.

    state (parts, width, N): of the width, 1 holds the totals of a fixed shift; 6 hold totals, tops,
    weighted, and the three numbers for a threshold. weighted (parts, N, D): sum_j G_ij y_j.
    """

    state: Tensor | None = None
    weighted: Tensor | None = None


@triton.jit
def fixed_shift(scale, largest_bias, terms, SUM_EXPONENT: tl.constexpr):
    """A shift for the logits of unit vectors in units of log 2, and the least sum it is good for.

    The largest term becomes at most 2^SUM_EXPONENT / terms. Those below 2^-126 are flushed to zero;
    together they matter less than 2^-24 to a sum of at least terms 2^-102.
    """
    bound = tl.abs(scale) * (1.01 * LOG2E)
    if largest_bias is not None:
        bound += tl.maximum(tl.load(largest_bias), 0.0) * LOG2E
    count = tl.cast(terms, tl.float32)
    shift = tl.maximum(bound - (SUM_EXPONENT - tl.log2(count)), 0.0)
    least = count * 1.9721522630525295e-31
    if largest_bias is None:  # else logits may be anything below
        least = tl.where(shift > 0.0, least, 0.0)  # without a shift no term is flushed
    return shift, least


# Counts change from batch to batch, and nothing is gained from a kernel for each kind of number.
@triton.jit(do_not_specialize=["tiles_per_part", "programs", "other_tiles_per_part"])
def stats_kernel(
    own, other, scale_ptr, largest_bias, float16_scale, threshold, out, partial, tiles_per_part,
    programs, other_out, other_partial, other_tiles_per_part, BOTH: tl.constexpr,
    DIM: tl.constexpr, PUSH: tl.constexpr, DONE: tl.constexpr, FIXED: tl.constexpr,
    TOP: tl.constexpr, SUM_EXPONENT: tl.constexpr, REPAIR: tl.constexpr, CONTINUED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds each row of logits, and on request sums the other side's vectors, weighted.

    REPAIR: only for blocks with rows that a fixed shift did not suit. BOTH: the programs, one for
    each block and part, are in a row, and after the `programs` of the rows come the columns'.
    CONTINUED: states of lse alone go on from what `partial` has of other vectors.
    """
    program = tl.program_id(0)
    if REPAIR:
        i = program * BLOCK_M + tl.arange(0, BLOCK_M)
        if not to_redo(out, i, i < own.size):
            return
    if BOTH:
        if program < programs:
            block, part = block_and_part(program, own, BLOCK_M)
            stats_part(
                block, part, own, other, scale_ptr, largest_bias, float16_scale, threshold, out,
                partial, tiles_per_part, DIM, PUSH, DONE, FIXED, TOP, SUM_EXPONENT, CONTINUED,
                BLOCK_M, BLOCK_N, BLOCK_K, DTYPE, PRECISION,
            )  # fmt: skip
        else:
            block, part = block_and_part(program - programs, other, BLOCK_M)
            stats_part(
                block, part, other, own, scale_ptr, largest_bias, float16_scale, None,
                other_out, other_partial, other_tiles_per_part, DIM, PUSH, DONE, FIXED, TOP,
                SUM_EXPONENT, CONTINUED, BLOCK_M, BLOCK_N, BLOCK_K, DTYPE, PRECISION,
            )  # fmt: skip
    else:
        stats_part(
            program, tl.program_id(1), own, other, scale_ptr, largest_bias, float16_scale,
            threshold, out, partial, tiles_per_part, DIM, PUSH, DONE, FIXED, TOP, SUM_EXPONENT,
            CONTINUED, BLOCK_M, BLOCK_N, BLOCK_K, DTYPE, PRECISION,
        )  # fmt: skip


@triton.jit
def stats_part(
    block, part, own, other, scale_ptr, largest_bias, float16_scale, threshold, out, partial,
    tiles_per_part, DIM: tl.constexpr, PUSH: tl.constexpr, DONE: tl.constexpr, FIXED: tl.constexpr,
    TOP: tl.constexpr, SUM_EXPONENT: tl.constexpr, CONTINUED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Those of a block of own vectors with a part of the other side."""
    MEAN: tl.constexpr = out.second is not None
    ATTEND: tl.constexpr = partial.weighted is not None
    start = block * BLOCK_M
    i = start + tl.arange(0, BLOCK_M)
    inside = i < own.size
    scale = tl.load(scale_ptr)
    k = tl.arange(0, BLOCK_K)
    zeros = tl.zeros((BLOCK_M,), scale.dtype)
    top, least = zeros + TOP, 0.0
    if FIXED:
        shift, least = fixed_shift(scale, largest_bias, other.size, SUM_EXPONENT)
        top = zeros + shift
    if CONTINUED:
        states = partial.state + tl.cast(part, tl.int64) * 6 * own.size + i
        top = tl.load(states + own.size, mask=inside, other=0.0)
        state = (top, tl.load(states, mask=inside, other=0.0), zeros)
    else:
        state = (top, zeros, zeros)
    counts = (zeros, zeros, zeros)
    x = load_resident(own, start, DIM, BLOCK_M, BLOCK_K, DTYPE)
    if ATTEND:
        weighted = tl.zeros((BLOCK_M, BLOCK_K), scale.dtype)
    if threshold is not None:
        level = tl.load(threshold + i, mask=inside, other=0.0)

    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tl.cdiv(other.size, BLOCK_N))
    for tile in range(first, last):
        other_start = tile * BLOCK_N
        y = load_resident(other, other_start, DIM, BLOCK_N, BLOCK_K, DTYPE)
        z2 = logits(
            own, other, start, other_start, x, y, scale, DIM, BLOCK_M, BLOCK_N, BLOCK_K, DTYPE,
            PRECISION, False,
        )  # fmt: skip
        state, weights, factor = PUSH(state, z2, MEAN)
        if ATTEND:
            weights = weigh(weights, other, other_start, float16_scale, BLOCK_N, DTYPE)
            weighted = dot(weights, y, weighted * factor[:, None], PRECISION)
        if threshold is not None:
            kept = z2 != -float("inf")  # NaN too
            z = tl.where(kept, z2 * LOG2, 0.0)
            above = kept & ~(z <= level[:, None])
            counts = (
                counts[0] + tl.sum(above.to(zeros.dtype), 1),
                counts[1] + tl.sum(z, 1),
                counts[2] + tl.sum(kept.to(zeros.dtype), 1),
            )

    if partial.state is None:
        store_rows(out, i, inside, state, counts, least, DONE)
    else:
        pointers = partial.state + tl.cast(part, tl.int64) * 6 * own.size + i
        tl.store(pointers, state[1], mask=inside)
        tl.store(pointers + own.size, state[0], mask=inside)
        if MEAN:
            tl.store(pointers + 2 * own.size, state[2], mask=inside)
        if threshold is not None:
            tl.store(pointers + 3 * own.size, counts[0], mask=inside)
            tl.store(pointers + 4 * own.size, counts[1], mask=inside)
            tl.store(pointers + 5 * own.size, counts[2], mask=inside)
    if ATTEND:
        store_part(partial.weighted, weighted, part, own, i, k, inside, DIM)


@triton.jit
def to_redo(out, i, inside):
    """Whether a sweep with a fixed shift has marked any of the rows."""
    found = tl.load(out.first + i, mask=inside, other=0.0)
    return tl.max((found == REDO).to(tl.int32), 0) == 1


@triton.jit
def store_rows(out, i, inside, state, counts, least, DONE: tl.constexpr):
    """Writes the statistics; returns the factor of the weights."""
    first, second, norm, low, second_low = DONE(state)
    first = tl.where(state[1] < least, REDO, first)
    tl.store(out.first + i, first, mask=inside)
    if out.low is not None:
        tl.store(out.low + i, low, mask=inside)
    if out.second is not None:
        tl.store(out.second + i, second, mask=inside)
        tl.store(out.second_low + i, second_low, mask=inside)
    if out.rank is not None:
        tl.store(out.rank + i, counts[0], mask=inside)
        tl.store(out.total + i, counts[1], mask=inside)
        tl.store(out.pairs + i, counts[2], mask=inside)
    return norm


@triton.jit(do_not_specialize=["terms", "parts", "programs", "other_terms", "other_parts"])
def merge_kernel(
    own, other, scale_ptr, largest_bias, float16_scale, out, partial, terms, parts, programs,
    other_out, other_partial, other_terms, other_parts, BOTH: tl.constexpr, DIM: tl.constexpr,
    LENGTH: tl.constexpr, DONE: tl.constexpr, FIXED: tl.constexpr, SUM_EXPONENT: tl.constexpr,
    WIDTH: tl.constexpr, REPAIR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Merges parts in their order: of `stats_kernel`, which has BOTH and REPAIR too, or the sums of
    `two_way_kernel`. Sums are over `terms` logits."""
    program = tl.program_id(0)
    if REPAIR:
        i = program * BLOCK_M + tl.arange(0, BLOCK_M)
        if not to_redo(out, i, i < own.size):
            return
    if BOTH:
        if program < programs:
            merge_block(
                program, own, terms, scale_ptr, largest_bias, float16_scale, out, partial, parts,
                DIM, LENGTH, DONE, FIXED, SUM_EXPONENT, WIDTH, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        else:
            merge_block(
                program - programs, other, other_terms, scale_ptr, largest_bias, float16_scale,
                other_out, other_partial, other_parts, DIM, LENGTH, DONE, FIXED, SUM_EXPONENT,
                WIDTH, BLOCK_M, BLOCK_K,
            )  # fmt: skip
    else:
        merge_block(
            program, own, terms, scale_ptr, largest_bias, float16_scale, out, partial, parts, DIM,
            LENGTH, DONE, FIXED, SUM_EXPONENT, WIDTH, BLOCK_M, BLOCK_K,
        )  # fmt: skip


@triton.jit
def merge_block(
    block, own, terms, scale_ptr, largest_bias, float16_scale, out, partial, parts,
    DIM: tl.constexpr, LENGTH: tl.constexpr, DONE: tl.constexpr, FIXED: tl.constexpr,
    SUM_EXPONENT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    start = block * BLOCK_M
    i = start + tl.arange(0, BLOCK_M)
    inside = i < own.size
    scale = tl.load(scale_ptr)
    k = tl.arange(0, BLOCK_K)
    zeros = tl.zeros((BLOCK_M,), scale.dtype)
    top, least = zeros, 0.0
    if FIXED:
        shift, least = fixed_shift(scale, largest_bias, terms, SUM_EXPONENT)
        top = zeros + shift
    state = (zeros - float("inf"), zeros, zeros)
    counts = (zeros, zeros, zeros)
    if out.gradient is not None:
        weighted = tl.zeros((BLOCK_M, BLOCK_K), scale.dtype)
    for part in range(parts):
        pointers = partial.state + tl.cast(part, tl.int64) * WIDTH * own.size + i
        part_top, part_weighted = top, zeros
        part_total = tl.load(pointers, mask=inside, other=0.0)
        if WIDTH > 1:
            part_top = tl.load(pointers + own.size, mask=inside, other=0.0)
        if out.second is not None:
            part_weighted = tl.load(pointers + 2 * own.size, mask=inside, other=0.0)
        state, mine, theirs = merge(state, (part_top, part_total, part_weighted))
        if out.rank is not None:
            counts = (
                counts[0] + tl.load(pointers + 3 * own.size, mask=inside, other=0.0),
                counts[1] + tl.load(pointers + 4 * own.size, mask=inside, other=0.0),
                counts[2] + tl.load(pointers + 5 * own.size, mask=inside, other=0.0),
            )
        if out.gradient is not None:
            more = load_part(partial.weighted, part, own, i, k, inside, DIM)
            weighted = weighted * mine[:, None] + more * theirs[:, None]
    norm = store_rows(out, i, inside, state, counts, least, DONE)
    if out.gradient is not None:
        x = load_features(own, start, 0, DIM, BLOCK_M, BLOCK_K, scale.dtype)
        store_gradient(
            out.gradient, out.slope, weighted * norm[:, None], x, own, i, k, inside, scale,
            float16_scale, LENGTH, False, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["own_pitch", "other_pitch", "own_tiles", "other_tiles", "terms"])
def two_way_kernel(
    own, other, scale_ptr, own_sums, other_sums, own_pitch, other_pitch, own_tiles, other_tiles,
    terms, DIM: tl.constexpr, HALF: tl.constexpr, SUM_EXPONENT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds sums of exp(z - shift) over both sides, each exponential taken once, to those of groups,
    (groups, size), that are a pitch apart.

    BLOCK_N counts own vectors, BLOCK_M the others.
    A program has `own_tiles` tiles of own vectors and `other_tiles` of the other side. It keeps the
    sums of its own vectors in registers, and adds to its own part of the sums of the others, which
    no other program touches. With HALF the matrix is symmetric, and a tile of pairs (i, j) serves
    (j, i) too: programs below the diagonal have nothing to do, and there are none.
    """
    scale = tl.load(scale_ptr)
    shift, _least = fixed_shift(scale, None, terms, SUM_EXPONENT)
    if HALF:
        own_group, other_group = triangle(tl.program_id(0))
    else:
        own_group, other_group = tl.program_id(0), tl.program_id(1)
    first = own_group * own_tiles
    for own_tile in range(first, tl.minimum(first + own_tiles, tl.cdiv(own.size, BLOCK_N))):
        own_start = own_tile * BLOCK_N
        y = load_resident(own, own_start, DIM, BLOCK_N, BLOCK_K, DTYPE)
        if BLOCK_K >= DIM:
            sums = tl.zeros((BLOCK_M, BLOCK_N), scale.dtype)
        else:
            sums = tl.zeros((BLOCK_N,), scale.dtype)
        # read here, since the stores below keep the compiler from moving them out of the loop
        inverse, low, high = None, None, None
        if own.inverse is not None:
            inverse = load_block(own.inverse, own_start, BLOCK_N)
        if own.exclude is not None:
            low, high = id_range(own, own_start, BLOCK_N)
        begin = other_group * other_tiles
        end = tl.minimum(begin + other_tiles, tl.cdiv(other.size, BLOCK_M))
        if HALF:
            end = tl.minimum(end, tl.cdiv(own_start + BLOCK_N, BLOCK_M))
        for tile in range(begin, end):
            start = tile * BLOCK_M
            x = load_resident(other, start, DIM, BLOCK_M, BLOCK_K, DTYPE)
            z2 = logits(
                other, own, start, own_start, x, y, scale, DIM, BLOCK_M, BLOCK_N, BLOCK_K, DTYPE,
                PRECISION, True, inverse, low, high,
            )  # fmt: skip
            p = tl.exp2(z2 - shift)
            if BLOCK_K >= DIM:
                sums += p  # reduced once, at the end: across rows that takes many shuffles
            else:
                sums += tl.sum(p, 0)
            i = start + tl.arange(0, BLOCK_M)
            pointers = other_sums + tl.cast(own_group, tl.int64) * other_pitch + i
            inside = i < other.size
            if HALF:
                inside = inside & (i < own_start)  # the square on the diagonal is its own mirror
            tl.store(pointers, tl.load(pointers, mask=inside) + tl.sum(p, 1), mask=inside)
        j = own_start + tl.arange(0, BLOCK_N)
        pointers = own_sums + tl.cast(other_group, tl.int64) * own_pitch + j
        if BLOCK_K >= DIM:
            sums = tl.sum(sums, 0)
        if DIM == 0:  # a piece after others
            sums += tl.load(pointers, mask=j < own.size, other=0.0)
        tl.store(pointers, sums, mask=j < own.size)
        tl.debug_barrier()  # what one thread has added, another may read for the next tile


@triton.jit
def triangle(index):
    """(row, column <= row) of an index that counts the lower triangle row by row."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    row += ((row + 1) * (row + 2) // 2 <= index).to(tl.int32)
    row -= (row * (row + 1) // 2 > index).to(tl.int32)
    return row, index - row * (row + 1) // 2
