"""Registered operators of whitening, with closed-form backwards, for groups x (G, n, D).

No backward differentiates a factorisation: with Z the result and G its gradient,

cholesky  Z = Xc L^-T, M = G^T Z, S = the lower triangle of M mirrored:
          dXc = (G - c Z S) L^-1
zca       C = U diag(s^2) U^T, Zt = Z U, Gt = G U, M = Zt^T Gt, T_ij = (s_i M_ij + s_j M_ji) /
          (s_i + s_j): dXc = ((Gt - c Zt T) / s) U^T, free of 1 / (s_i - s_j)

where c = (1 - eps) / (n - 1); then dX = dXc less its mean over the rows. Newton-Schulz steps make a
polynomial f of S = C / t, t = tr C, so that their derivative in a symmetric direction is its own
adjoint, and the backward is the steps again, with a derivative beside each matrix:

newton    Z = Xc P, P = f(S) / sqrt(t), E = the symmetric part of Xc^T G, A = the derivative of f at
          S in the direction E, D = (A - (<A, S> + <E, f(S)> / 2) I) / t^1.5:
          dXc = G P + 2 c Xc D

Samples x may be of half types, and so is their gradient; all else is float32 then. Numbers never
raise here: `info` (G,) int32 of a group is FINE, NOT_DEFINITE (to working precision) or NOT_FINITE.
What was made of a group that failed is NaN, its gradient is 0, and the other groups are right.
`view_distance` is the rest of W-MSE, one pass over the whitened views.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import define, no_second_order, register_rules
from ..backends import CPU_ERROR
from ..ops import NAMESPACE
from ..types import statistics_dtype
from .dense import (
    FINE,
    NOT_DEFINITE,
    approximate_root,
    center,
    eigen,
    invert_cholesky,
    less_mean,
    newton_schulz,
    shrink_diagonal,
    trace_of,
)

try:
    from . import cuda
except ImportError:  # not built
    cuda = None  # type: ignore[assignment]
if CPU_ERROR is None:
    from . import cpu

TOLERANCE = 0.1  # of a variance of the result
# Beyond so many features LAPACK finds eigenvectors as fast on one thread.
_MOST_EIGENVECTORS = 384
# Multiply-adds of a group from which it is shared among threads where there are fewer groups.
_LARGE_GROUP = 2**22

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def has_cuda_kernel(x: Tensor) -> bool:
    """Whether the CUDA kernels whiten groups like x."""
    return cuda is not None and cuda.supports(x)


@define(_library)
def whiten_cholesky(x: Tensor, eps: float, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
    """(Z, L^-1, info) of the groups x (G, n, D); `kernel` is "cpu", "cuda" or "auto", which may
    also be batched torch."""
    if _takes_cpu_kernel(x, kernel):
        return cpu.whiten_cholesky(x, eps)
    x = x.to(statistics_dtype(x))
    if has_cuda_kernel(x):
        return cuda.whiten_cholesky(x.contiguous(), eps)
    centered, covariance, mean = center(x, eps)
    inverse, info = invert_cholesky(covariance, mean)
    z = centered @ inverse.mT
    variance = (1 - eps) * z.square().sum(1) / (x.shape[1] - 1) + eps * inverse.square().sum(-1)
    # a pivot that was rounding alone shows here: L^-1 C L^-T has no 1 on its diagonal
    unit = ((variance - 1).abs() < TOLERANCE).all(-1)
    info = torch.where((info == FINE) & ~unit, NOT_DEFINITE, info)
    failed = info.bool()[:, None, None]
    return z.masked_fill_(failed, torch.nan), inverse.masked_fill_(failed, torch.nan), info


@define(_library)
def whiten_cholesky_backward(
    grad: Tensor, z: Tensor, inverse: Tensor, dtype: torch.dtype, eps: float, kernel: str
) -> Tensor:
    """Gradient of the groups (G, n, D), which are of type `dtype`."""
    if _takes_cpu_kernel(z, kernel):
        return cpu.whiten_cholesky_backward(grad, z, inverse, dtype, eps)
    if has_cuda_kernel(z):
        return cuda.whiten_cholesky_backward(grad.contiguous(), z, inverse, eps).to(dtype)
    product = grad.mT @ z
    mirrored = product.tril() + product.tril(-1).mT
    shrunk = torch.baddbmm(grad, z, mirrored, alpha=-(1 - eps) / (z.shape[1] - 1))
    return less_mean(shrunk @ inverse, inverse[:, 0, 0].isnan(), dtype)


@define(_library)
def whiten_zca(x: Tensor, eps: float, kernel: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Z, U^T, square roots of the eigenvalues, info) of the groups x (G, n, D); `kernel` is "cpu"
    or "auto"."""
    if _takes_cpu_kernel(x, kernel, _MOST_EIGENVECTORS):
        return cpu.whiten_zca(x, eps)
    x = x.to(statistics_dtype(x))
    centered, covariance, _mean = center(x, eps)
    vectors, roots, info = eigen(covariance)
    z = ((centered @ vectors.mT) / roots[:, None]) @ vectors
    return z, vectors, roots, info


@define(_library)
def whiten_zca_backward(
    grad: Tensor,
    z: Tensor,
    vectors: Tensor,
    roots: Tensor,
    dtype: torch.dtype,
    eps: float,
    kernel: str,
) -> Tensor:
    """Gradient of the groups (G, n, D), which are of type `dtype`."""
    if _takes_cpu_kernel(z, kernel, _MOST_EIGENVECTORS):
        return cpu.whiten_zca_backward(grad, z, vectors, roots, dtype, eps)
    z, grad = z @ vectors.mT, grad @ vectors.mT
    product = roots[:, :, None] * (z.mT @ grad)
    mixed = (product + product.mT) / (roots[:, :, None] + roots[:, None])
    shrunk = torch.baddbmm(grad, z, mixed, alpha=-(1 - eps) / (z.shape[1] - 1))
    return less_mean((shrunk / roots[:, None]) @ vectors, roots[:, 0].isnan(), dtype)


@define(_library)
def whiten_newton_schulz(
    x: Tensor, eps: float, iterations: int, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(Z, C, info) of the groups x (G, n, D) of any rank; `kernel` is "cpu" or "auto"."""
    if _takes_cpu_kernel(x, kernel):
        return cpu.whiten_newton_schulz(x, eps, iterations)
    x = x.to(statistics_dtype(x))
    centered, covariance, _mean = center(x, eps)
    matrix, info = approximate_root(covariance, iterations)
    failed = info.bool()[:, None, None]
    z = (centered @ matrix).masked_fill_(failed, torch.nan)
    return z, covariance.masked_fill(failed, torch.nan), info


@define(_library)
def whiten_newton_schulz_backward(
    grad: Tensor, x: Tensor, covariance: Tensor, eps: float, iterations: int, kernel: str
) -> Tensor:
    """Gradient of the groups (G, n, D)."""
    if _takes_cpu_kernel(x, kernel):
        return cpu.whiten_newton_schulz_backward(grad, x, covariance, eps, iterations)
    samples = x.to(statistics_dtype(x))
    centered = samples - samples.mean(1, keepdim=True)
    product = centered.mT @ grad
    along = (product + product.mT) / 2
    trace = trace_of(covariance)
    # constant features, or a group that failed
    zero = ~(trace > 0)
    trace = torch.where(zero, 1.0, trace)
    root, slope = newton_schulz(covariance / trace, iterations, along)
    inner = (slope * covariance).sum((1, 2), keepdim=True) / trace
    inner = inner + (along * root).sum((1, 2), keepdim=True) / 2
    slope = shrink_diagonal(slope, -inner) / trace**1.5
    made = torch.baddbmm(
        grad @ (root * trace.rsqrt()), centered, slope, alpha=2 * (1 - eps) / (x.shape[1] - 1)
    )
    return less_mean(made, zero.flatten(), x.dtype)


@define(_library)
def view_distance(z: Tensor, normalize: bool) -> Tensor:
    """Mean over the pairs of the V views z (V, M, D) of |u_v - u_w|^2: (M,), in O(V).

    u_v is z_v, or with `normalize` z_v / max(|z_v|, 1e-12).
    """
    if _use_cpu_kernel(z):
        return cpu.view_distance(z, normalize)
    return dense_view_distance(z, normalize)


@define(_library)
def view_distance_backward(grad: Tensor, z: Tensor, normalize: bool) -> Tensor:
    """Gradient of the views (V, M, D)."""
    if _use_cpu_kernel(z):
        return cpu.view_distance_backward(grad, z, normalize)
    scale = grad[:, None] * (4 / (z.shape[0] - 1))
    if not normalize:
        return scale * (z - z.mean(0))
    norm = z.norm(dim=-1, keepdim=True)
    unit = z / norm.clamp(min=1e-12)
    along_unit = scale * (unit - unit.mean(0))
    # a norm that was raised to 1e-12 is a constant
    radial = torch.where(norm > 1e-12, (along_unit * unit).sum(-1, keepdim=True), 0.0)
    return (along_unit - radial * unit) / norm.clamp(min=1e-12)


@define(_library)
def permute_rows(x: Tensor, permutations: Tensor) -> Tensor:
    """Rows of x (V, N, D) in the orders of permutations (I, N): (V, I N, D)."""
    return _permuted(x, permutations, False)


@define(_library)
def permute_rows_backward(grad: Tensor, permutations: Tensor) -> Tensor:
    """Gradient of the rows (V, N, D): the sum over the I orders of rows put back into place."""
    return _permuted(grad, permutations, True)


class PermuteRows(torch.autograd.Function):
    """`permute_rows`, or `back` its backward, with derivatives of every order and mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, permutations: Tensor, back: bool) -> Tensor:
        return _permuted(x, permutations, back)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _x, permutations, ctx.back = inputs
        ctx.save_for_backward(permutations)
        ctx.save_for_forward(permutations)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return PermuteRows.apply(grad, *ctx.saved_tensors, not ctx.back), None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        return PermuteRows.apply(x, *ctx.saved_tensors, ctx.back)


def _permuted(x: Tensor, permutations: Tensor, back: bool) -> Tensor:
    """Rows are gathered both ways, where index_add would scatter them."""
    if not back:
        return x.index_select(1, permutations.flatten())
    inverse = permutations.argsort(1)
    parts = x.unflatten(1, permutations.shape).unbind(1)
    total = parts[0].index_select(1, inverse[0])
    for part, index in zip(parts[1:], inverse[1:], strict=True):
        total = total + part.index_select(1, index)
    return total


def dense_view_distance(z: Tensor, normalize: bool) -> Tensor:
    """`view_distance` in operations that autograd differentiates any number of times."""
    unit = F.normalize(z, dim=-1) if normalize else z
    # the sum over the pairs is V times that of the squared distances to the mean of the views
    return (unit - unit.mean(0)).square().sum((0, -1)) * (2 / (z.shape[0] - 1))


def _use_cpu_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu" and CPU_ERROR is None


def _takes_cpu_kernel(groups: Tensor, kernel: str, most_features: float = math.inf) -> bool:
    """The CPU kernel gives each group one thread, which pays unless few large ones leave threads
    idle."""
    if kernel != "auto" or not _use_cpu_kernel(groups):
        return kernel == "cpu"
    count, n, dim = groups.shape
    return dim <= most_features and (count >= torch.get_num_threads() or n * dim**2 <= _LARGE_GROUP)


def _setup_whiten(ctx: Any, inputs: tuple, output: Any) -> None:
    *made, info = output
    x, *options = inputs
    ctx.options = (x.dtype, *options)
    ctx.save_for_backward(*made)
    ctx.mark_non_differentiable(info)


def _backward_cholesky(ctx: Any, grad: Tensor, *_rest: Any) -> tuple[Tensor, None, None]:
    return whiten_cholesky_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


def _backward_zca(ctx: Any, grad: Tensor, *_rest: Any) -> tuple[Tensor, None, None]:
    return whiten_zca_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


def _setup_newton_schulz(ctx: Any, inputs: tuple, output: Any) -> None:
    _z, covariance, info = output
    x, *ctx.options = inputs
    ctx.save_for_backward(x, covariance)
    ctx.mark_non_differentiable(info)


def _backward_newton_schulz(ctx: Any, grad: Tensor, *_rest: Any) -> tuple[Tensor, None, None, None]:
    made = whiten_newton_schulz_backward(grad, *ctx.saved_tensors, *ctx.options)
    return made, None, None, None


def _setup_view_distance(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.normalize = inputs[1]


def _backward_view_distance(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return view_distance_backward(grad, *ctx.saved_tensors, ctx.normalize), None


def _setup_permute(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_permute(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return permute_rows_backward(grad, *ctx.saved_tensors), None


def _backward_permute_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return permute_rows(grad, *ctx.saved_tensors), None


def _fake_groups(x: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    info = x.new_empty(x.shape[0], dtype=torch.int32)
    made = torch.empty_like(x, dtype=statistics_dtype(x))
    return (made, *(made.new_empty(shape) for shape in shapes), info)


def _fake_gradient(_grad: Tensor, like: Tensor, *rest: Any) -> Tensor:
    dtypes = [option for option in rest if isinstance(option, torch.dtype)]
    return torch.empty_like(like, dtype=dtypes[0] if dtypes else like.dtype)


def _square(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], x.shape[2], x.shape[2])


def _register() -> None:
    register_rules(
        _library, whiten_cholesky, lambda x, eps, kernel: _fake_groups(x, _square(x)),
        _backward_cholesky, _setup_whiten,
    )  # fmt: skip
    register_rules(
        _library, whiten_zca,
        lambda x, eps, kernel: _fake_groups(x, _square(x), (x.shape[0], x.shape[2])),
        _backward_zca, _setup_whiten,
    )  # fmt: skip
    register_rules(
        _library, whiten_newton_schulz,
        lambda x, eps, iterations, kernel: _fake_groups(x, _square(x)),
        _backward_newton_schulz, _setup_newton_schulz,
    )  # fmt: skip
    register_rules(
        _library, view_distance, lambda z, normalize: z.new_empty(z.shape[1]),
        _backward_view_distance, _setup_view_distance,
    )  # fmt: skip
    register_rules(
        _library, permute_rows,
        lambda x, permutations: x.new_empty(x.shape[0], permutations.numel(), x.shape[2]),
        _backward_permute, _setup_permute,
    )  # fmt: skip
    register_rules(
        _library, permute_rows_backward,
        lambda grad, permutations: grad.new_empty(
            grad.shape[0], permutations.shape[1], grad.shape[2]
        ),
        _backward_permute_back, _setup_permute,
    )  # fmt: skip
    backwards = (
        whiten_cholesky_backward, whiten_zca_backward, whiten_newton_schulz_backward,
        view_distance_backward,
    )  # fmt: skip
    for op in backwards:
        register_rules(_library, op, _fake_gradient, no_second_order)
    for op in (whiten_cholesky, whiten_zca, whiten_newton_schulz, view_distance, *backwards):
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(op.name(), device, torch.float32, lib=_library)


_register()
