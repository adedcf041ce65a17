"""The largest products of each row, kept beside the tiles that pass.

A product and its key are one number of 64 bits, which orders them: the bits of the product, as a
whole number of the same order, above the bits of the key's number from the end. NaN is the largest.
"""

import triton
import triton.language as tl

from .tiles import dot, drop, load_block, load_features, load_resident

LARGEST_NUMBER: tl.constexpr = tl.constexpr(0xFFFFFFFF)
NAN_BITS: tl.constexpr = tl.constexpr(0x7FFFFFFF)
NOTHING: tl.constexpr = tl.constexpr(-0x7F800001 << 32)  # a product of -inf, and no key


@triton.jit
def packed(z, numbers):
    """Products (BLOCK_M, BLOCK_N), float32, with the numbers (BLOCK_N,) of their keys."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)  # of -0 and 0 the same
    bits = bits ^ ((bits >> 31) & NAN_BITS)
    bits = tl.where(z != z, NAN_BITS, bits)
    return (bits.to(tl.int64) << 32) | (numbers.to(tl.int64) ^ LARGEST_NUMBER)[None, :]


@triton.jit
def product_of(best):
    bits = (best >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & NAN_BITS)).to(tl.float32, bitcast=True)


@triton.jit
def products(
    own, other, start, other_start, x, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N), -inf for dropped pairs and beyond the columns."""
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BLOCK_K >= DIM:
        y = load_features(other, other_start, 0, DIM, BLOCK_N, BLOCK_K, DTYPE)
        z = dot(x, tl.trans(y), z, PRECISION)
    else:
        for k0 in range(0, DIM, BLOCK_K):
            a = load_features(own, start, k0, DIM, BLOCK_M, BLOCK_K, DTYPE)
            b = load_features(other, other_start, k0, DIM, BLOCK_N, BLOCK_K, DTYPE)
            z = dot(a, tl.trans(b), z, PRECISION)
    if own.inverse is not None:
        z *= load_block(own.inverse, start, BLOCK_M)[:, None]
        z *= load_block(other.inverse, other_start, BLOCK_N)[None, :]
    return drop(z, own, other, start, other_start, BLOCK_M, BLOCK_N, False, None, None)


@triton.jit(do_not_specialize=["tiles_per_part", "k"])
def top_k_kernel(
    own, other, threshold, floor, values, ids, tiles_per_part, k, K: tl.constexpr,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first k of a block of rows among a part of the keys, into (parts, N, k). K: a power of
    two, at least k; a tile that has nothing above the last of K costs its products alone."""
    start, part = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    i = start + tl.arange(0, BLOCK_M)
    inside = i < own.size
    level = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if floor is not None:
        level = tl.load(floor + i, mask=inside, other=float("inf"))
    if threshold is not None:
        limit = tl.load(threshold + i, mask=inside, other=0.0)
    best = tl.full((BLOCK_M, K), NOTHING, tl.int64)  # rising
    x = load_resident(own, start, DIM, BLOCK_M, BLOCK_K, DTYPE)
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tl.cdiv(other.size, BLOCK_N))
    for tile in range(first, last):
        other_start = tile * BLOCK_N
        z = products(
            own, other, start, other_start, x, DIM, BLOCK_M, BLOCK_N, BLOCK_K, DTYPE, PRECISION
        )
        above = ~(z <= level[:, None])
        if threshold is not None:
            above = above & ((z < limit[:, None]) | (z != z))
        if tl.max(tl.max(above.to(tl.int32), 1), 0) > 0:
            found = packed(z, other_start + tl.arange(0, BLOCK_N))
            found = tl.topk(tl.where(above, found, NOTHING), K)  # falling
            best = tl.sort(tl.maximum(best, found))
            level = tl.maximum(level, product_of(tl.min(best, 1)))
    place = K - 1 - tl.arange(0, K)
    at = (tl.cast(part, tl.int64) * own.size + i)[:, None] * k + place[None, :]
    mask = inside[:, None] & (place < k)[None, :]
    tl.store(values + at, product_of(best), mask=mask)
    number = (best & LARGEST_NUMBER) ^ LARGEST_NUMBER
    tl.store(ids + at, tl.where(best == NOTHING, -1, number), mask=mask)
