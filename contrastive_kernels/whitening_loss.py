"""W-MSE: whitened views that agree."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Loss, LossStats, check_reduction, mean_of, reduce_rows
from .distributed import Group, join
from .ops import check_features, check_ids, statistics_dtype
from .whitening import check_method, whiten
from .whitening_ops import dense_view_distance, permute_rows, view_distance


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
        group: a torch.distributed process group or DeviceMesh. Every rank permutes and whitens its
            own samples, whose number group_size divides; the mean is over all ranks, with the
            gradients that `distributed.py` describes.

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
    check_method(method, eps, group_size, dim, "group_size", "views")
    if permutations is None:
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        permutations = _draw(iterations, n, generator, views.device)
    else:
        check_ids("permutations", permutations, (permutations.shape[0], n))
    permutations = permutations.long()
    shards, _ = join(
        group, "auto", "w_mse", n, views=views.transpose(0, 1), group_size=group_size,
        iterations=permutations.shape[0], eps=eps, method=method, normalize=normalize,
        reduction=reduction, return_stats=return_stats,
    )  # fmt: skip
    views = views.to(statistics_dtype(views))
    distance = view_distance
    if backend == "reference":
        permuted = views.index_select(1, permutations.flatten())
        distance = dense_view_distance
    else:
        permuted = permute_rows(views, permutations)
    groups = permuted.reshape(-1, group_size, dim)
    if n == 0:  # a rank without samples
        z = groups.view(v, 0, dim)
        pairs = z.flatten()
    else:
        z = whiten(groups, method=method, eps=eps, backend=backend).view(v, -1, dim)
        pairs = distance(z, normalize)
    if not normalize:
        pairs = pairs / dim
    if reduction == "none":
        index = permutations.flatten()
        loss = torch.zeros_like(pairs[:n]).index_add(0, index, pairs) / permutations.shape[0]
    else:
        every = None if shards is None else shards.times(permutations.shape[0])
        loss = reduce_rows(pairs, reduction, every)
        if reduction == "sum":
            loss = loss / permutations.shape[0]
    if not return_stats:
        return loss
    squared = pairs if normalize or n == 0 else distance(z.detach(), True)
    return loss, LossStats(positive_similarity=1 - 0.5 * mean_of(squared, shards))


def _draw(
    iterations: int, n: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    source = device if generator is None else generator.device
    drawn = [torch.randperm(n, generator=generator, device=source) for _ in range(iterations)]
    return torch.stack(drawn).to(device)
