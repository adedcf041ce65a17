"""Whitening kernels in CUDA C++: one launch, one block of threads for each group.

Import it only where `backends.CUDA_ERROR` is None. `_cuda` knows no torch: it takes addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .. import _cuda  # type: ignore[attr-defined]  # compiled


def supports(x: Tensor) -> bool:
    """Whether the kernels take groups `x` (G, n, D): float32 on a GPU of compute capability 8.0 or
    newer whose shared memory holds them, which on all data-centre GPUs means D <= 256."""
    return (
        x.is_cuda
        and x.dtype == torch.float32
        and x.is_contiguous()
        and x.numel() > 0
        and x[0].numel() < 2**31
        and _fits(x.device.index, x.shape[2])
    )


def whiten_cholesky(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Whiten each of the groups x (G, n, D), for which `supports(x)`.

    Xc = X - mean, C = (1 - eps) Xc^T Xc / (n - 1) + eps I = L L^T, Z = Xc L^-T (W-MSE, Ermolov et
    al. 2021, sec. 3.1).

    Returns:
        Z (G, n, D), L^-1 (G, D, D) lower, both float32, and info (G,) int32: 0, or 1 where C is not
        positive definite to working precision, or 2 where it is not finite; then Z and L^-1 of that
        group are NaN, and its gradient is 0.

    Raises:
        RuntimeError: CUDA refused the launch; numbers never raise, and nothing synchronises.
    """
    groups, rows, dim = x.shape
    z = torch.empty_like(x)
    inverse = x.new_empty(groups, dim, dim)
    info = x.new_empty(groups, dtype=torch.int32)
    _launch(_cuda.whiten_cholesky, x, eps, x, z, inverse, info)
    return z, inverse, info


def whiten_cholesky_backward(grad: Tensor, z: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """Gradient dX (G, n, D) of the groups from that of Z and what `whiten_cholesky` returned.

    M = G^T Z, S = the lower triangle of M mirrored, c = (1 - eps) / (n - 1):
    dX = (G - c Z S) L^-1 less its mean over the rows. All contiguous, as for `whiten_cholesky`.
    """
    dx = torch.empty_like(z)
    _launch(_cuda.whiten_cholesky_backward, z, eps, grad, z, inverse, dx)
    return dx


def _launch(kernel: Callable[..., None], shaped: Tensor, eps: float, *tensors: Tensor) -> None:
    with torch.cuda.device(shaped.device):
        stream = torch.cuda.current_stream().cuda_stream
        addresses = [t.data_ptr() for t in tensors]
        kernel(shaped.device.index, stream, *shaped.shape, eps, *addresses)


@lru_cache
def _fits(device: int, dim: int) -> bool:
    return _cuda.whiten_fits(device, dim)
