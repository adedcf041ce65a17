"""Whitening kernels of the CPU engine, one group at a time on each thread.

Import it only where `backends.CPU_ERROR` is None. `_cpu` takes addresses: shapes and types are
looked at here, and tensors made contiguous. Samples and their gradient are float32, float64 or a
half type, and all else float64 for float64 samples, or float32. Numbers never raise: `info` (G,)
int32 of a group is 0, or 1 where its covariance is not positive definite to working precision, or 2
where it is not finite; then what was made of it is NaN, and its gradient is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _cpu  # type: ignore[attr-defined]  # compiled
from ..cpu.operands import DTYPES
from ..types import statistics_dtype


def whiten_cholesky(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Z, L^-1 (G, D, D) and info of the groups x (G, n, D)."""
    made = _results(x, _square(x))
    _call(_cpu.whiten_cholesky, x, (eps,), x, *made)
    return made


def whiten_cholesky_backward(
    grad: Tensor, z: Tensor, inverse: Tensor, dtype: torch.dtype, eps: float
) -> Tensor:
    """The gradient of the groups (G, n, D) from that of Z and what `whiten_cholesky` returned."""
    dx = z.new_empty(z.shape, dtype=dtype)
    _check(dx, grad=(grad, z.shape), z=(z, z.shape), inverse=(inverse, _square(z)))
    _call(_cpu.whiten_cholesky_backward, dx, (eps,), grad, z, inverse, dx)
    return dx


def whiten_zca(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Z, the eigenvectors (G, D, D) as rows, square roots of their values (G, D), and info."""
    made = _results(x, _square(x), _row(x))
    _call(_cpu.whiten_zca, x, (eps,), x, *made)
    return made


def whiten_zca_backward(
    grad: Tensor, z: Tensor, vectors: Tensor, roots: Tensor, dtype: torch.dtype, eps: float
) -> Tensor:
    """The gradient of the groups (G, n, D) from that of Z and what `whiten_zca` returned."""
    dx = z.new_empty(z.shape, dtype=dtype)
    _check(
        dx, grad=(grad, z.shape), z=(z, z.shape), vectors=(vectors, _square(z)),
        roots=(roots, _row(z)),
    )  # fmt: skip
    _call(_cpu.whiten_zca_backward, dx, (eps,), grad, z, vectors, roots, dx)
    return dx


def whiten_newton_schulz(x: Tensor, eps: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Z, the covariances (G, D, D) and info of the groups x (G, n, D)."""
    made = _results(x, _square(x))
    _call(_cpu.whiten_newton_schulz, x, (eps, iterations), x, *made)
    return made


def whiten_newton_schulz_backward(
    grad: Tensor, x: Tensor, covariance: Tensor, eps: float, iterations: int
) -> Tensor:
    """The gradient of the groups x (G, n, D) from that of Z and the covariances."""
    dx = x.new_empty(x.shape)
    _check(dx, grad=(grad, x.shape), covariance=(covariance, _square(x)))
    _call(_cpu.whiten_newton_schulz_backward, dx, (eps, iterations), grad, x, covariance, dx)
    return dx


def view_distance(z: Tensor, normalize: bool) -> Tensor:
    """The mean distance (M,) over the pairs of the views z (V, M, D)."""
    distance = z.new_empty(z.shape[1])
    _check(z, z=(z, z.shape))
    _call(_cpu.view_distance, z, (normalize,), z, distance)
    return distance


def view_distance_backward(grad: Tensor, z: Tensor, normalize: bool) -> Tensor:
    """The gradient of the views (V, M, D)."""
    dz = z.new_empty(z.shape)
    _check(z, grad=(grad, z.shape[1:2]), z=(z, z.shape))
    _call(_cpu.view_distance_backward, z, (normalize,), grad, z, dz)
    return dz


def _call(kernel: Callable[..., None], samples: Tensor, options: tuple, *tensors: Tensor) -> None:
    """`samples` has the sizes, and the type that the kernel is told."""
    code = DTYPES.get(samples.dtype)
    if code is None:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {samples.dtype}")
    # what is made is contiguous already, so that the kernel writes into it
    tensors = tuple(t.contiguous() for t in tensors)
    kernel(code, *samples.shape, *options, *(t.data_ptr() for t in tensors))


def _check(samples: Tensor, **given: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise unless each tensor has its shape, and the type of the arithmetic for such samples: C++
    trusts what it gets."""
    dtype = statistics_dtype(samples)
    for name, (tensor, shape) in given.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _results(x: Tensor, *shapes: tuple[int, ...]) -> tuple:
    dtype = statistics_dtype(x)
    made = (x.new_empty(shape, dtype=dtype) for shape in (tuple(x.shape), *shapes))
    return (*made, x.new_empty(x.shape[0], dtype=torch.int32))


def _square(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], x.shape[2], x.shape[2])


def _row(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], x.shape[2])
