"""Dot products of paired vectors, <x_i, y_i> or <x_i, y_ik>, and their gradients.

They are bound by reading the features, not by arithmetic.
"""

import triton
import triton.language as tl

from .tiles import inverse_norm, load_rows, store_or_add


@triton.jit
def pair_dots(
    x, y, i, key, x_stride, x_inner, y_stride, y_key_stride, y_inner, DIM: tl.constexpr,
    NORMALIZE: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr, used=None,
):  # fmt: skip
    """<x_i, y_ik> with 1 / norm of both, which are 1 unless NORMALIZE."""
    dots = tl.zeros(i.shape, ACC)
    x_squares, y_squares = dots, dots
    for k0 in range(0, DIM, BLOCK_K):
        a = load_rows(x, i, k0, x_stride, x_inner, DIM, BLOCK_K, ACC)
        b = load_rows(
            y + (key * y_key_stride)[:, None], i, k0, y_stride, y_inner, DIM, BLOCK_K, ACC, used
        )
        dots += tl.sum(a * b, 1)
        if NORMALIZE:
            x_squares += tl.sum(a * a, 1)
            y_squares += tl.sum(b * b, 1)
    if NORMALIZE:
        x_inverse, y_inverse = inverse_norm(x_squares), inverse_norm(y_squares)
        dots *= x_inverse * y_inverse
    else:
        x_inverse = tl.full(i.shape, 1.0, ACC)
        y_inverse = x_inverse
    return dots, x_inverse, y_inverse


@triton.jit
def program_pairs(pairs, BLOCK: tl.constexpr):
    """Numbers of a program's pairs, the last one's beyond the end, and whether they are inside."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tl.minimum(at, pairs - 1), at < pairs


@triton.jit
def row_and_key(at, owners, keys):
    """Row and key of a pair: pair (i, k) has the number i keys + k; with owners, the row of each
    key, pairs have the numbers of their keys."""
    if owners is None:
        i, key = at // keys, at % keys
    else:
        i, key = tl.load(owners + at), at
    return i, key


@triton.jit(do_not_specialize=["pairs"])
def row_dot_kernel(
    x, y, owners, out, pairs, keys, x_stride, x_inner, y_stride, y_key_stride, y_inner,
    DIM: tl.constexpr, NORMALIZE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """<x_i, y_ik>."""
    at, inside = program_pairs(pairs, BLOCK)
    i, key = row_and_key(at, owners, keys)
    dots, _x_inverse, _y_inverse = pair_dots(
        x, y, i, key, x_stride, x_inner, y_stride, y_key_stride, y_inner, DIM, NORMALIZE, ACC,
        BLOCK_K,
    )  # fmt: skip
    tl.store(out + at, dots, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def row_dot_backward_kernel(
    x, y, grad, x_gradient, y_gradient, rows, x_stride, x_inner, y_stride, y_key_stride, y_inner,
    ADD_X: tl.constexpr, ADD_Y: tl.constexpr, DIM: tl.constexpr, NORMALIZE: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of x_i and y_i from g = dL/d<x_i, y_i>, with one y for each x. ADD_X, ADD_Y: to
    what is there."""
    at, inside = program_pairs(rows, BLOCK)
    g = tl.load(grad + at)
    used = g != 0
    dots, x_inverse, y_inverse = pair_dots(
        x, y, at, at * 0, x_stride, x_inner, y_stride, y_key_stride, y_inner, DIM, NORMALIZE, ACC,
        BLOCK_K, used,
    )  # fmt: skip
    along = g * dots
    across = g * x_inverse * y_inverse
    for k0 in range(0, DIM, BLOCK_K):
        a = load_rows(x, at, k0, x_stride, x_inner, DIM, BLOCK_K, ACC)
        b = load_rows(y, at, k0, y_stride, y_inner, DIM, BLOCK_K, ACC, used)
        if x_gradient is not None:
            store_side(
                x_gradient, a, b, x_inverse, across, along, at, inside, k0, DIM, NORMALIZE, ADD_X
            )  # fmt: skip
        if y_gradient is not None:
            store_side(
                y_gradient, b, a, y_inverse, across, along, at, inside, k0, DIM, NORMALIZE, ADD_Y
            )  # fmt: skip


@triton.jit
def store_side(
    gradient, own, other, inverse, across, along, at, inside, k0, DIM: tl.constexpr,
    NORMALIZE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """across other - along own / |own|^2: a slice of the gradient of the own vectors."""
    value = other * across[:, None]
    if NORMALIZE:
        projected = tl.where(inverse < 1e12, along * inverse * inverse, 0.0)
        value -= own * projected[:, None]
    k = k0 + tl.arange(0, own.shape[1])
    mask = inside[:, None] & (k < DIM)[None, :]
    pointers = gradient + (at * DIM)[:, None] + k[None, :]
    store_or_add(pointers, value, mask, ADD)


@triton.jit(do_not_specialize=["pairs"])
def row_dot_keys_kernel(
    x, y, owners, grad, gradient, weights, along, pairs, keys, x_stride, x_inner, y_stride,
    y_key_stride, y_inner, ADD: tl.constexpr, DIM: tl.constexpr, NORMALIZE: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of y_ik from g = dL/d<x_i, y_ik>; weights g / |y| and along = g <x, y> / |x|^2 |y|
    for `row_dot_queries_kernel`."""
    at, inside = program_pairs(pairs, BLOCK)
    i, key = row_and_key(at, owners, keys)
    dots, x_inverse, y_inverse = pair_dots(
        x, y, i, key, x_stride, x_inner, y_stride, y_key_stride, y_inner, DIM, NORMALIZE, ACC,
        BLOCK_K,
    )  # fmt: skip
    g = tl.load(grad + at)
    # of a key that is not used; masks of its loads would take more registers than there are
    dots, y_inverse = tl.where(g == 0, 0.0, dots), tl.where(g == 0, 0.0, y_inverse)
    if weights is not None:
        projected = tl.where(x_inverse < 1e12, x_inverse * dots, 0.0)
        tl.store(weights + at, g * y_inverse, mask=inside)
        tl.store(along + at, g * projected, mask=inside)
    if gradient is not None:
        y += (key * y_key_stride)[:, None]
        for k0 in range(0, DIM, BLOCK_K):
            a = load_rows(x, i, k0, x_stride, x_inner, DIM, BLOCK_K, ACC)
            b = load_rows(y, i, k0, y_stride, y_inner, DIM, BLOCK_K, ACC, y_inverse != 0)
            across = g * x_inverse * y_inverse
            store_side(
                gradient, b, a, y_inverse, across, g * dots, at, inside, k0, DIM, NORMALIZE, ADD
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def row_dot_queries_kernel(
    x, y, ends, weights, along, gradient, rows, keys, x_stride, x_inner, y_stride, y_key_stride,
    y_inner, ADD: tl.constexpr, DIM: tl.constexpr, NORMALIZE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of x_i: (sum_k weights_ik y_ik - x_i sum_k along_ik) / |x_i|."""
    start = tl.program_id(0) * BLOCK_M
    i = tl.cast(start, tl.int64) + tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - start)
    inside = start + tl.arange(0, BLOCK_M) < rows
    if ends is None:
        first, count, own = i * keys, tl.zeros_like(i) + keys, y + i * y_stride
        most = keys
    else:  # the keys of row i have the numbers of its pairs
        first = tl.load(ends + i - 1, mask=i > 0, other=0)
        count, own = tl.load(ends + i) - first, y + first * y_key_stride
        most = tl.max(count, 0)
    total = tl.zeros((BLOCK_M,), ACC)
    squares = tl.zeros((BLOCK_M,), ACC)
    if NORMALIZE:
        for n0 in range(0, most, BLOCK_N):
            key = n0 + tl.arange(0, BLOCK_N)
            mask = key[None, :] < count[:, None]
            total += tl.sum(tl.load(along + first[:, None] + key[None, :], mask=mask, other=0.0), 1)
        for k0 in range(0, DIM, BLOCK_K):
            a = load_rows(x, i, k0, x_stride, x_inner, DIM, BLOCK_K, ACC)
            squares += tl.sum(a * a, 1)
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    value = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for n0 in range(0, most, BLOCK_N):
        key = n0 + tl.arange(0, BLOCK_N)
        mask = key[None, :] < count[:, None]
        weight = tl.load(weights + first[:, None] + key[None, :], mask=mask, other=0.0)
        vectors = own[:, None] + (key.to(tl.int64) * y_key_stride)[None, :]
        pointers = vectors[:, :, None] + (k.to(tl.int64) * y_inner)[None, None, :]
        mask = (weight != 0)[:, :, None] & (k < DIM)[None, None, :]
        value += tl.sum(tl.load(pointers, mask=mask, other=0.0).to(ACC) * weight[:, :, None], 1)
    if NORMALIZE:
        a = load_rows(x, i, k0, x_stride, x_inner, DIM, BLOCK_K, ACC)
        value = (value - a * total[:, None]) * inverse_norm(squares)[:, None]
    pointers = gradient + (i * DIM)[:, None] + k[None, :]
    store_or_add(pointers, value, inside[:, None] & (k < DIM)[None, :], ADD)
