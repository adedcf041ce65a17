"""Late interaction: the largest product of each token of a query with those of a document.

A program holds a block of tokens of one side and lets those of the other pass by. Queries and
documents end where `x_ends` and `y_ends` say; the state of a slot, a document or one of those that
each query has for itself (OWN), lies at state + slot * tokens of all queries.
"""

import triton
import triton.language as tl

from .folds import LOG2, LOG2E, softmax_push
from .tiles import dot, inverse_norm, load_rows


@triton.jit
def ends_of(ends, i):
    """From where to where set i goes."""
    return tl.load(ends + i - 1, mask=i > 0, other=0), tl.load(ends + i)


@triton.jit
def meeting(document, x_ends, own, tokens, OWN: tl.constexpr):
    """(slot, first, last) of the queries' tokens that a document meets."""
    if OWN:
        slot = document % own
        first, last = ends_of(x_ends, document // own)
    else:
        slot, first, last = document, tl.cast(0, tl.int64), tl.cast(tokens, tl.int64)
    return slot, first, last


@triton.jit
def inverse_norms_kernel(
    x, out, tokens, stride, inner, DIM: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """1 / max(|x_i|, 1e-12)."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = tl.minimum(at, tokens - 1)
    squares = tl.zeros((BLOCK,), ACC)
    for k0 in range(0, DIM, BLOCK_K):
        a = load_rows(x, i, k0, stride, inner, DIM, BLOCK_K, ACC)
        squares += tl.sum(a * a, 1)
    tl.store(out + at, inverse_norm(squares), mask=at < tokens)


@triton.jit
def products(
    x, y, x_inverse, y_inverse, y_kept, i, j, inside, x_stride, x_inner, y_stride, y_inner,
    DIM: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) products of tokens i and j, -inf where j is not inside or not kept."""
    z = tl.zeros((i.shape[0], j.shape[0]), ACC)
    for k0 in range(0, DIM, BLOCK_K):
        a = load_rows(x, i, k0, x_stride, x_inner, DIM, BLOCK_K, DTYPE)
        b = load_rows(y, j, k0, y_stride, y_inner, DIM, BLOCK_K, DTYPE)
        z = dot(a, tl.trans(b), z, PRECISION)
    if x_inverse is not None:
        z *= tl.load(x_inverse + i)[:, None] * tl.load(y_inverse + j)[None, :]
    if y_kept is not None:
        inside = inside & (tl.load(y_kept + j) != 0)
    return tl.where(inside[None, :], z, -float("inf"))


@triton.jit
def raise_largest(largest, winner, z, j):
    """The largest product so far and whose it is; of equal ones the first counts, and of NaN."""
    MANY: tl.constexpr = 2147483647
    is_nan = z != z
    top = tl.max(tl.where(is_nan, -float("inf"), z), 1)
    wrong = tl.min(tl.where(is_nan, j[None, :], MANY), 1)
    first = tl.min(tl.where(z == top[:, None], j[None, :], MANY), 1)
    failed = wrong != MANY
    higher = (largest == largest) & ((top > largest) | failed)
    found = tl.where(failed, float("nan"), top).to(largest.dtype)
    winner = tl.where(higher, tl.where(failed, wrong, first), winner)
    return tl.where(higher, found, largest), winner


@triton.jit(do_not_specialize=["tokens", "own"])
def max_sim_kernel(
    x, y, x_inverse, y_inverse, x_ends, y_ends, x_kept, y_kept, values, winners, tokens, own, rate,
    x_stride, x_inner, y_stride, y_inner, DIM: tl.constexpr, OWN: tl.constexpr, ACC: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ZEROS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of tokens i of the queries and a document the largest product and its token; or without
    `winners` the log-sum-exp of rate times the products. (0, -1) of tokens that do not count, and
    with ZEROS of those whose products are less, if the document has tokens that do not."""
    document = tl.cast(tl.program_id(0), tl.int64)
    slot, first, last = meeting(document, x_ends, own, tokens, OWN)
    y_first, y_last = ends_of(y_ends, document)
    start = first + tl.cast(tl.program_id(1), tl.int64) * BLOCK_M
    for m0 in range(start, last, BLOCK_M * tl.num_programs(1)):
        at = m0 + tl.arange(0, BLOCK_M)
        i = tl.minimum(at, last - 1)
        largest = tl.full((BLOCK_M,), -float("inf"), ACC)
        winner = tl.full((BLOCK_M,), -1, tl.int32)
        state = largest, tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC)
        dropped = 0
        for n0 in range(y_first, y_last, BLOCK_N):
            j = n0 + tl.arange(0, BLOCK_N)
            if ZEROS and y_kept is not None:
                dropped += tl.sum((tl.load(y_kept + j, mask=j < y_last, other=1) == 0).to(tl.int32))
            z = products(
                x, y, x_inverse, y_inverse, y_kept, i, tl.minimum(j, y_last - 1), j < y_last,
                x_stride, x_inner, y_stride, y_inner, DIM, ACC, DTYPE, PRECISION, BLOCK_K,
            )  # fmt: skip
            if winners is not None:
                largest, winner = raise_largest(largest, winner, z, j.to(tl.int32))
            else:
                z2 = z * (tl.load(rate) * LOG2E)
                state, _weights, _factor = softmax_push(state, z2, False)
        if winners is None:
            top, total, _terms = state
            found = (top + tl.log2(total)) * LOG2
            largest = tl.where(total == 0, -float("inf"), found)
        if ZEROS:
            below = (dropped > 0) & (largest < 0)
            largest, winner = tl.where(below, 0.0, largest), tl.where(below, -1, winner)
        if x_kept is not None:
            counts = tl.load(x_kept + i) != 0
            largest = tl.where(counts, largest, 0.0)
            winner = tl.where(counts, winner, -1)
        own_state = slot * tokens + at
        tl.store(values + own_state, largest, mask=at < last)
        if winners is not None:
            tl.store(winners + own_state, winner, mask=at < last)


@triton.jit(do_not_specialize=["tokens", "slots"])
def max_sim_sum_kernel(
    values, x_ends, scores, tokens, slots, rate, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of values, or of values / rate, over the tokens of a query, in a slot."""
    query, slot = tl.cast(tl.program_id(0), tl.int64), tl.cast(tl.program_id(1), tl.int64)
    first, last = ends_of(x_ends, query)
    total = tl.zeros((BLOCK,), ACC)
    for m0 in range(first, last, BLOCK):
        at = m0 + tl.arange(0, BLOCK)
        total += tl.load(values + slot * tokens + at, mask=at < last, other=0.0)
    score = tl.sum(total, 0)
    if rate is not None:
        score /= tl.load(rate)
    tl.store(scores + query * slots + slot, score)


@triton.jit
def coefficients(z, values, grads, rate):
    """dL/dz of a smooth maximum: the gradient of the score times exp(rate z - lse)."""
    lse = tl.where(values == -float("inf"), float("inf"), values)
    return grads[:, None] * tl.exp2((z * tl.load(rate) - lse[:, None]) * LOG2E)


@triton.jit
def store_gradient(
    gradient, own, sums, along, inverse, at, inside, k0, DIM: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A slice of the gradients of tokens: sums, less what lies along them where they are
    normalised, along = <token, sums>."""
    if inverse is not None:
        across = tl.where(inverse < 1e12, along * inverse * inverse, 0.0)
        sums -= own * across[:, None]
    k = k0 + tl.arange(0, BLOCK_K)
    pointers = gradient + (at * DIM)[:, None] + k[None, :]
    mask = inside[:, None] & (k < DIM)[None, :]
    tl.store(pointers, sums.to(gradient.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "slots", "own"])
def max_sim_queries_kernel(
    x, y, x_inverse, y_inverse, x_owners, y_ends, x_kept, y_kept, values, winners, grad, gradient,
    tokens, slots, own, rate, x_stride, x_inner, y_stride, y_inner, DIM: tl.constexpr,
    OWN: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ACC_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of the queries' tokens: of each slot the winner, gathered; of a smooth maximum,
    whose tokens of a block are those of one query if OWN, products with logits made again."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(1) * BLOCK_K
    i = tl.minimum(at, tokens - 1)
    inside = at < tokens
    counts = inside
    if x_kept is not None:
        counts = counts & (tl.load(x_kept + i) != 0)
    query = tl.load(x_owners + i)
    sums = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    along = tl.zeros((BLOCK_M,), ACC)
    for slot in range(0, slots):
        g = tl.load(grad + query * slots + slot, mask=counts, other=0.0)
        value = tl.load(values + tl.cast(slot, tl.int64) * tokens + i)
        if winners is not None:
            j = tl.load(winners + tl.cast(slot, tl.int64) * tokens + i).to(tl.int64)
            used = (g != 0) & (j >= 0)
            j, g = tl.maximum(j, 0), tl.where(used, g, 0.0)
            b = load_rows(y, j, k0, y_stride, y_inner, DIM, BLOCK_K, ACC, used)
            along += tl.where(used, g * value, 0.0)
            if y_inverse is not None:
                g *= tl.load(y_inverse + j)
            sums += b * g[:, None]
        else:
            # of one document after the other, which with OWN not all tokens of the block meet
            first_query, last_query = tl.min(query, 0), tl.max(query, 0)
            if not OWN:
                last_query = first_query
            for meets in range(first_query, last_query + 1):
                document, mine = tl.cast(slot, tl.int64), g
                if OWN:
                    document = meets * own + slot
                    mine = tl.where(query == meets, g, 0.0)
                y_first, y_last = ends_of(y_ends, document)
                for n0 in range(y_first, y_last, BLOCK_N):
                    n = n0 + tl.arange(0, BLOCK_N)
                    j = tl.minimum(n, y_last - 1)
                    z = products(
                        x, y, x_inverse, y_inverse, y_kept, i, j, n < y_last, x_stride, x_inner,
                        y_stride, y_inner, DIM, ACC, DTYPE, PRECISION, BLOCK_K,
                    )  # fmt: skip
                    G = coefficients(z, value, mine, rate)
                    G = tl.where((mine == 0)[:, None], 0.0, G)
                    along += tl.sum(tl.where(G == 0, 0.0, G * z), 1)
                    if y_inverse is not None:
                        G *= tl.load(y_inverse + j)[None, :]
                    b = load_rows(y, j, k0, y_stride, y_inner, DIM, BLOCK_K, ACC)
                    sums = dot(G, b, sums, ACC_PRECISION)
    inverse = None
    own_rows = sums
    if x_inverse is not None:
        inverse = tl.load(x_inverse + i)
        sums *= inverse[:, None]
        own_rows = load_rows(x, i, k0, x_stride, x_inner, DIM, BLOCK_K, ACC, along != 0)
    store_gradient(gradient, own_rows, sums, along, inverse, at, inside, k0, DIM, BLOCK_K)


@triton.jit(do_not_specialize=["tokens", "slots", "own"])
def max_sim_documents_kernel(
    x, y, x_inverse, y_inverse, x_ends, x_owners, y_ends, x_kept, y_kept, values, winners, grad,
    gradient, tokens, slots, own, rate, x_stride, x_inner, y_stride, y_inner, DIM: tl.constexpr,
    OWN: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ACC_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of a document's tokens: products of dL/dz with the tokens of the queries."""
    document = tl.cast(tl.program_id(0), tl.int64)
    k0 = tl.program_id(2) * BLOCK_K
    slot, first, last = meeting(document, x_ends, own, tokens, OWN)
    y_first, y_last = ends_of(y_ends, document)
    start = y_first + tl.cast(tl.program_id(1), tl.int64) * BLOCK_N
    for n0 in range(start, y_last, BLOCK_N * tl.num_programs(1)):
        at = n0 + tl.arange(0, BLOCK_N)
        inside = at < y_last
        j = tl.minimum(at, y_last - 1)
        sums = tl.zeros((BLOCK_N, BLOCK_K), ACC)
        along = tl.zeros((BLOCK_N,), ACC)
        for m0 in range(first, last, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            i = tl.minimum(m, last - 1)
            counts = m < last
            if x_kept is not None:
                counts = counts & (tl.load(x_kept + i) != 0)
            query = tl.load(x_owners + i)
            g = tl.load(grad + query * slots + slot, mask=counts, other=0.0)
            value = tl.load(values + slot * tokens + i)
            if winners is not None:
                won = tl.load(winners + slot * tokens + i)
                G = tl.where(won[:, None] == at.to(tl.int32)[None, :], g[:, None], 0.0)
                z = value[:, None]
            else:
                z = products(
                    x, y, x_inverse, y_inverse, y_kept, i, j, inside, x_stride, x_inner, y_stride,
                    y_inner, DIM, ACC, DTYPE, PRECISION, BLOCK_K,
                )  # fmt: skip
                G = coefficients(z, value, g, rate)
                G = tl.where((g == 0)[:, None], 0.0, G)
            along += tl.sum(tl.where(G == 0, 0.0, G * z), 0)
            if x_inverse is not None:
                G *= tl.load(x_inverse + i)[:, None]
            # a token that has no gradient is not read
            a = load_rows(x, i, k0, x_stride, x_inner, DIM, BLOCK_K, ACC, g != 0)
            sums = dot(tl.trans(G), a, sums, ACC_PRECISION)
        inverse = None
        own_rows = sums
        if y_inverse is not None:
            inverse = tl.load(y_inverse + j)
            sums *= inverse[:, None]
            own_rows = load_rows(y, j, k0, y_stride, y_inner, DIM, BLOCK_K, ACC, along != 0)
        store_gradient(gradient, own_rows, sums, along, inverse, at, inside, k0, DIM, BLOCK_K)
