"""The folds: what a sweep keeps of a row of logits, and the coefficients its backward needs.

Formulas only, no pointers. Logits come in units of log 2, z2 = z / log 2, so that exp(z) = 2^z2; a
dropped pair has z2 = -inf. The state of a row is (top, total, weighted): with p_j = 2^(z2_j - top),
total = sum_j p_j and weighted = sum_j p_j (z2_j - top), which near the largest logits keeps digits
that they have not. Softplus keeps its sum in `total`, with top = 0.

A push takes the state and a tile of logits, and returns the new state, the weight of each pair in
the gradient up to a factor of its row, and the factor by which earlier weights changed.
"""

import triton
import triton.language as tl

LOG2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def weighted(p, above):
    """p (z2 - top), and 0 for a dropped pair, whose z2 is -inf: 0 times any finite number."""
    return p * tl.maximum(above, -1e30)


@triton.jit
def moved(total, terms, by, factor):
    """Sums p (z2 - top) for a top that is larger by -by, which is inf where there is no pair."""
    return (terms + tl.where(total == 0, 0.0, by) * total) * factor


@triton.jit
def softmax_push(state, z2, MEAN: tl.constexpr):
    """Softmax with a running maximum."""
    top, total, terms = state
    new_top = tl.maximum(top, tl.max(z2, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row without a pair yet
    above = z2 - shift[:, None]
    p = tl.exp2(above)
    factor = tl.exp2(top - shift)
    if MEAN:
        terms = moved(total, terms, top - shift, factor) + tl.sum(weighted(p, above), 1)
    total = total * factor + tl.sum(p, 1)
    return (new_top, total, terms), p, factor


@triton.jit
def ones(like):
    """tl.full cannot tell Gluon a layout. The compiler sees that it is a constant."""
    return tl.where(like == 0, 1.0, 1.0).to(like.dtype)


@triton.jit
def shifted_push(state, z2, MEAN: tl.constexpr):
    """Softmax with a fixed shift: sums simply add up."""
    top, total, terms = state
    above = z2 - top[:, None]
    p = tl.exp2(above)
    total += tl.sum(p, 1)
    if MEAN:
        terms += tl.sum(weighted(p, above), 1)
    return (top, total, terms), p, ones(total)


@triton.jit
def softplus_push(state, z2, MEAN: tl.constexpr):
    """Sum of log2(1 + 2^z2)."""
    top, total, terms = state
    total += tl.sum(softplus2(z2), 1)
    return (top, total, terms), sigmoid2(z2), ones(total)


@triton.jit
def merge(state, other):
    """The state of two sets of pairs together, and the factors of their weights."""
    top = tl.maximum(state[0], other[0])
    shift = tl.where(top == -float("inf"), 0.0, top)
    mine, theirs = tl.exp2(state[0] - shift), tl.exp2(other[0] - shift)
    total = state[1] * mine + other[1] * theirs
    terms = moved(state[1], state[2], state[0] - shift, mine)
    terms += moved(other[1], other[2], other[0] - shift, theirs)
    return (top, total, terms), mine, theirs


@triton.jit
def softmax_done(state):
    """(lse, mean, factor of the weights, what rounding took from lse, and from mean); (-inf, 0, 0,
    0, 0) for a row without a pair."""
    top, total, terms = state
    empty = total == 0  # not true of NaN, which stays
    total = tl.where(empty, 1.0, total)
    wide = tl.where(empty, 0.0, top).to(tl.float64)  # for large logits
    lse, low = rounded(tl.where(empty, -float("inf"), wide + tl.log2(total)), top.dtype)
    norm = tl.where(empty, 0.0, 1.0 / total)
    mean, mean_low = rounded(wide + terms * norm, top.dtype)
    return lse, mean, norm, low, mean_low


@triton.jit
def rounded(exact, DTYPE: tl.constexpr):
    """A number of float64 in units of log 2: the same without them, and what its rounding took."""
    exact *= LOG2
    high = exact.to(DTYPE)
    return high, tl.where(tl.abs(high) < float("inf"), (exact - high).to(DTYPE), 0.0)


@triton.jit
def softplus_done(state):
    """(value, 0, factor of the weights, 0, 0)."""
    total = state[1]
    zeros = tl.zeros_like(total)
    return total * LOG2, zeros, ones(total), zeros, zeros


@triton.jit
def softmax_coefficient(z2, lse, mean, grad_lse, grad_mean, MEAN: tl.constexpr):
    """dL/dz = p (a + b (z - mean + 1)) of gradients a of lse and b of mean; 0 for a dropped pair.

    `lse` and `mean` are in units of log 2, and lse is +inf, not -inf, for a row without a pair.
    """
    p = tl.exp2(z2 - lse)
    if MEAN:
        above = (tl.maximum(z2, -1e30) - mean) * LOG2
        return p * (grad_lse + grad_mean * (above + 1))
    else:
        return p * grad_lse


@triton.jit
def softplus_coefficient(z2, lse, mean, grad_lse, grad_mean, MEAN: tl.constexpr):
    """dL/dz = a sigmoid(z)."""
    return sigmoid2(z2) * grad_lse


@triton.jit
def softplus2(z2):
    """log2(1 + 2^z2), relative precision also where it is small: there the series of log(1 + e)."""
    e = tl.exp2(-tl.abs(z2))
    if z2.dtype == tl.float64:
        u = 1.0 + e
        # log(1 + e) = e log(u) / (u - 1), whatever u was rounded to
        small = tl.where(u > 1.0, tl.log2(u) * e / tl.where(u > 1.0, u - 1.0, 1.0), e * LOG2E)
    else:
        series = e * (1.0 - e * (0.5 - e * (0.3333333333333333 - e * 0.25))) * LOG2E
        small = tl.where(e < 0.015625, series, tl.log2(1.0 + e))
    return tl.maximum(z2, 0.0) + small


@triton.jit
def sigmoid2(z2):
    """1 / (1 + 2^-z2)"""
    return 1.0 / (1.0 + tl.exp2(-z2))
