"""The sweep of `attend` for Hopper, in Gluon: warps with a task each.

One warp lets the vectors of the other side come by TMA into a ring of buffers. Two warpgroups of 64
own vectors each take turns: while one multiplies, the other takes exponentials. The formulas are
those of the other engine: folds.py, `fixed_shift`, `in_range`, `id_range`, `store_part`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .folds import LOG2E
from .gradient import in_range, store_part
from .sweep import fixed_shift
from .tiles import id_range

# Triton 3.6 has it under its first name.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

GROUPS: gl.constexpr = gl.constexpr(2)
ROWS: gl.constexpr = gl.constexpr(64)
# Registers of a thread of a warpgroup that multiplies, and of the warp that loads.
REGISTERS: gl.constexpr = gl.constexpr(240)
LOADER_REGISTERS: gl.constexpr = gl.constexpr(24)


@gluon.jit(do_not_specialize=["tiles_per_part"])
def attend_kernel(
    x_tiles, y_tiles, factor_tiles, own, other, scale_ptr, largest_bias, float16_scale, partial,
    tiles_per_part, PUSH: gl.constexpr, TOP: gl.constexpr, FIXED: gl.constexpr,
    SUM_EXPONENT: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `stats_kernel` with weighted sums: partial states and sums of a part of the other side."""
    x = gl.allocate_shared_memory(x_tiles.dtype, [GROUPS, ROWS, DIM], x_tiles.layout)
    y = gl.allocate_shared_memory(x_tiles.dtype, [STAGES, BLOCK_N, DIM], y_tiles.layout)
    factors = y
    if factor_tiles is not None:
        factors = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], factor_tiles.layout)
    x_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(x_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    for group in gl.static_range(GROUPS):
        mbarrier.init(turns.index(group), count=1)
    fence_async_shared()  # TMA has to see them
    part = gl.program_id(1)
    first = part * tiles_per_part
    count = gl.minimum(tiles_per_part, gl.cdiv(other.size, BLOCK_N) - first)
    rings = (x, y, factors, x_ready, ready, empty, turns)
    sides = (own, other, scale_ptr, largest_bias, float16_scale, partial)
    gl.warp_specialize(
        [
            (fold_part, (0, rings, sides, part, first, count, PUSH, TOP, FIXED, SUM_EXPONENT)),
            (fold_part, (1, rings, sides, part, first, count, PUSH, TOP, FIXED, SUM_EXPONENT)),
            (load_part, (x_tiles, y_tiles, factor_tiles, rings, first, count)),
        ],
        [4, 1],
        [REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def load_part(x_tiles, y_tiles, factor_tiles, rings, first, count):
    """Own vectors once, then the tiles of the other side, each into the buffer that is free."""
    x, y, factors, x_ready, ready, empty, _turns = rings
    STAGES: gl.constexpr = y.shape[0]
    BLOCK_N: gl.constexpr = y.shape[1]
    DIM: gl.constexpr = y.shape[2]
    mbarrier.expect(x_ready, GROUPS * ROWS * DIM * 2)
    for group in gl.static_range(GROUPS):
        start = (gl.program_id(0) * GROUPS + group) * ROWS
        copy_tile(x_tiles, [start, 0], x_ready, x.index(group))
    for n in range(count):
        stage = n % STAGES
        mbarrier.wait(empty.index(stage), ((n // STAGES) & 1) ^ 1)
        other_start = (first + n) * BLOCK_N
        if factor_tiles is None:
            mbarrier.expect(ready.index(stage), BLOCK_N * DIM * 2)
        else:
            mbarrier.expect(ready.index(stage), BLOCK_N * (DIM * 2 + 4))
            copy_tile(factor_tiles, [other_start], ready.index(stage), factors.index(stage))
        copy_tile(y_tiles, [other_start, 0], ready.index(stage), y.index(stage))


@gluon.jit
def fold_part(
    GROUP: gl.constexpr, rings, sides, part, first, count, PUSH: gl.constexpr, TOP: gl.constexpr,
    FIXED: gl.constexpr, SUM_EXPONENT: gl.constexpr,
):  # fmt: skip
    """The states and weighted sums of one warpgroup's own vectors."""
    x, y, factors, x_ready, ready, empty, turns = rings
    own, other, scale_ptr, largest_bias, float16_scale, partial = sides
    STAGES: gl.constexpr = y.shape[0]
    BLOCK_N: gl.constexpr = y.shape[1]
    DIM: gl.constexpr = y.shape[2]
    pairs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    rows: gl.constexpr = gl.SliceLayout(1, pairs)
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    start = (gl.program_id(0) * GROUPS + GROUP) * ROWS
    i = start + gl.arange(0, ROWS, rows)
    scale = gl.load(scale_ptr)
    row_factor = gl.zeros((ROWS,), gl.float32, rows) + scale * LOG2E
    if own.inverse is not None:
        row_factor *= load_rows(own.inverse, start, rows)
    low, high = 0, 0
    if own.exclude is not None:
        low, high = id_range(own, start, ROWS)
    row_bias, row_keep = load_rows(own.bias, start, rows), load_rows(own.keep, start, rows)
    mine = (start, row_factor, row_bias, row_keep, low, high)
    zeros = gl.zeros((ROWS,), gl.float32, rows)
    top = zeros + TOP
    if FIXED:
        shift, _least = fixed_shift(scale, largest_bias, other.size, SUM_EXPONENT)
        top = zeros + shift
    state = (top, zeros, zeros)
    weighted = gl.zeros((ROWS, DIM), gl.float32, sums)
    no_logits = gl.zeros((ROWS, BLOCK_N), gl.float32, pairs)

    mbarrier.wait(x_ready, 0)
    mbarrier.wait(ready.index(0), 0)
    products = warpgroup_mma(
        x.index(GROUP), y.index(0).permute((1, 0)), no_logits, use_acc=False, is_async=True
    )
    products = warpgroup_mma_wait(0, (products,))
    for n in range(count - 1):
        stage, following = n % STAGES, (n + 1) % STAGES
        other_start = (first + n) * BLOCK_N
        factor = load_factor(other, factors.index(stage), no_logits)
        z2 = logits(products, own, other, mine, factor, other_start, False)
        state, weights, moved = PUSH(state, z2, False)
        weights = gl.convert_layout(weigh(weights, factor, other, float16_scale, y.dtype), operand)
        weighted = weighted * gl.convert_layout(moved, gl.SliceLayout(1, sums))[:, None]
        mbarrier.wait(ready.index(following), ((n + 1) // STAGES) & 1)
        mbarrier.wait(turns.index(GROUP), (n & 1) ^ (1 - GROUP))
        weighted = warpgroup_mma(weights, y.index(stage), weighted, is_async=True)
        products = warpgroup_mma(
            x.index(GROUP), y.index(following).permute((1, 0)), no_logits, use_acc=False,
            is_async=True,
        )  # fmt: skip
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
        products, weighted, weights = warpgroup_mma_wait(0, (products, weighted, weights))
        mbarrier.arrive(empty.index(stage), count=1)
    other_start = (first + count - 1) * BLOCK_N
    factor = load_factor(other, factors.index((count - 1) % STAGES), no_logits)
    z2 = logits(products, own, other, mine, factor, other_start, True)
    state, weights, moved = PUSH(state, z2, False)
    weights = gl.convert_layout(weigh(weights, factor, other, float16_scale, y.dtype), operand)
    weighted = weighted * gl.convert_layout(moved, gl.SliceLayout(1, sums))[:, None]
    weighted = warpgroup_mma(weights, y.index((count - 1) % STAGES), weighted, is_async=True)
    weighted, weights = warpgroup_mma_wait(0, (weighted, weights))

    inside = i < own.size
    pointers = partial.state + part.to(gl.int64) * 6 * own.size + i
    gl.store(pointers, state[1], mask=inside)
    gl.store(pointers + own.size, state[0], mask=inside)
    i = start + gl.arange(0, ROWS, gl.SliceLayout(1, sums))
    k = gl.arange(0, DIM, gl.SliceLayout(0, sums))
    store_part(partial.weighted, weighted, part, own, i, k, i < own.size, DIM)


@gluon.jit
def logits(products, own, other, mine, factor, other_start, BOUND: gl.constexpr):
    """Logits of products in units of log 2, -inf for dropped pairs."""
    _start, row_factor, row_bias, _row_keep, _low, _high = mine
    BIASED: gl.constexpr = own.bias is not None or other.bias is not None
    z2 = products * row_factor[:, None]
    if not BIASED:
        z2 = drop(z2, own, other, mine, other_start, BOUND)
    if other.inverse is not None:
        z2 *= factor[None, :]
    if own.bias is not None:
        z2 += row_bias[:, None]
    if other.bias is not None:
        z2 += load_columns(other.bias, other_start, z2)[None, :]
    if BIASED:  # after it, which may be inf or NaN
        z2 = drop(z2, own, other, mine, other_start, BOUND)
    return z2


@gluon.jit
def drop(z2, own, other, mine, other_start, BOUND: gl.constexpr):
    """-inf for dropped pairs and, in the last tile, beyond the other side's end."""
    start, _row_factor, _row_bias, row_keep, own_low, own_high = mine
    if BOUND:
        j = gl.arange(0, z2.shape[1], gl.SliceLayout(0, z2.type.layout))
        z2 = gl.where((j < other.size - other_start)[None, :], z2, -float("inf"))
    if own.exclude is not None:
        low, high = id_range(other, other_start, z2.shape[1])
        if (low <= own_high) & (own_low <= high):
            row_ids = load_rows(own.exclude, start, gl.SliceLayout(1, z2.type.layout))
            ids = load_columns(other.exclude, other_start, z2)
            z2 = gl.where(row_ids[:, None] == ids[None, :], -float("inf"), z2)
    if own.keep is not None:
        ids = load_columns(other.keep, other_start, z2)
        z2 = gl.where(row_keep[:, None] == ids[None, :], z2, -float("inf"))
    return z2


@gluon.jit
def load_columns(pointer, start, like):
    """What is packed for the columns of a tile."""
    return gl.load(
        pointer + start + gl.arange(0, like.shape[1], gl.SliceLayout(0, like.type.layout))
    )


@gluon.jit
def load_factor(other, buffer, like):
    """The columns' 1 / norm, which came with their vectors."""
    if other.inverse is None:
        return 0
    else:
        return buffer.load(gl.SliceLayout(0, like.type.layout))


@gluon.jit
def load_rows(pointer, start, LAYOUT: gl.constexpr):
    """What is packed for a warpgroup's own vectors; a row of nothing where there is nothing."""
    if pointer is None:
        return 0
    else:
        return gl.load(pointer + start + gl.arange(0, ROWS, LAYOUT))


@gluon.jit
def weigh(weights, factor, other, float16_scale, DTYPE: gl.constexpr):
    """Weights of the other side's vectors, in the type of the products."""
    if other.inverse is not None:
        weights = weights * in_range(factor, DTYPE)[None, :]
    if float16_scale is not None:
        weights = weights * gl.load(float16_scale)
    return weights.to(DTYPE)
