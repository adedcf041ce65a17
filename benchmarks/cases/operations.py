"""Floating point operations of the schedules, forward, backward or both: a multiply-add is two."""

from .inputs import Groups, Sizes


def two_sided(sizes: Sizes, passes: str = "both") -> float:
    """Similarities twice and two products with their gradient: 2 NMD forward and 6 backward."""
    units = {"forward": 2.0, "backward": 6.0, "both": 8.0}[passes]
    return units * sizes.n * sizes.m * sizes.d


def one_product(sizes: Sizes, passes: str = "forward") -> float:
    """Similarities once, forward alone."""
    return {"forward": 2.0}[passes] * sizes.n * sizes.m * sizes.d


def kept_tiles(sizes: Sizes, passes: str = "both") -> float:
    """Similarities once, and both gradients from them: 2 NMD and 4."""
    units = {"forward": 2.0, "backward": 4.0, "both": 6.0}[passes]
    return units * sizes.n * sizes.m * sizes.d


def frozen_keys(sizes: Sizes, passes: str = "both") -> float:
    """Similarities (2 NMD), and with a gradient that of the query in the same sweep (4)."""
    units = {"forward": 2.0, "backward": 0.0, "both": 4.0}[passes]
    return units * sizes.n * sizes.m * sizes.d


def half_tiles(sizes: Sizes, passes: str = "both") -> float:
    """A symmetric matrix of m x m, half of it computed: 1 forward and 3 backward, in m^2 D."""
    return {"forward": 1.0, "backward": 3.0, "both": 4.0}[passes] * sizes.m * sizes.m * sizes.d


def whiten_flops(sizes: Sizes, passes: str = "both") -> float:
    """n groups of m x d: products with triangular or symmetric halves left out, two forward and
    four backward, and the inverse of a Cholesky factor forward."""
    units = {"forward": 2.0, "backward": 4.0, "both": 6.0}[passes]
    inverse = 0 if passes == "backward" else sizes.d**3
    return sizes.n * (units * sizes.m * sizes.d**2 + inverse)


def whiten_zca_flops(sizes: Sizes, passes: str = "both") -> float:
    """The same with eigenvectors, without the operations that find them."""
    forward = 3 * sizes.m * sizes.d**2 + sizes.d**3
    backward = 6 * sizes.m * sizes.d**2 + 9 * sizes.d**3
    return sizes.n * {"forward": forward, "backward": backward, "both": forward + backward}[passes]


def whiten_newton_schulz_flops(sizes: Sizes, passes: str = "both") -> float:
    """The same with five Newton-Schulz steps, of 12 symmetric products forward and 36 backward."""
    forward = 3 * sizes.m * sizes.d**2 + 12 * sizes.d**3
    backward = 6 * sizes.m * sizes.d**2 + 36 * sizes.d**3
    return sizes.n * {"forward": forward, "backward": backward, "both": forward + backward}[passes]


def w_mse_flops(sizes: Sizes, passes: str = "both") -> float:
    """Four iterations of whitening k views, n / m groups each."""
    return 4 * sizes.k * whiten_flops(Groups(sizes.n // sizes.m, sizes.m, sizes.d), passes)
