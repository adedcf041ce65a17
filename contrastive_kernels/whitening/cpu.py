"""Whitening kernels of the CPU engine, one group at a time on each thread.

Import it only where `backends.CPU_ERROR` is None. `_cpu` takes addresses: tensors are of float32 or
float64, and are made contiguous here. Numbers never raise: `info` (G,) int32 of a group is 0, or 1
where its covariance is not positive definite to working precision, or 2 where it is not finite;
then what was made of it is NaN, and its gradient is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _cpu  # type: ignore[attr-defined]  # compiled


def whiten_cholesky(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Z, L^-1 (G, D, D) and info of the groups x (G, n, D)."""
    made = _results(x, _square(x))
    _call(_cpu.whiten_cholesky, x.shape, (eps,), x, *made)
    return made


def whiten_cholesky_backward(grad: Tensor, z: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """The gradient of the groups (G, n, D) from that of Z and what `whiten_cholesky` returned."""
    dx = z.new_empty(z.shape)
    _call(_cpu.whiten_cholesky_backward, z.shape, (eps,), grad, z, inverse, dx)
    return dx


def whiten_zca(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Z, the eigenvectors (G, D, D) as rows, square roots of their values (G, D), and info."""
    made = _results(x, _square(x), (x.shape[0], x.shape[2]))
    _call(_cpu.whiten_zca, x.shape, (eps,), x, *made)
    return made


def whiten_zca_backward(
    grad: Tensor, z: Tensor, vectors: Tensor, roots: Tensor, eps: float
) -> Tensor:
    """The gradient of the groups (G, n, D) from that of Z and what `whiten_zca` returned."""
    dx = z.new_empty(z.shape)
    _call(_cpu.whiten_zca_backward, z.shape, (eps,), grad, z, vectors, roots, dx)
    return dx


def whiten_newton_schulz(x: Tensor, eps: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Z, the covariances (G, D, D) and info of the groups x (G, n, D)."""
    made = _results(x, _square(x))
    _call(_cpu.whiten_newton_schulz, x.shape, (eps, iterations), x, *made)
    return made


def whiten_newton_schulz_backward(
    grad: Tensor, x: Tensor, covariance: Tensor, eps: float, iterations: int
) -> Tensor:
    """The gradient of the groups x (G, n, D) from that of Z and the covariances."""
    dx = x.new_empty(x.shape)
    _call(_cpu.whiten_newton_schulz_backward, x.shape, (eps, iterations), grad, x, covariance, dx)
    return dx


def view_distance(z: Tensor, normalize: bool) -> Tensor:
    """The mean distance (M,) over the pairs of the views z (V, M, D)."""
    distance = z.new_empty(z.shape[1])
    _call(_cpu.view_distance, z.shape, (normalize,), z, distance)
    return distance


def view_distance_backward(grad: Tensor, z: Tensor, normalize: bool) -> Tensor:
    """The gradient of the views (V, M, D)."""
    dz = z.new_empty(z.shape)
    _call(_cpu.view_distance_backward, z.shape, (normalize,), grad, z, dz)
    return dz


def _call(kernel: Callable[..., None], shape: torch.Size, options: tuple, *tensors: Tensor) -> None:
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.float64) or any(
        t.dtype not in (dtype, torch.int32) for t in tensors
    ):
        types = ", ".join(str(t.dtype) for t in tensors)
        raise TypeError(f"tensors must all be float32 or all be float64, got {types}")
    # what is made is contiguous already, so that the kernel writes into it
    tensors = tuple(t.contiguous() for t in tensors)
    kernel(dtype == torch.float64, *shape, *options, *(t.data_ptr() for t in tensors))


def _results(x: Tensor, *shapes: tuple[int, ...]) -> tuple:
    made = (x.new_empty(shape) for shape in (tuple(x.shape), *shapes))
    return (*made, x.new_empty(x.shape[0], dtype=torch.int32))


def _square(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], x.shape[2], x.shape[2])
