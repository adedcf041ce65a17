"""The kernels of gradients at several prefixes of the features, from their stored products."""

import triton
import triton.language as tl

from .gradient import coefficients, grouped, weight_factor
from .tiles import load_block, load_products, load_rows, logits, partner_of


# Places of pieces change from launch to launch.
@triton.jit(do_not_specialize=["first_row", "first_column", "partners"])
def nested_coefficient_kernel(
    rows, columns, scale_ptr, float16_scale, grad_partner, chunks, row_along, column_along,
    bias_sums, first_row, first_column, partners, COUNT: tl.constexpr, HALF: tl.constexpr,
    COEFFICIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Sums of dL/dz over each prefix and all that are longer, times 1 / norm of both sides, as
    operands of products, (prefixes, rows, columns).

    rows, columns: sides for each of COUNT prefixes, with its products in the place of features, of
    a piece that begins at `first_row` and `first_column`. Also for each prefix the sums of dL/dz
    times the product of normalised features, over each tile's columns (prefixes, column tiles,
    rows) and its rows (prefixes, row tiles, columns), and of dL/dz over its rows alone.
    `grad_partner` (prefixes, partners): of the logits of rows and their partners, dropped or not.
    """
    height, width = rows[0].size, columns[0].size
    row_tiles, column_tiles = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    row_tile, column_tile = grouped(tl.program_id(0), row_tiles, column_tiles)
    row_start, column_start = row_tile * BLOCK_M, column_tile * BLOCK_N
    i, j = row_start + tl.arange(0, BLOCK_M), column_start + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr)
    total = tl.zeros((BLOCK_M, BLOCK_N), scale.dtype)
    for k in tl.static_range(COUNT - 1, -1, -1):
        own, other = rows[k], columns[k]
        z2 = logits(
            own, other, row_start, column_start, 0, 0, scale, 0, BLOCK_M, BLOCK_N, 16, DTYPE,
            "ieee", False,
        )  # fmt: skip
        c = coefficients(z2, own, other, row_start, column_start, BLOCK_M, BLOCK_N, COEFFICIENT)
        if grad_partner is not None:
            c += partner_coefficients(
                grad_partner + k * partners, partners, first_row + i, first_column + column_start,
                i < height, BLOCK_N, HALF,
            )  # fmt: skip
        if bias_sums is not None:
            of_rows = tl.where((i < height)[:, None], c, 0.0)
            at = (k * row_tiles + row_tile) * width + j
            tl.store(bias_sums + at, tl.sum(of_rows, 0), mask=j < width)
        along = c * load_products(own, other, row_start, column_start, BLOCK_M, BLOCK_N)
        if own.inverse is not None:
            along *= load_block(own.inverse, row_start, BLOCK_M)[:, None]
            along *= load_block(other.inverse, column_start, BLOCK_N)[None, :]
            c *= weight_factor(own, row_start, BLOCK_M, DTYPE)[:, None]
            c *= weight_factor(other, column_start, BLOCK_N, DTYPE)[None, :]
        at = (k * column_tiles + column_tile) * height + i
        tl.store(row_along + at, tl.sum(along, 1), mask=i < height)
        if column_along is not None:
            at = (k * row_tiles + row_tile) * width + j
            tl.store(column_along + at, tl.sum(along, 0), mask=j < width)
        total += c
        weights = total
        if float16_scale is not None:
            weights = weights * tl.load(float16_scale)
        at = tl.cast(k * height + i, tl.int64) * width
        mask = (i < height)[:, None] & (j < width)[None, :]
        tl.store(chunks + at[:, None] + j[None, :], weights.to(DTYPE), mask=mask)


@triton.jit
def partner_coefficients(
    grad, partners, at, column_start, inside, BLOCK_N: tl.constexpr, HALF: tl.constexpr
):
    """The gradients of logits of rows `at` and their partners, where those are; HALF: of both
    orders, as a symmetric matrix has."""
    partner = partner_of(at, partners, HALF)
    inside = inside & (at < partners)
    mine = tl.load(grad + at, mask=inside, other=0.0)
    if HALF:
        mine += tl.load(grad + partner, mask=inside, other=0.0)
    place = tl.where(inside, partner - column_start, -1)
    return tl.where(place[:, None] == tl.arange(0, BLOCK_N)[None, :], mine[:, None], 0.0)


@triton.jit
def nested_finish_kernel(
    sides, ends, totals, along, scale_ptr, float16_scale, gradient, COUNT: tl.constexpr,
    LENGTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of own vectors from their `totals`, (size, width) for each block of features, the
    one that ends a prefix at `ends`.

    What normalisation takes from a gradient, x <x, u> / |x|^2 of every prefix that has a feature,
    is a number for each vector: <x, u> of a prefix is in `along` (prefixes, size).
    """
    size = sides[0].size
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < size
    scale = tl.load(scale_ptr)
    radial = tl.zeros((BLOCK_M,), scale.dtype)
    at = tl.cast(tl.minimum(i, size - 1), tl.int64)
    for k in tl.static_range(COUNT - 1, -1, -1):
        own = sides[k]
        begin = 0
        if k > 0:
            begin = ends[k - 1]
        if own.inverse is not None:
            inverse = tl.load(own.inverse + at)
            taken = inverse * inverse * tl.load(along + k * size + at)
            radial += tl.where(inverse < 1e12, taken, 0.0)  # a norm that was raised is a constant
        for k0 in range(begin, ends[k], BLOCK_K):
            feature = k0 + tl.arange(0, BLOCK_K)
            mask = inside[:, None] & (feature < ends[k])[None, :]
            places = (at * (ends[k] - begin))[:, None] + (feature - begin)[None, :]
            total = tl.load(totals[k] + places, mask=mask, other=0.0)
            if float16_scale is not None:
                total = total / tl.load(float16_scale)
            if own.inverse is not None:
                x = load_rows(
                    own.features, at, k0, own.stride, own.inner, ends[k], BLOCK_K, scale.dtype
                )
                total -= x * radial[:, None]
            value = (total * scale).to(gradient.dtype.element_ty)
            tl.store(gradient + (at * LENGTH)[:, None] + feature[None, :], value, mask=mask)
