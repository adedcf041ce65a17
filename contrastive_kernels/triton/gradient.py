"""The kernels of the gradients, and what the forward sweep shares with them."""

import triton
import triton.language as tl

from .tiles import dot, load_block, load_features, load_rows, logits, partner_of, store_or_add


@triton.jit(do_not_specialize=["tiles_per_part", "programs", "other_tiles_per_part"])
def gradient_kernel(
    own, other, scale_ptr, float16_scale, parts, bias_sums, tiles_per_part, programs,
    other_float16_scale, other_parts, other_bias_sums, other_tiles_per_part, BOTH: tl.constexpr,
    DIM: tl.constexpr, COEFFICIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of dL/dz_ij y_j, (parts, N, D), and of dL/dz_ij, (parts, N), for own vectors, by a
    program for each block and part. BOTH: these `programs` are in a row, and after them come those
    for the vectors of the other side."""
    program = tl.program_id(0)
    if BOTH:
        if program < programs:
            block, part = block_and_part(program, own, BLOCK_M)
            gradient_part(
                block, part, own, other, scale_ptr, float16_scale, parts, bias_sums,
                tiles_per_part, DIM, COEFFICIENT, BLOCK_M, BLOCK_N, BLOCK_K, DTYPE, PRECISION,
            )  # fmt: skip
        else:
            block, part = block_and_part(program - programs, other, BLOCK_M)
            gradient_part(
                block, part, other, own, scale_ptr, other_float16_scale, other_parts,
                other_bias_sums, other_tiles_per_part, DIM, COEFFICIENT, BLOCK_M, BLOCK_N, BLOCK_K,
                DTYPE, PRECISION,
            )  # fmt: skip
    else:
        gradient_part(
            program, tl.program_id(1), own, other, scale_ptr, float16_scale, parts, bias_sums,
            tiles_per_part, DIM, COEFFICIENT, BLOCK_M, BLOCK_N, BLOCK_K, DTYPE, PRECISION,
        )  # fmt: skip


@triton.jit
def gradient_part(
    block, part, own, other, scale_ptr, float16_scale, parts, bias_sums, tiles_per_part,
    DIM: tl.constexpr, COEFFICIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """That of a block of own vectors, from a part of the other side."""
    start = block * BLOCK_M
    i = start + tl.arange(0, BLOCK_M)
    inside = i < own.size
    scale = tl.load(scale_ptr)
    k = tl.arange(0, BLOCK_K)
    x = load_features(own, start, 0, DIM, BLOCK_M, BLOCK_K, DTYPE)
    weighted = tl.zeros((BLOCK_M, BLOCK_K), scale.dtype)
    bias_gradient = tl.zeros((BLOCK_M,), scale.dtype)
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tl.cdiv(other.size, BLOCK_N))
    for tile in range(first, last):
        other_start = tile * BLOCK_N
        y = load_features(other, other_start, 0, DIM, BLOCK_N, BLOCK_K, DTYPE)
        z2 = logits(
            own, other, start, other_start, x, y, scale, DIM, BLOCK_M, BLOCK_N, BLOCK_K, DTYPE,
            PRECISION, False,
        )  # fmt: skip
        c = coefficients(z2, own, other, start, other_start, BLOCK_M, BLOCK_N, COEFFICIENT)
        if bias_sums is not None:
            bias_gradient += tl.sum(c, 1)
        c = weigh(c, other, other_start, float16_scale, BLOCK_N, DTYPE)
        weighted = dot(c, y, weighted, PRECISION)
    if bias_sums is not None:
        tl.store(bias_sums + tl.cast(part, tl.int64) * own.size + i, bias_gradient, mask=inside)
    store_part(parts, weighted, part, own, i, k, inside, DIM)


@triton.jit(do_not_specialize=["count", "start", "programs", "other_count"])
def finish_kernel(
    own, other, scale_ptr, grad_partner, float16_scale, gradient, slope, parts, count, start,
    programs, other_float16_scale, other_gradient, other_parts, other_count, BOTH: tl.constexpr,
    SYMMETRIC: tl.constexpr, DIM: tl.constexpr, LENGTH: tl.constexpr, SCALED: tl.constexpr,
    ADD: tl.constexpr, OTHER_ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of own vectors, those from `start` on, from sums of dL/dz_ij y_j, (parts, N, D),
    added in their order, and from dL/d their logit with their partner; BOTH as above. ADD: to what
    is there."""
    program = tl.program_id(0)
    if BOTH:
        if program < programs:
            finish_block(
                program, own, other, scale_ptr, grad_partner, float16_scale, gradient, slope, parts,
                count, start, SYMMETRIC, DIM, LENGTH, SCALED, ADD, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        else:
            finish_block(
                program - programs, other, own, scale_ptr, grad_partner, other_float16_scale,
                other_gradient, None, other_parts, other_count, start, SYMMETRIC, DIM, LENGTH,
                SCALED, OTHER_ADD, BLOCK_M, BLOCK_K,
            )  # fmt: skip
    else:
        finish_block(
            program, own, other, scale_ptr, grad_partner, float16_scale, gradient, slope, parts,
            count, start, SYMMETRIC, DIM, LENGTH, SCALED, ADD, BLOCK_M, BLOCK_K,
        )  # fmt: skip


@triton.jit
def finish_block(
    block, own, other, scale_ptr, grad_partner, float16_scale, gradient, slope, parts, count,
    own_start, SYMMETRIC: tl.constexpr, DIM: tl.constexpr, LENGTH: tl.constexpr,
    SCALED: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    start = block * BLOCK_M
    i = start + tl.arange(0, BLOCK_M)
    inside = i < own.size
    scale = tl.load(scale_ptr)
    k = tl.arange(0, BLOCK_K)
    weighted = tl.zeros((BLOCK_M, BLOCK_K), scale.dtype)
    for part in range(count):
        weighted += load_part(parts, part, own, i, k, inside, DIM)
    x = load_features(own, start, 0, DIM, BLOCK_M, BLOCK_K, scale.dtype)
    if grad_partner is not None:
        at = tl.cast(own_start, tl.int64) + i
        more = weighted_partner(
            at, inside, other, grad_partner, SYMMETRIC, DIM, BLOCK_K, scale.dtype
        )
        if SCALED and own.inverse is not None:
            more *= tl.load(own.inverse + i)[:, None]
        if float16_scale is not None:
            more *= tl.load(float16_scale)
        weighted += more
    store_gradient(
        gradient, slope, weighted, x, own, i, k, inside, scale, float16_scale, LENGTH, SCALED, ADD
    )


@triton.jit
def weighted_partner(
    at, inside, other, grad_partner, SYMMETRIC: tl.constexpr, DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dL/dz_ij y_j of vectors and their partners alone, of which those are read that have one."""
    inside = inside & (at < other.size)
    partner = partner_of(at, other.size, SYMMETRIC)
    grad = tl.load(grad_partner + at, mask=inside, other=0.0)
    if SYMMETRIC:
        grad += tl.load(grad_partner + partner, mask=inside, other=0.0)
    y = load_rows(
        other.features, partner, 0, other.stride, other.inner, DIM, BLOCK_K, ACC, grad != 0
    )
    if other.inverse is not None:
        grad *= tl.load(other.inverse + partner, mask=inside, other=0.0)
    return y * grad[:, None]


@triton.jit
def block_and_part(program, own, BLOCK: tl.constexpr):
    """The block of own vectors and the part of the other side of a program."""
    blocks = tl.cdiv(own.size, BLOCK)
    return program % blocks, program // blocks


@triton.jit
def coefficient_kernel(
    rows, columns, scale_ptr, float16_scale, chunk, pitch, sums, bias_sums, DIM: tl.constexpr,
    COEFFICIENT: tl.constexpr, PUSH: tl.constexpr, DONE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dz of the whole matrix, times 1 / norm of both sides, as an operand of products, into rows
    that are `pitch` apart.

    Also the sums over each tile's columns of dL/dz, and of the fold, (column tiles, rows).
    """
    row_tile, column_tile = grouped(
        tl.program_id(0), tl.cdiv(rows.size, BLOCK_M), tl.cdiv(columns.size, BLOCK_N)
    )
    row_start, column_start = row_tile * BLOCK_M, column_tile * BLOCK_N
    scale = tl.load(scale_ptr)
    z2 = logits(
        rows, columns, row_start, column_start, 0, 0, scale, DIM, BLOCK_M, BLOCK_N, BLOCK_K,
        DTYPE, PRECISION, False,
    )  # fmt: skip
    i = row_start + tl.arange(0, BLOCK_M)
    j = column_start + tl.arange(0, BLOCK_N)
    inside = i < rows.size
    at = tl.cast(column_tile, tl.int64) * rows.size + i
    if sums is not None:
        zeros = tl.zeros((BLOCK_M,), scale.dtype)
        state, _weights, _factor = PUSH((zeros, zeros, zeros), z2, False)
        value, _mean, _norm, _low, _mean_low = DONE(state)
        tl.store(sums + at, value, mask=inside)
    c = coefficients(z2, rows, columns, row_start, column_start, BLOCK_M, BLOCK_N, COEFFICIENT)
    if bias_sums is not None:
        tl.store(bias_sums + at, tl.sum(c, 1), mask=inside)
    if rows.inverse is not None:
        c *= weight_factor(rows, row_start, BLOCK_M, DTYPE)[:, None]
    pointers = chunk + (tl.cast(i, tl.int64) * pitch)[:, None] + j[None, :]
    mask = inside[:, None] & (j < columns.size)[None, :]
    c = weigh(c, columns, column_start, float16_scale, BLOCK_N, DTYPE)
    tl.store(pointers, c, mask=mask)


@triton.jit
def coefficients(
    z2, rows, columns, row_start, column_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COEFFICIENT: tl.constexpr,
):  # fmt: skip
    """dL/dz of a tile, from the gradients of the rows' statistics, the columns', or both."""
    if rows.grad_lse is None:
        result = side_coefficients(z2, columns, column_start, 0, BLOCK_N, COEFFICIENT)
    else:
        result = side_coefficients(z2, rows, row_start, 1, BLOCK_M, COEFFICIENT)
        if columns.grad_lse is not None:
            result += side_coefficients(z2, columns, column_start, 0, BLOCK_N, COEFFICIENT)
    return result


@triton.jit
def side_coefficients(
    z2, side, start, AXIS: tl.constexpr, BLOCK: tl.constexpr, COEFFICIENT: tl.constexpr
):
    grad_lse = tl.expand_dims(load_block(side.grad_lse, start, BLOCK), AXIS)
    lse, mean, grad_mean = grad_lse, grad_lse, grad_lse
    if side.lse is not None:
        lse = tl.expand_dims(load_block(side.lse, start, BLOCK), AXIS)
    MEAN: tl.constexpr = side.grad_mean is not None
    if MEAN:
        mean = tl.expand_dims(load_block(side.mean, start, BLOCK), AXIS)
        grad_mean = tl.expand_dims(load_block(side.grad_mean, start, BLOCK), AXIS)
    return COEFFICIENT(z2, lse, mean, grad_lse, grad_mean, MEAN)


@triton.jit
def weigh(weights, other, start, float16_scale, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Weights of the other side's vectors, in the type of the products.

    They carry its 1 / norm, and those of float16 a power of two that keeps them in range.
    """
    if other.inverse is not None:
        weights = weights * weight_factor(other, start, BLOCK, DTYPE)[None, :]
    if float16_scale is not None:
        weights = weights * tl.load(float16_scale)
    return weights.to(DTYPE)


@triton.jit
def weight_factor(side, start, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    return in_range(load_block(side.inverse, start, BLOCK), DTYPE)


@triton.jit
def in_range(inverse, DTYPE: tl.constexpr):
    """1 / norm as a factor of weights; 0 for a zero vector, whose 1e12 float16 cannot take."""
    if DTYPE == tl.float16:
        inverse = tl.where(inverse < 1e11, inverse, 0.0)
    return inverse


@triton.jit
def store_gradient(
    gradient, slope, weighted, x, own, i, k, inside, scale, float16_scale, LENGTH: tl.constexpr,
    SCALED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Writes d/dx_i of sum_j G_ij z_ij, and its derivative by the scale, from sum_j G_ij y_j.

    With u = x / |x| the normalisation projects: dx = (du - u <u, du>) / |x|; a norm that was raised
    to 1e-12 is a constant. SCALED: the sum has the factor 1 / |x| already. LENGTH: of a gradient.
    ADD: to what is there.
    """
    if float16_scale is not None:
        weighted = weighted / tl.load(float16_scale)
    x = x.to(weighted.dtype)
    if own.inverse is not None:
        inverse = tl.load(own.inverse + i)
        if not SCALED:
            weighted *= inverse[:, None]
    along = tl.sum(x * weighted, 1)
    if slope is not None:
        tl.store(slope + i, along, mask=inside)
    if own.inverse is not None:
        projected = tl.where(inverse < 1e12, inverse * inverse * along, 0.0)
        weighted -= x * projected[:, None]
    pointers = gradient + (tl.cast(i, tl.int64) * LENGTH)[:, None] + k[None, :]
    store_or_add(pointers, weighted * scale, inside[:, None] & (k < LENGTH)[None, :], ADD)


@triton.jit
def store_part(pointer, weighted, part, own, i, k, inside, DIM: tl.constexpr):
    mask = inside[:, None] & (k < DIM)[None, :]
    tl.store(part_pointers(pointer, part, own, i, k, DIM), weighted, mask=mask)


@triton.jit
def load_part(pointer, part, own, i, k, inside, DIM: tl.constexpr):
    mask = inside[:, None] & (k < DIM)[None, :]
    return tl.load(part_pointers(pointer, part, own, i, k, DIM), mask=mask, other=0.0)


@triton.jit
def part_pointers(pointer, part, own, i, k, DIM: tl.constexpr):
    """Of rows i of (parts, size, DIM)."""
    row = tl.cast(part, tl.int64) * own.size + i
    return pointer + (row * DIM)[:, None] + k[None, :]


@triton.jit
def grouped(index, rows, columns):
    """(row, column) of a tile, in an order that keeps tiles of one time in few rows and columns."""
    GROUP: tl.constexpr = 8
    group = index // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    within = index % (GROUP * columns)
    return group * GROUP + within % height, within // height
