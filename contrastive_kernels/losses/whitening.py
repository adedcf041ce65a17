"""W-MSE and INTL: whitened views that agree."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..autograd import precise
from ..backends import resolve_backend, runs_dense
from ..checks import check_features, check_ids, check_range, check_reduction
from ..distributed import Batch, Shards, join
from ..types import Group, Loss, LossStats, statistics_dtype
from ..whitening.dense import approximate_root
from ..whitening.errors import check as check_info
from ..whitening.operators import (
    PermuteRows,
    dense_view_distance,
    permute_rows,
    permute_rows_backward,
    view_distance,
    whiten_newton_schulz,
)
from ..whitening.whiten import KERNELS, check_method, whiten
from .base import ContrastiveLoss, loss


@loss
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
    group: Group | None = None,
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
        eps, method, backend: as in `whiten`, with its errors; groups are counted by view, then
            iteration.
        permutations: (iterations, N) integers to use instead; each row a permutation of 0..N-1,
            which is not checked.
        generator: source of the drawn permutations.
        group: a torch.distributed process group, a DeviceMesh or "world". Every rank permutes and
            whitens its own samples, whose number group_size divides; the mean is over all ranks,
            with the gradients that `help(ck.info_nce)` describes.

    Returns:
        0-d, or (N,) with reduction="none", by sample. LossStats has the positive_similarity only:
        the mean cosine of the whitened views.
    """
    _check_views(views)
    check_reduction(reduction)
    v, n, dim = views.shape
    if group_size < 1 or n % group_size != 0:
        raise ValueError(f"group_size must divide N = {n}, got {group_size}")
    check_method(method, eps, group_size, dim, "group_size", "views")
    if permutations is None:
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        permutations = _draw(iterations, n, generator, views.device)
    else:
        check_ids("permutations", permutations, (*getattr(permutations, "shape", ())[:1], n))
        if permutations.device != views.device:
            raise ValueError(f"permutations must be on {views.device}, got {permutations.device}")
    permutations = permutations.long()
    drawn, dtype = permutations.shape[0], statistics_dtype(views)
    # gradients of a sample's several places are added up before they are rounded
    samples = views if drawn == 1 else views.to(dtype)
    distance: Callable[[Tensor, bool], Tensor] = view_distance
    dense = runs_dense(backend)
    if dense:
        distance = dense_view_distance
    permuted = _permute(samples, permutations, dense)
    groups = permuted.reshape(-1, group_size, dim)
    if n == 0:  # a rank without samples
        z = groups.view(v, 0, dim).to(dtype)
        pairs = z.flatten()
    else:
        z = whiten(groups, method=method, eps=eps, backend=backend).view(v, -1, dim)
        pairs = distance(z, normalize)
    if not normalize:
        pairs = pairs / dim
    # only now: a rank that cannot whiten its groups tells the others
    batch, _ = join(
        group, n, views=views.transpose(0, 1), permutations=None, generator=None, iterations=drawn
    )
    if reduction == "none":
        value = _permute(pairs.view(1, -1, 1), permutations, dense, back=True).view(n) / drawn
    else:
        value = batch.times(drawn).reduce_rows(pairs, reduction)
        if reduction == "sum":
            value = value / drawn
    if not return_stats:
        return value
    squared = pairs if normalize or n == 0 else distance(z.detach(), True)
    return value, LossStats(positive_similarity=1 - 0.5 * batch.mean(squared))


@loss
def intl(
    views: Tensor,
    *,
    axis: int = 0,
    lam: float | None = None,
    iterations: int = 4,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    return_stats: bool = False,
) -> Loss:
    """INTL (Weng et al. 2024): agreement of iteratively normalised views, with the trace loss.

    t_v = view v after `iterations` steps of IterNorm without eps, TL_v = the sum over its samples
    (axis 0) or features (axis 1) of (variance - 1)^2, which the few steps leave below 1, and
    loss = the mean over v > 0 and samples of 2 - 2 cos(t_v, t_0) + lam (TL_v + TL_0).

    Args:
        views: (V, N, D), V >= 2; the first is the one that all others are compared with.
        axis: what is normalised. 0, the authors' choice: samples, over their features: each is
            centred and has its variance over them, the covariance is (N, N). 1: features, over
            the batch. Neither needs a covariance of full rank.
        iterations: steps of IterNorm, at least 1.
        lam: factor of the trace losses; None: 0.01 (log2 s - 3), s = N on axis 0 and D on axis 1;
            below 0 where s < 8.

    Returns:
        0-d, or (N,) with reduction="none": the distance of each sample, plus the trace losses,
        which all share. LossStats has the positive_similarity only: the mean cosine.

    Raises:
        ValueError: an argument that does not fit; also a view whose covariance is not finite, with
            the delay of `whiten`.
        TypeError: views that are no floating tensor.
        RuntimeError: a backend that cannot run here; kernels are those of "newton_schulz" on a
            CPU, without a group, whose sums of covariances are left to PyTorch.

    Formula and defaults are those of the authors' code (winci-ai/INTL), which gathers the batches
    of all processes first: with a `group` statistics are those of all ranks' samples, from sums of
    (D, D) covariances, or on axis 0, where there are fewer samples than features, from gathered
    views.
    """
    _check_views(views)
    check_reduction(reduction)
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 (samples) or 1 (features), got {axis!r}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if lam is not None:
        check_range("lam", lam, 0.0)
    resolve_backend(
        backend, views.device, kernels=KERNELS["newton_schulz"] if group is None else ()
    )
    batch, _ = join(group, views.shape[1], views=views.transpose(0, 1))
    sizes = batch.total, views.shape[2]
    count = sizes[1 - axis]  # of what a variance is taken over
    if count < 2:
        raise ValueError(
            f"views must have at least 2 {'samples' if axis else 'features'} with axis={axis}, "
            f"got shape {tuple(views.shape)}"
        )
    if lam is None:
        lam = 0.01 * (math.log2(sizes[axis]) - 3)
    cosine, trace = _cosine_and_trace(views, axis, iterations, backend, batch, count)
    rows = 2 - 2 * cosine + lam * trace
    value = batch.reduce_rows(rows, reduction)
    if not return_stats:
        return value
    return value, LossStats(positive_similarity=batch.mean(cosine))


class WMSE(ContrastiveLoss):
    function = staticmethod(w_mse)


class INTL(ContrastiveLoss):
    function = staticmethod(intl)


@precise
def _cosine_and_trace(
    views: Tensor, axis: int, iterations: int, backend: str, batch: Batch, count: int
) -> tuple[Tensor, Tensor]:
    """(the mean cosine of each sample (N,), the trace losses that all share) of `intl`; variances
    are over `count` numbers."""
    if isinstance(batch, Shards):  # which adds gradients up
        views = views.to(statistics_dtype(views))
        z = _normalize_over_ranks(views, axis, iterations, backend, batch)
    else:
        z = _normalize_iteratively(views, axis, iterations, backend)
    variance = z.square().sum(2 - axis) / (count - 1)
    if axis == 1:
        variance = batch.sum(variance)
    trace_losses = (variance - 1).square().sum(1)
    if axis == 0:
        trace_losses = batch.sum(trace_losses)
    unit = F.normalize(z, dim=-1)
    return (unit[1:] * unit[0]).sum(-1).mean(0), trace_losses[1:].mean() + trace_losses[0]


def _normalize_iteratively(x: Tensor, axis: int, iterations: int, backend: str) -> Tensor:
    """The views x (V, N, D) after IterNorm along `axis`."""
    groups = x if axis == 1 else x.mT
    if runs_dense(backend):
        z = reference.whiten(groups, method="newton_schulz", iterations=iterations)
    else:
        z, _covariance, info = whiten_newton_schulz(groups, 0.0, iterations, backend)
        check_info(info)
    return z if axis == 1 else z.mT


def _normalize_over_ranks(
    x: Tensor, axis: int, iterations: int, backend: str, batch: Batch
) -> Tensor:
    """The same of this rank's part x (V, n, D) of the views."""
    if axis == 0 and batch.total <= x.shape[2]:  # few samples of many features
        views = batch.gather_keys(x.transpose(0, 1)).transpose(0, 1)
        return _normalize_iteratively(views, axis, iterations, backend)[:, batch.own]
    # P(X X^T) X = X P(X^T X), so that the covariances of features, which are sums over the ranks,
    # serve axis 0 too
    if axis == 0:
        centered, count = x - x.mean(2, keepdim=True), x.shape[2]
    else:
        count = batch.total
        centered = x - batch.sum(x.sum(1, keepdim=True)) / count
    covariance = batch.sum(centered.mT @ centered) / (count - 1)
    matrix, info = approximate_root(covariance, iterations)
    check_info(info)
    return centered @ matrix


def _check_views(views: Tensor) -> None:
    check_features("views", views, (3,))
    if views.shape[0] < 2:
        raise ValueError(f"views must have shape (V, N, D) with V >= 2, got {tuple(views.shape)}")


def _permute(x: Tensor, permutations: Tensor, dense: bool, back: bool = False) -> Tensor:
    if dense and not torch.compiler.is_compiling():  # which takes no forward mode
        return PermuteRows.apply(x, permutations, back)
    return (permute_rows_backward if back else permute_rows)(x, permutations)


def _draw(
    iterations: int, n: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    source = device if generator is None else generator.device
    drawn = [torch.randperm(n, generator=generator, device=source) for _ in range(iterations)]
    return torch.stack(drawn).to(device)
