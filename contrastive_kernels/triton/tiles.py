"""A tile of the similarity matrix: features, logits, masks. Pointers, no formula of a statistic."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import INTERPRETED
from .folds import LOG2E


class Side(NamedTuple):
    """One side of the similarity matrix: its feature vectors, and what belongs to each of them.

    What is None is left out when a kernel is compiled. Either side may be the rows. All but the
    features are packed by `packing.pack_kernel`: padded, so that a tile reads without a mask, in
    units of log 2 where they are logits.

    Attributes:
        features: with strides `stride` (vectors) and `inner` (features).
        size: number of vectors.
        inverse: 1 / norm, where vectors are to be normalised.
        bias: added to the logits.
        exclude, ranges: ids, pairs of equal ids are dropped; and (blocks, 2), the smallest and the
            largest id of each RANGE vectors.
        keep: ids, only pairs of equal ids are kept.
        lse, mean, grad_lse, grad_mean: what the backward pass knows of this side's statistics; lse
            is +inf, not -inf, where there is no pair, and gradients are 0 beyond the end.
        low: what rounding took from lse. Packed, it is in the gradients: exp(z - lse - low) =
            exp(z - lse) exp(-low). What the packed mean is rounded by is in grad_lse.
    """

    features: Tensor
    stride: int
    inner: int
    size: int
    inverse: Tensor | None = None
    bias: Tensor | None = None
    exclude: Tensor | None = None
    ranges: Tensor | None = None
    keep: Tensor | None = None
    lse: Tensor | None = None
    mean: Tensor | None = None
    grad_lse: Tensor | None = None
    grad_mean: Tensor | None = None
    low: Tensor | None = None


RANGE: tl.constexpr = tl.constexpr(64)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    if INTERPRETED:
        if a.dtype == tl.bfloat16:  # the interpreter multiplies the bits of bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=accumulator.dtype)


@triton.jit
def load_block(pointer, start, BLOCK: tl.constexpr):
    """A block of what is packed for a side."""
    return tl.load(pointer + start + tl.arange(0, BLOCK))


@triton.jit
def load_features(
    side, start, k0, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK_K) features from vector `start` and feature k0 on; 0 beyond feature DIM."""
    local = tl.minimum(tl.arange(0, BLOCK), side.size - 1 - start)
    k = k0 + tl.arange(0, BLOCK_K)
    pointers = side.features + tl.cast(start, tl.int64) * side.stride
    pointers += (local * side.stride)[:, None] + (k * side.inner)[None, :]
    if DIM % BLOCK_K == 0:
        return tl.load(pointers).to(DTYPE)
    else:
        return tl.load(pointers, mask=(k < DIM)[None, :], other=0.0).to(DTYPE)


@triton.jit
def load_rows(x, i, k0, stride, inner, DIM, BLOCK_K: tl.constexpr, ACC: tl.constexpr, used=None):
    """A slice of rows of any numbers, int64; 0 for those that are not used."""
    k = k0 + tl.arange(0, BLOCK_K)
    pointers = x + (i * stride)[:, None] + (k.to(tl.int64) * inner)[None, :]
    mask = (k < DIM)[None, :]
    if used is not None:
        mask = mask & used[:, None]
    return tl.load(pointers, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_resident(
    side, start, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr
):
    """The whole vectors of a block; 0 where they are read in slices, or not at all."""
    if BLOCK_K >= DIM and DIM > 0:
        return load_features(side, start, 0, DIM, BLOCK, BLOCK_K, DTYPE)
    else:
        return 0


@triton.jit
def logits(
    rows, columns, row_start, column_start, x, y, scale, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    MASK_ROWS: tl.constexpr, column_inverse=None, column_low=None, column_high=None,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) logits in units of log 2, -inf for dropped pairs and beyond the columns.

    x and y are the tiles of features where BLOCK_K holds all of DIM; else both are read here, in
    slices. DIM = 0: the inner products are stored, as the rows' features. With MASK_ROWS the logits
    beyond the rows are -inf too, else finite. The last three arguments: what is known of the
    columns already, their 1 / norm and the range of their ids.
    """
    # Of float32 the factor has the same bits with the sides exchanged: where logits are large, the
    # exp(z - lse) of the backward sweep are right only with those of the forward sweep.
    EITHER_WAY: tl.constexpr = (DTYPE == tl.float32) and (rows.inverse is not None)
    BIASED: tl.constexpr = (rows.bias is not None) or (columns.bias is not None)
    if not EITHER_WAY:
        row_factor = tl.zeros((BLOCK_M,), scale.dtype) + scale * LOG2E
        if rows.inverse is not None:
            row_factor *= load_block(rows.inverse, row_start, BLOCK_M)
    if rows.inverse is not None:
        if column_inverse is None:
            column_factor = load_block(columns.inverse, column_start, BLOCK_N)
        else:
            column_factor = column_inverse

    z2 = tl.zeros((BLOCK_M, BLOCK_N), scale.dtype)
    if DIM == 0:
        z2 += load_products(rows, columns, row_start, column_start, BLOCK_M, BLOCK_N)
    elif BLOCK_K >= DIM:
        z2 = dot(x, tl.trans(y), z2, PRECISION)
    else:
        for k0 in range(0, DIM, BLOCK_K):
            x_slice = load_features(rows, row_start, k0, DIM, BLOCK_M, BLOCK_K, DTYPE)
            y_slice = load_features(columns, column_start, k0, DIM, BLOCK_N, BLOCK_K, DTYPE)
            z2 = dot(x_slice, tl.trans(y_slice), z2, PRECISION)

    if not EITHER_WAY:
        z2 *= row_factor[:, None]
    elif scale < 0:  # the factor is not
        z2 = -z2
    if not BIASED:
        # before the columns are scaled, so that the subtraction which follows costs nothing
        z2 = drop(
            z2, rows, columns, row_start, column_start, BLOCK_M, BLOCK_N, MASK_ROWS, column_low,
            column_high,
        )  # fmt: skip
    if EITHER_WAY:
        root = tl.sqrt(tl.maximum(tl.abs(scale) * LOG2E, 1e-30))
        row_factor = load_block(rows.inverse, row_start, BLOCK_M) * root
        z2 *= row_factor[:, None] * (column_factor * root)[None, :]
    elif rows.inverse is not None:
        z2 *= column_factor[None, :]
    if rows.bias is not None:
        z2 += load_block(rows.bias, row_start, BLOCK_M)[:, None]
    if columns.bias is not None:
        z2 += load_block(columns.bias, column_start, BLOCK_N)[None, :]
    if BIASED:  # after it, which may be inf or NaN
        z2 = drop(
            z2, rows, columns, row_start, column_start, BLOCK_M, BLOCK_N, MASK_ROWS, column_low,
            column_high,
        )  # fmt: skip
    return z2


@triton.jit
def drop(
    z2, rows, columns, row_start, column_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_ROWS: tl.constexpr, column_low, column_high,
):  # fmt: skip
    """-inf for dropped pairs; tiles that can have none are left alone."""
    if column_start + BLOCK_N > columns.size:
        inside = column_start + tl.arange(0, BLOCK_N) < columns.size
        z2 = tl.where(inside[None, :], z2, -float("inf"))
    if MASK_ROWS:
        if row_start + BLOCK_M > rows.size:
            inside = row_start + tl.arange(0, BLOCK_M) < rows.size
            z2 = tl.where(inside[:, None], z2, -float("inf"))
    if rows.exclude is not None:
        row_low, row_high = id_range(rows, row_start, BLOCK_M)
        if column_low is None:
            low, high = id_range(columns, column_start, BLOCK_N)
        else:
            low, high = column_low, column_high
        if (low <= row_high) & (row_low <= high):
            row_ids = load_block(rows.exclude, row_start, BLOCK_M)
            column_ids = load_block(columns.exclude, column_start, BLOCK_N)
            z2 = tl.where(row_ids[:, None] == column_ids[None, :], -float("inf"), z2)
    if rows.keep is not None:
        row_ids = load_block(rows.keep, row_start, BLOCK_M)
        column_ids = load_block(columns.keep, column_start, BLOCK_N)
        z2 = tl.where(row_ids[:, None] == column_ids[None, :], z2, -float("inf"))
    return z2


@triton.jit
def load_products(
    rows, columns, row_start, column_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Stored inner products, 0 beyond the end."""
    i, j = row_start + tl.arange(0, BLOCK_M), column_start + tl.arange(0, BLOCK_N)
    inside = (i < rows.size)[:, None] & (j < columns.size)[None, :]
    pointers = rows.features + (tl.cast(i, tl.int64) * rows.stride)[:, None]
    pointers += (j * rows.inner)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def id_range(side, start, BLOCK: tl.constexpr):
    """(smallest, largest) excluded id of the block of vectors from `start` on."""
    pointer = side.ranges + 2 * (start // RANGE)
    low, high = tl.load(pointer), tl.load(pointer + 1)
    for k in tl.static_range(1, BLOCK // RANGE):
        low = tl.minimum(low, tl.load(pointer + 2 * k))
        high = tl.maximum(high, tl.load(pointer + 2 * k + 1))
    return low, high


@triton.jit
def partner_of(i, size, HALF: tl.constexpr):
    """The vector that belongs to the i-th: of the other half of `size`, or of the other side."""
    if HALF:
        half = size // 2
        i = tl.where(i < half, i + half, i - half)
    return i


@triton.jit
def inverse_norm(squares):
    """1 / max(norm, 1e-12)"""
    return 1.0 / tl.maximum(tl.sqrt(squares), 1e-12)


@triton.jit
def store_or_add(pointers, value, mask, ADD: tl.constexpr):
    """Writes a block of a gradient, or adds it to what is there."""
    if ADD:
        value += tl.load(pointers, mask=mask, other=0.0).to(value.dtype)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)
