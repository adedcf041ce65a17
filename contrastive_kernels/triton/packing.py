"""Makes what the sweeps know of each vector: padded, in the units they compute in."""

import triton
import triton.language as tl

from .folds import LOG2, LOG2E
from .tiles import RANGE, inverse_norm, load_features, load_rows, partner_of


@triton.jit(do_not_specialize=["row_blocks"])
def pack_kernel(
    rows, packed_rows, columns, packed_columns, scale_ptr, partner, row_blocks, BOTH: tl.constexpr,
    DIM: tl.constexpr, NORMALIZE: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Makes the packed fields of both sides, or of the rows alone, from sides of plain tensors; and
    on request the logit of each row and its partner."""
    block = tl.program_id(0)
    if BOTH:  # Triton 3.6 cannot ask whether a tuple is None
        if block < row_blocks:
            pack(rows, packed_rows, block, DIM, NORMALIZE, ACC, BLOCK_K)
            if partner is not None:
                pack_partner(
                    rows, columns, scale_ptr, partner, block, False, DIM, NORMALIZE, ACC, BLOCK_K
                )
        else:
            pack(columns, packed_columns, block - row_blocks, DIM, NORMALIZE, ACC, BLOCK_K)
    else:
        pack(rows, packed_rows, block, DIM, NORMALIZE, ACC, BLOCK_K)
        if partner is not None:
            pack_partner(rows, rows, scale_ptr, partner, block, True, DIM, NORMALIZE, ACC, BLOCK_K)


@triton.jit
def pack(
    source, packed, block, DIM: tl.constexpr, NORMALIZE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    start = block * RANGE
    i = start + tl.arange(0, RANGE)
    inside = i < source.size
    at = tl.minimum(i, source.size - 1)
    if NORMALIZE:
        squares = tl.zeros((RANGE,), ACC)
        for k0 in range(0, DIM, BLOCK_K):
            first = tl.minimum(start, source.size - 1)
            tile = load_features(source, first, k0, DIM, RANGE, BLOCK_K, ACC)
            squares += tl.sum(tile * tile, 1)
        tl.store(packed.inverse + i, inverse_norm(squares))
    if source.bias is not None:
        tl.store(packed.bias + i, tl.load(source.bias + at) * LOG2E)
    if source.exclude is not None:
        ids = tl.load(source.exclude + at).to(tl.int32)
        tl.store(packed.exclude + i, ids)
        tl.store(packed.ranges + 2 * block, tl.min(ids, 0))
        tl.store(packed.ranges + 2 * block + 1, tl.max(ids, 0))
    if source.keep is not None:
        tl.store(packed.keep + i, tl.load(source.keep + at).to(tl.int32))
    factor = tl.full((RANGE,), 1.0, ACC)
    if source.lse is not None:
        exact = tl.load(source.lse + at).to(tl.float64)
        if source.low is not None:
            exact += tl.load(source.low + at)
        exact *= LOG2E
        lse = exact.to(ACC)
        inside = inside & (lse != -float("inf"))  # no gradient without a pair, whatever comes
        tl.store(packed.lse + i, tl.where(inside, lse, float("inf")))
        factor = tl.exp2(tl.where(inside, lse - exact, 0.0).to(ACC))
    if source.grad_lse is not None:
        grad = tl.load(source.grad_lse + at, mask=inside, other=0.0)
        if source.grad_mean is not None:
            exact_mean = tl.load(source.mean + at).to(tl.float64) * LOG2E
            mean = exact_mean.to(ACC)
            tl.store(packed.mean + i, mean)
            grad_mean = tl.load(source.grad_mean + at, mask=inside, other=0.0)
            tl.store(packed.grad_mean + i, grad_mean * factor)
            # z - mean comes with a factor grad_mean, beside grad_lse
            grad -= grad_mean * ((exact_mean - mean) * LOG2).to(ACC)
        tl.store(packed.grad_lse + i, grad * factor)


@triton.jit
def pack_partner(
    rows, columns, scale_ptr, partner, block, HALF: tl.constexpr, DIM: tl.constexpr,
    NORMALIZE: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits of the rows and their partners, which are read as they are."""
    i = tl.cast(block * RANGE, tl.int64) + tl.arange(0, RANGE)
    inside = i < rows.size
    i = tl.minimum(i, rows.size - 1)
    j = partner_of(i, rows.size, HALF)
    dots = tl.zeros((RANGE,), ACC)
    row_squares, column_squares = dots, dots
    for k0 in range(0, DIM, BLOCK_K):
        x = load_rows(rows.features, i, k0, rows.stride, rows.inner, DIM, BLOCK_K, ACC)
        y = load_rows(columns.features, j, k0, columns.stride, columns.inner, DIM, BLOCK_K, ACC)
        dots += tl.sum(x * y, 1)
        if NORMALIZE:
            row_squares += tl.sum(x * x, 1)
            column_squares += tl.sum(y * y, 1)
    if NORMALIZE:
        dots *= inverse_norm(row_squares) * inverse_norm(column_squares)
    dots *= tl.load(scale_ptr)
    if columns.bias is not None:
        dots += tl.load(columns.bias + j)
    tl.store(partner + i, dots, mask=inside)
