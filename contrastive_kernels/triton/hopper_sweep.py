"""The sweeps with weighted sums for Hopper, in Gluon: warps with a task each.

One warp lets the vectors of the other side come by TMA into a ring of buffers. Two warpgroups of 64
own vectors each take turns: while one multiplies, the other takes exponentials. The formulas are
those of the other engine: folds.py, `fixed_shift`, `id_range`, `store_part`.
`attend` and `gradient` differ in how a tile of logits becomes one of weights.
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

from .folds import LOG2E, ones
from .gradient import store_part
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
    tiles = (x_tiles, y_tiles, factor_tiles, None, None)
    sides = (own, other, scale_ptr, largest_bias, float16_scale, partial)
    FOLD: gl.constexpr = (PUSH, None, False)
    sweep(tiles, sides, tiles_per_part, FOLD, TOP, FIXED, SUM_EXPONENT, DIM, BLOCK_N, STAGES)


@gluon.jit(do_not_specialize=["tiles_per_part"])
def gradient_sweep_kernel(
    x_tiles, y_tiles, factor_tiles, lse_tiles, grad_tiles, own, other, scale_ptr, float16_scale,
    partial, tiles_per_part, COEFFICIENT: gl.constexpr, WEIGHED: gl.constexpr, DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `gradient_kernel` of one side, without means: partial sums of dL/dz_ij y_j and, into the
    state, of dL/dz_ij. WEIGHED: the columns' gradients have the factors of the weights already."""
    tiles = (x_tiles, y_tiles, factor_tiles, lse_tiles, grad_tiles)
    sides = (own, other, scale_ptr, None, float16_scale, partial)
    FOLD: gl.constexpr = (None, COEFFICIENT, WEIGHED)
    sweep(tiles, sides, tiles_per_part, FOLD, 0.0, False, 0.0, DIM, BLOCK_N, STAGES)


@gluon.jit
def sweep(
    tiles, sides, tiles_per_part, FOLD: gl.constexpr, TOP: gl.constexpr, FIXED: gl.constexpr,
    SUM_EXPONENT: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Starts the warps' tasks. FOLD has the push or the coefficient that makes weights of logits,
    and whether WEIGHED."""
    x_tiles, y_tiles, factor_tiles, lse_tiles, grad_tiles = tiles
    _own, other, _scale, _bias, _float16_scale, _partial = sides
    x = gl.allocate_shared_memory(x_tiles.dtype, [GROUPS, ROWS, DIM], x_tiles.layout)
    y = gl.allocate_shared_memory(x_tiles.dtype, [STAGES, BLOCK_N, DIM], y_tiles.layout)
    factors, lses, grads = y, y, y
    if factor_tiles is not None:
        factors = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], factor_tiles.layout)
    if lse_tiles is not None:
        lses = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], lse_tiles.layout)
    if grad_tiles is not None:
        grads = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], grad_tiles.layout)
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
    rings = (x, y, (factors, lses, grads), x_ready, ready, empty, turns)
    span = (part, first, count)
    gl.warp_specialize(
        [
            (fold_part, (0, rings, sides, span, FOLD, TOP, FIXED, SUM_EXPONENT)),
            (fold_part, (1, rings, sides, span, FOLD, TOP, FIXED, SUM_EXPONENT)),
            (load_part, (tiles, rings, span)),
        ],
        [4, 1],
        [REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def load_part(tiles, rings, span):
    """Own vectors once, then the tiles of the other side, each into the buffer that is free, with
    what belongs to their vectors."""
    x_tiles, y_tiles, factor_tiles, lse_tiles, grad_tiles = tiles
    x, y, columns, x_ready, ready, empty, _turns = rings
    factors, lses, grads = columns
    _part, first, count = span
    STAGES: gl.constexpr = y.shape[0]
    BLOCK_N: gl.constexpr = y.shape[1]
    DIM: gl.constexpr = y.shape[2]
    NUMBERS: gl.constexpr = (
        (factor_tiles is not None) + (lse_tiles is not None) + (grad_tiles is not None)
    )
    mbarrier.expect(x_ready, GROUPS * ROWS * DIM * 2)
    for group in gl.static_range(GROUPS):
        start = (gl.program_id(0) * GROUPS + group) * ROWS
        copy_tile(x_tiles, [start, 0], x_ready, x.index(group))
    for n in range(count):
        stage = n % STAGES
        mbarrier.wait(empty.index(stage), ((n // STAGES) & 1) ^ 1)
        other_start = (first + n) * BLOCK_N
        mbarrier.expect(ready.index(stage), BLOCK_N * (DIM * 2 + NUMBERS * 4))
        if factor_tiles is not None:
            copy_tile(factor_tiles, [other_start], ready.index(stage), factors.index(stage))
        if lse_tiles is not None:
            copy_tile(lse_tiles, [other_start], ready.index(stage), lses.index(stage))
        if grad_tiles is not None:
            copy_tile(grad_tiles, [other_start], ready.index(stage), grads.index(stage))
        copy_tile(y_tiles, [other_start, 0], ready.index(stage), y.index(stage))


@gluon.jit
def fold_part(
    GROUP: gl.constexpr, rings, sides, span, FOLD: gl.constexpr, TOP: gl.constexpr,
    FIXED: gl.constexpr, SUM_EXPONENT: gl.constexpr,
):  # fmt: skip
    """The states and weighted sums of one warpgroup's own vectors."""
    x, y, columns, x_ready, ready, empty, turns = rings
    own, other, scale_ptr, largest_bias, float16_scale, partial = sides
    part, first, count = span
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
    row_lse, row_grad = load_rows(own.lse, start, rows), load_rows(own.grad_lse, start, rows)
    mine = (start, row_factor, row_bias, row_keep, low, high, row_lse, row_grad)
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
        state, weights, moved = fold_tile(
            state, products, sides, mine, columns, stage, (first + n) * BLOCK_N, FOLD, y.dtype,
            False,
        )  # fmt: skip
        weights = gl.convert_layout(weights, operand)
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
    stage = (count - 1) % STAGES
    state, weights, moved = fold_tile(
        state, products, sides, mine, columns, stage, (first + count - 1) * BLOCK_N, FOLD, y.dtype,
        True,
    )  # fmt: skip
    weights = gl.convert_layout(weights, operand)
    weighted = weighted * gl.convert_layout(moved, gl.SliceLayout(1, sums))[:, None]
    weighted = warpgroup_mma(weights, y.index(stage), weighted, is_async=True)
    weighted, weights = warpgroup_mma_wait(0, (weighted, weights))

    inside = i < own.size
    if FOLD[0] is not None:
        pointers = partial.state + part.to(gl.int64) * 6 * own.size + i
        gl.store(pointers, state[1], mask=inside)
        gl.store(pointers + own.size, state[0], mask=inside)
    elif partial.state is not None:
        gl.store(partial.state + part.to(gl.int64) * own.size + i, state[1], mask=inside)
    i = start + gl.arange(0, ROWS, gl.SliceLayout(1, sums))
    k = gl.arange(0, DIM, gl.SliceLayout(0, sums))
    store_part(partial.weighted, weighted, part, own, i, k, i < own.size, DIM)


@gluon.jit
def fold_tile(
    state, products, sides, mine, columns, stage, other_start, FOLD: gl.constexpr,
    DTYPE: gl.constexpr, BOUND: gl.constexpr,
):  # fmt: skip
    """The state with one more tile, the weights of its vectors in the type of the products, and
    the factor by which earlier weights change."""
    own, other, _scale, _bias, float16_scale, partial = sides
    factors, lses, grads = columns
    PUSH: gl.constexpr = FOLD[0]
    COEFFICIENT: gl.constexpr = FOLD[1]
    WEIGHED: gl.constexpr = FOLD[2]
    factor = load_ring(other.inverse, factors, stage, products)
    z2 = logits(products, own, other, mine, factor, other_start, BOUND)
    if COEFFICIENT is None:
        state, weights, moved = PUSH(state, z2, False)
        weights = weigh(weights, factor, other, float16_scale)
    else:
        lse = load_ring(other.lse, lses, stage, z2)
        grad = load_ring(other.grad_lse, grads, stage, z2)
        weights = coefficients(z2, own, other, mine, lse, grad, COEFFICIENT)
        if partial.state is not None:
            state = (state[0], state[1] + gl.sum(weights, 1), state[2])
        if not WEIGHED:
            weights = weigh(weights, factor, other, float16_scale)
        moved = ones(state[0])
    return state, weights.to(DTYPE), moved


@gluon.jit
def coefficients(z2, own, other, mine, lse, grad, COEFFICIENT: gl.constexpr):
    """dL/dz of a tile, from the gradients of the rows' statistics, the columns', or both."""
    _start, _factor, _bias, _keep, _low, _high, row_lse, row_grad = mine
    if other.grad_lse is None:
        result = of_side(z2, own, row_lse, row_grad, 1, COEFFICIENT)
    else:  # these first: they take more registers
        result = of_side(z2, other, lse, grad, 0, COEFFICIENT)
        if own.grad_lse is not None:
            result += of_side(z2, own, row_lse, row_grad, 1, COEFFICIENT)
    return result


@gluon.jit
def of_side(z2, side, lse, grad, AXIS: gl.constexpr, COEFFICIENT: gl.constexpr):
    grad = gl.expand_dims(grad, AXIS)
    if side.lse is None:
        lse = grad
    else:
        lse = gl.expand_dims(lse, AXIS)
    return COEFFICIENT(z2, lse, grad, grad, grad, False)


@gluon.jit
def logits(products, own, other, mine, factor, other_start, BOUND: gl.constexpr):
    """Logits of products in units of log 2, -inf for dropped pairs."""
    _start, row_factor, row_bias, _row_keep, _low, _high, _lse, _grad = mine
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
    start, _row_factor, _row_bias, row_keep, own_low, own_high, _lse, _grad = mine
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
def load_ring(given, ring, stage, like):
    """What came with the columns' vectors; 1 where nothing is given."""
    if given is None:
        return 1.0
    else:
        return ring.index(stage).load(gl.SliceLayout(0, like.type.layout))


@gluon.jit
def load_rows(pointer, start, LAYOUT: gl.constexpr):
    """What is packed for a warpgroup's own vectors; a row of nothing where there is nothing."""
    if pointer is None:
        return 0
    else:
        return gl.load(pointer + start + gl.arange(0, ROWS, LAYOUT))


@gluon.jit
def weigh(weights, factor, other, float16_scale):
    """Times the columns' 1 / norm and the power of two that keeps weights of float16 in range."""
    if float16_scale is not None:
        factor = factor * gl.load(float16_scale)
    if other.inverse is None:
        return weights * factor
    else:
        return weights * factor[None, :]
