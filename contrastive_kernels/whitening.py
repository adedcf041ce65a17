"""Batched whitening of many small groups, with closed-form backwards, and the W-MSE loss on it.

Neither backward differentiates a factorisation: with Z the result and G its gradient,

cholesky  Z = Xc L^-T, M = G^T Z, S = the lower triangle of M mirrored:
          dXc = (G - c Z S) L^-1
zca       C = U diag(s^2) U^T, Zt = Z U, Gt = G U, M = Zt^T Gt, T_ij = (s_i M_ij + s_j M_ji) /
          (s_i + s_j): dXc = ((Gt - c Zt T) / s) U^T, free of 1 / (s_i - s_j)

where c = (1 - eps) / (n - 1); then dX = dXc less its mean over the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .common import Loss, LossStats, check_range, check_reduction, reduce_rows
from .ops import check_features, check_ids, full_precision, resolve_backend, statistics_dtype

METHODS = ("cholesky", "zca", "newton_schulz")


def whiten(
    x: Tensor,
    *,
    method: str = "cholesky",
    eps: float = 0.0,
    iterations: int = 5,
    backend: str = "auto",
) -> Tensor:
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
        backend: "reference" differentiates through the factorisation, and so any number of times;
            all others use the closed-form backward, once.

    Returns:
        (..., n, D), float32, or float64 for float64 `x`; all arithmetic has that precision.

    Raises:
        ValueError: n <= D with eps = 0, or a group whose covariance is not positive definite to
            working precision (not "newton_schulz"); the message names the group. The check reads
            one flag back from the device, on a GPU a synchronisation.
    """
    _check_groups(x)
    n, dim = x.shape[-2:]
    _check_method(method, eps, n, dim, "n", "x")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if resolve_backend(backend, x.device) == "triton" and backend != "auto":
        raise RuntimeError('backend="triton" has no whitening kernels; "auto" runs on any device')
    if backend == "reference":
        with full_precision(x):
            return reference.whiten(x, method=method, eps=eps, iterations=iterations)
    groups = x.to(statistics_dtype(x)).reshape(-1, n, dim)
    if method == "cholesky":
        z = whiten_cholesky(groups, eps)[0]
    elif method == "zca":
        z = whiten_zca(groups, eps)[0]
    else:
        z = _whiten_newton_schulz(groups, eps, iterations)
    return z.view(x.shape)


def w_mse(
    views: Tensor,
    *,
    group_size: int = 128,
    iterations: int = 1,
    eps: float = 0.0,
    method: str = "cholesky",
    permutations: Tensor | None = None,
    generator: torch.Generator | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """W-MSE (Ermolov et al. 2021, eqs. 4, 5): distance of whitened views.

    Each iteration cuts one permutation of the N samples into groups, the same for all views;
    every view of a group is whitened on its own. loss_i = the mean over pairs of views and
    iterations of |z_iv - z_iu|^2 = 2 - 2 cos of the normalised whitened features, or with
    normalize=False of |z_iv - z_iu|^2 / D.

    Args:
        views: (V, N, D), V >= 2.
        group_size: divides N, and above D if eps = 0; twice D is usual.
        iterations: how many permutations to draw.
        eps, method, backend: as in `whiten`.
        permutations: (iterations, N) integers to use instead; each row a permutation of 0..N-1,
            which is not checked.
        generator: source of the drawn permutations.

    Returns:
        0-d, or (N,) with reduction="none", by sample. LossStats has the positive_similarity only:
        the mean cosine of the whitened views.
    """
    check_features("views", views, (3,))
    check_reduction(reduction)
    v, n, dim = views.shape
    if v < 2:
        raise ValueError(f"views must have shape (V, N, D) with V >= 2, got {tuple(views.shape)}")
    if group_size < 1 or n % group_size != 0:
        raise ValueError(f"group_size must divide N = {n}, got {group_size}")
    _check_method(method, eps, group_size, dim, "group_size", "views")
    if permutations is None:
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        permutations = _draw(iterations, n, generator, views.device)
    else:
        check_ids("permutations", permutations, (permutations.shape[0], n))
    groups = views.index_select(1, permutations.flatten()).reshape(-1, group_size, dim)
    z = whiten(groups, method=method, eps=eps, backend=backend).view(v, -1, dim)
    unit = F.normalize(z, dim=-1) if normalize or return_stats else z
    pairs = _mean_pair_distance(unit if normalize else z)
    if not normalize:
        pairs = pairs / dim
    if reduction == "none":
        index = permutations.flatten()
        loss = torch.zeros_like(pairs[:n]).index_add(0, index, pairs) / permutations.shape[0]
    else:
        loss = reduce_rows(pairs, reduction)
        if reduction == "sum":
            loss = loss / permutations.shape[0]
    if not return_stats:
        return loss
    cosine = 1 - 0.5 * _mean_pair_distance(unit.detach()).mean()
    return loss, LossStats(positive_similarity=cosine)


@torch.library.custom_op("contrastive_kernels::whiten_cholesky", mutates_args=())
def whiten_cholesky(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(Z, L^-1) of the groups x (G, n, D)."""
    centered, covariance = _covariance(x, eps)
    factor, info = torch.linalg.cholesky_ex(covariance)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    # what is left of a variance below this is rounding of the elimination
    noise = 10 * torch.finfo(x.dtype).eps * variance
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    _check_definite((info == 0) & (pivots > noise).all(-1))
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return centered @ inverse.mT, inverse.contiguous()


@torch.library.custom_op("contrastive_kernels::whiten_cholesky_backward", mutates_args=())
def whiten_cholesky_backward(grad: Tensor, z: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """Gradient of the groups (G, n, D)."""
    product = grad.mT @ z
    mirrored = product.tril() + product.tril(-1).mT
    shrunk = torch.baddbmm(grad, z, mirrored, alpha=-(1 - eps) / (z.shape[1] - 1))
    centered = shrunk @ inverse
    return centered - centered.mean(1, keepdim=True)


@torch.library.custom_op("contrastive_kernels::whiten_zca", mutates_args=())
def whiten_zca(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(Z, U, square roots of the eigenvalues) of the groups x (G, n, D)."""
    centered, covariance = _covariance(x, eps)
    finite = torch.isfinite(covariance).all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], covariance, 0.0))
    _check_definite(finite & (values[:, 0] > 10 * torch.finfo(x.dtype).eps * values[:, -1]))
    roots = values.sqrt()
    return ((centered @ vectors) / roots[:, None]) @ vectors.mT, vectors.contiguous(), roots


@torch.library.custom_op("contrastive_kernels::whiten_zca_backward", mutates_args=())
def whiten_zca_backward(
    grad: Tensor, z: Tensor, vectors: Tensor, roots: Tensor, eps: float
) -> Tensor:
    """Gradient of the groups (G, n, D)."""
    z, grad = z @ vectors, grad @ vectors
    product = roots[:, :, None] * (z.mT @ grad)
    mixed = (product + product.mT) / (roots[:, :, None] + roots[:, None])
    shrunk = torch.baddbmm(grad, z, mixed, alpha=-(1 - eps) / (z.shape[1] - 1))
    centered = (shrunk / roots[:, None]) @ vectors.mT
    return centered - centered.mean(1, keepdim=True)


def _cholesky_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output)
    ctx.eps = inputs[1]


def _cholesky_backward(ctx, grad: Tensor, _inverse) -> tuple[Tensor, None]:
    return whiten_cholesky_backward(grad, *ctx.saved_tensors, ctx.eps), None


def _zca_backward(ctx, grad: Tensor, _vectors, _roots) -> tuple[Tensor, None]:
    return whiten_zca_backward(grad, *ctx.saved_tensors, ctx.eps), None


def _no_second_order(ctx, *grads):
    raise NotImplementedError('second-order gradients of whiten need backend="reference"')


def _register() -> None:
    whiten_cholesky.register_autograd(_cholesky_backward, setup_context=_cholesky_setup)
    whiten_zca.register_autograd(_zca_backward, setup_context=_cholesky_setup)
    whiten_cholesky.register_fake(lambda x, eps: (torch.empty_like(x), _square(x)))
    whiten_zca.register_fake(
        lambda x, eps: (torch.empty_like(x), _square(x), x.new_empty(x.shape[0], x.shape[2]))
    )
    for backward in (whiten_cholesky_backward, whiten_zca_backward):
        backward.register_fake(lambda grad, *rest: torch.empty_like(rest[0]))
        backward.register_autograd(_no_second_order)
    for operator in (
        whiten_cholesky, whiten_zca, whiten_cholesky_backward, whiten_zca_backward,
    ):  # fmt: skip
        for device in ("cpu", "cuda"):
            operator.register_autocast(device, torch.float32)


def _square(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[2])


_register()


def _whiten_newton_schulz(x: Tensor, eps: float, iterations: int) -> Tensor:
    with full_precision(x):
        centered, covariance = _covariance(x, eps)
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        trace = trace.clamp(min=torch.finfo(x.dtype).tiny)  # constant features stay 0
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        # P <- P (3 I - P P S) / 2 loses P S = S P to rounding and diverges after about 15 steps;
        # the coupled pair Y = S P, P stays stable and costs no more
        root, inverse = covariance / trace, identity.expand_as(covariance)
        for step in range(iterations):
            factor = 1.5 * identity - 0.5 * (inverse @ root)
            inverse = factor @ inverse
            if step + 1 < iterations:
                root = root @ factor
        return (centered @ inverse) * trace.rsqrt()


def _covariance(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Xc and C = (1 - eps) Xc^T Xc / (n - 1) + eps I of the groups x (G, n, D)."""
    centered = x - x.mean(1, keepdim=True)
    covariance = (centered.mT @ centered) * ((1 - eps) / (x.shape[1] - 1))
    if eps > 0:
        covariance = covariance + eps * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    return centered, covariance


def _check_definite(good: Tensor) -> None:
    if not good.all():
        group = int((~good).nonzero()[0, 0])
        raise ValueError(
            f"the covariance of group {group} of {good.shape[0]} is not positive definite: its "
            "features must be finite and linearly independent; use eps > 0, larger groups "
            "or fewer features"
        )


def _check_groups(x: Tensor) -> None:
    if isinstance(x, Tensor) and x.dim() < 2:
        raise ValueError(f"x must have shape (..., n, D), got {tuple(x.shape)}")
    check_features("x", x, (x.dim(),) if isinstance(x, Tensor) else ())
    if x.numel() == 0:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")


def _check_method(method: str, eps: float, n: int, dim: int, size: str, source: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_range("eps", eps, 0.0, 1.0)
    if n < 2 or (eps == 0 and n <= dim):
        raise ValueError(
            f"{size} must be above D = {dim}, the number of features in {source}, so that the "
            f"covariance has full rank (or at least 2 with eps > 0), got {n}"
        )


def _draw(
    iterations: int, n: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    source = device if generator is None else generator.device
    drawn = [torch.randperm(n, generator=generator, device=source) for _ in range(iterations)]
    return torch.stack(drawn).to(device)


def _mean_pair_distance(z: Tensor) -> Tensor:
    """Mean over the pairs of views of |z_v - z_u|^2: (V, N, D) -> (N,), in O(V)."""
    spread = (z - z.mean(0)).square().sum((0, -1))
    return spread * (2 / (z.shape[0] - 1))
