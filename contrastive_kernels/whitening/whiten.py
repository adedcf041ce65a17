"""Batched whitening of many small groups."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from .. import reference
from ..autograd import precise
from ..backends import resolve_backend, runs_dense
from ..checks import check_choice, check_features, check_range
from ..types import statistics_dtype
from . import errors
from .dense import FINE
from .operators import has_cuda_kernel, whiten_cholesky, whiten_newton_schulz, whiten_zca

METHODS = ("cholesky", "zca", "newton_schulz")
# backends that have kernels; "auto" takes batched library calls where there is none
KERNELS: dict[str, tuple[str, ...]] = {
    "cholesky": ("cpu", "cuda"),
    "zca": ("cpu",),
    "newton_schulz": ("cpu",),
}


@overload
def whiten(
    x: Tensor,
    *,
    method: str = "cholesky",
    eps: float = 0.0,
    iterations: int = 5,
    backend: str = "auto",
    return_info: Literal[False] = False,
) -> Tensor: ...


@overload
def whiten(
    x: Tensor,
    *,
    method: str = "cholesky",
    eps: float = 0.0,
    iterations: int = 5,
    backend: str = "auto",
    return_info: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def whiten(
    x: Tensor,
    *,
    method: str = "cholesky",
    eps: float = 0.0,
    iterations: int = 5,
    backend: str = "auto",
    return_info: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def whiten(
    x: Tensor,
    *,
    method: str = "cholesky",
    eps: float = 0.0,
    iterations: int = 5,
    backend: str = "auto",
    return_info: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Whiten each group of n samples on its own: the result has covariance I.

    Xc = X - mean, C = (1 - eps) Xc^T Xc / (n - 1) + eps I, and
    "cholesky": Z = Xc L^-T, C = L L^T (W-MSE, Ermolov et al. 2021, sec. 3.1),
    "zca": Z = Xc C^-1/2 (decorrelated batch normalisation, Huang et al. 2018),
    "newton_schulz": Z = Xc P with P close to C^-1/2, from `iterations` Newton-Schulz steps on
    C / trace C (IterNorm, Huang et al. 2019); only matrix products.

    Args:
        x: (..., n, D) with n > D, or n > 1 if eps > 0; float32, float64, bfloat16 or float16.
        eps: shrinkage towards I, in [0, 1).
        iterations: steps of "newton_schulz", >= 1; others ignore it.
        backend: "reference" differentiates through the factorisation, and so any number of times,
            and "auto" does in forward mode; else the closed-form backward is used, once.
        return_info: return which groups could be whitened, and raise for none that could not.

    Returns:
        (..., n, D), float32, or float64 for float64 `x`; all arithmetic has that precision. With
        `return_info` also ok (...,), a bool for each group: where it is False the result is NaN
        and the gradient 0, and the other groups are right.

    Raises:
        ValueError: n <= D with eps = 0. Unless `return_info`, also a group whose covariance is not
            finite, or not positive definite to working precision ("newton_schulz" takes any);
            the message names the group. On a GPU that comes late, so that nothing waits for the
            device: at the next call that finds the flags on the host, or in `check_whitening`;
            never of calls within a CUDA graph or torch.compile. Compiled for a CPU it is a
            RuntimeError without the number of the group.
        RuntimeError: a backend that cannot run here: "cuda" has kernels of "cholesky" alone.
        NotImplementedError: a second derivative, or one in forward mode, of a closed form.
    """
    _check_groups(x)
    n, dim = x.shape[-2:]
    check_method(method, eps, n, dim, "n", "x")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    resolve_backend(backend, x.device, kernels=KERNELS[method])
    if backend == "reference" and return_info:
        raise ValueError('return_info needs another backend than "reference"')
    if runs_dense(backend) and not return_info:
        return precise(reference.whiten)(x, method=method, eps=eps, iterations=iterations)
    # kernels of a CPU convert half rows on the way
    groups = x if x.device.type == "cpu" else x.to(statistics_dtype(x))
    groups = groups.reshape(-1, n, dim)
    if backend == "cuda" and not has_cuda_kernel(groups):
        raise RuntimeError(
            'backend="cuda" whitens in float32, with D <= 256 on most GPUs; "auto" takes batched '
            f"library calls elsewhere, got {groups.dtype} and D = {dim}"
        )
    if method == "cholesky":
        z, _inverse, info = whiten_cholesky(groups, eps, backend)
    elif method == "zca":
        z, _vectors, _roots, info = whiten_zca(groups, eps, backend)
    else:
        z, _covariance, info = whiten_newton_schulz(groups, eps, iterations, backend)
    z = z.view(x.shape)
    if return_info:
        return z, (info == FINE).view(x.shape[:-2])
    errors.check(info)
    return z


def check_method(method: str, eps: float, n: int, dim: int, size: str, source: str) -> None:
    """Raise unless groups of n samples, called `size`, of `dim` features can be whitened."""
    check_choice("method", method, METHODS)
    check_range("eps", eps, 0.0, 1.0)
    if n < 2 or (eps == 0 and n <= dim):
        raise ValueError(
            f"{size} must be above D = {dim}, the number of features in {source}, so that the "
            f"covariance has full rank (or at least 2 with eps > 0), got {n}"
        )


def _check_groups(x: Tensor) -> None:
    if isinstance(x, Tensor) and x.dim() < 2:
        raise ValueError(f"x must have shape (..., n, D), got {tuple(x.shape)}")
    check_features("x", x, (x.dim(),) if isinstance(x, Tensor) else ())
    if x.numel() == 0:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
