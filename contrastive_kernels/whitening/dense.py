"""Whitening in batched calls of torch, for groups x (G, n, D) on any device: covariances, what they
are whitened with, and what tells whether they could be."""

from __future__ import annotations

import torch
from torch import Tensor

FINE, NOT_DEFINITE, NOT_FINITE = 0, 1, 2  # of a group's info


def center(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Xc, C = (1 - eps) Xc^T Xc / (n - 1) + eps I and the mean of the groups x (G, n, D)."""
    mean = x.mean(1, keepdim=True)
    centered = x - mean
    covariance = (centered.mT @ centered) * ((1 - eps) / (x.shape[1] - 1))
    return centered, shrink_diagonal(covariance, eps), mean


def shrink_diagonal(covariance: Tensor, eps: float | Tensor) -> Tensor:
    """covariance + eps I; eps may be (G, 1, 1)."""
    if not isinstance(eps, Tensor) and eps == 0:
        return covariance
    dim = covariance.shape[-1]
    return covariance + eps * torch.eye(dim, dtype=covariance.dtype, device=covariance.device)


def invert_cholesky(covariance: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(L^-1, info) of C = L L^T (G, D, D); `mean` (G, 1, D) is that of the features."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    noise = 10 * torch.finfo(covariance.dtype).eps
    # what is left of a variance below this is rounding, of the elimination or of the mean
    lowest = noise * covariance.diagonal(dim1=-2, dim2=-1)
    if mean is not None:
        lowest = torch.maximum(lowest, (noise * mean[:, 0]).square())
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    info = _info(covariance, (failed == 0) & (pivots > lowest).all(-1))
    fine = (info == FINE)[:, None, None]
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    identity = identity.expand_as(covariance)
    inverse = torch.linalg.solve_triangular(
        torch.where(fine, factor, identity), identity, upper=False
    )
    return torch.where(fine, inverse, torch.nan).contiguous(), info


def invert_root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(C^-1/2, info) of the covariances C (G, D, D)."""
    vectors, roots, info = eigen(covariance)
    return (vectors.mT / roots[:, None]) @ vectors, info


def approximate_root(covariance: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """(P close to C^-1/2, info) of the covariances C (G, D, D), by Newton-Schulz steps."""
    trace = trace_of(covariance)
    info = torch.where(trace.isfinite(), FINE, NOT_FINITE).to(torch.int32).flatten()
    constant = trace == 0
    trace = trace.clamp(min=torch.finfo(covariance.dtype).tiny)
    # what was made of constant features is 0, and so is their gradient
    scale = torch.where(constant, 0.0, trace.rsqrt())
    return newton_schulz(covariance / trace, iterations)[0] * scale, info


def newton_schulz(
    root: Tensor, iterations: int, slope: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `iterations` steps make of S = `root` (G, D, D), close to S^-1/2, and their derivative
    in the direction `slope`."""
    identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    # P <- P (3 I - P P S) / 2 loses P S = S P to rounding and diverges after about 15 steps;
    # the coupled pair Y = S P, P stays stable and costs no more
    inverse, of_root, of_inverse = identity.expand_as(root), slope, torch.zeros_like(root)
    for step in range(iterations):
        factor = 1.5 * identity - 0.5 * (inverse @ root)
        if of_root is not None:
            of_factor = -0.5 * (of_inverse @ root + inverse @ of_root)
            of_inverse = of_factor @ inverse + factor @ of_inverse
            of_root = of_root @ factor + root @ of_factor
        inverse = factor @ inverse
        if step + 1 < iterations:
            root = root @ factor
    return inverse, of_inverse


def trace_of(covariance: Tensor) -> Tensor:
    """(G, 1, 1)."""
    return covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def eigen(covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U^T, square roots of the eigenvalues, info)."""
    finite = torch.isfinite(covariance).all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], covariance, 0.0))
    noise = 10 * torch.finfo(covariance.dtype).eps * values[:, -1]
    info = _info(covariance, values[:, 0] > noise)
    roots = torch.where(info[:, None] == FINE, values, torch.nan).sqrt()
    return vectors.mT.contiguous(), roots, info


def _info(covariance: Tensor, definite: Tensor) -> Tensor:
    finite = torch.isfinite(covariance).all(-1).all(-1)
    info = torch.where(finite, torch.where(definite, FINE, NOT_DEFINITE), NOT_FINITE)
    return info.to(torch.int32)


def less_mean(gradient: Tensor, failed: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient (G, n, D) less its mean over the rows, 0 for the groups that failed (G,), in the
    type `dtype`."""
    gradient = gradient - gradient.mean(1, keepdim=True)
    return gradient.masked_fill_(failed[:, None, None], 0.0).to(dtype)
