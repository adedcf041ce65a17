"""Whitening and W-MSE as public code writes them, and batched in eager torch.

Whitening has no loss of its own: its cases take the product with a random gradient, which comes
with the inputs. Signatures are those of `contrastive_kernels`, restricted to what the cases use.
"""

from collections.abc import Callable
from functools import wraps
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

Whiten = Callable[..., Tensor]


def projected(whiten: Whiten) -> Callable[..., Tensor]:
    """<whiten(x), upstream> of groups (G, n, D): its gradient is the backward of `whiten`."""

    @wraps(whiten)
    def product(x: Tensor, upstream: Tensor, **options) -> Tensor:
        z = whiten(x, **options)
        return torch.dot(z.flatten(), upstream.flatten().to(z.dtype))

    return product


def whiten_group(x: Tensor) -> Tensor:
    """One group (n, D), the operations of the published `Whitening2d`."""
    dim = x.shape[1]
    x = x[:, :, None, None]
    centered = x - x.mean(0).view(dim, -1).mean(-1).view(1, -1, 1, 1)
    columns = centered.permute(1, 0, 2, 3).contiguous().view(dim, -1)
    covariance = torch.mm(columns, columns.permute(1, 0)) / (columns.shape[-1] - 1)
    identity = torch.eye(dim, dtype=x.dtype, device=x.device)
    factor = torch.linalg.cholesky(covariance)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return F.conv2d(centered, inverse.contiguous().view(dim, dim, 1, 1)).squeeze(2).squeeze(2)


def whiten_loop(x: Tensor) -> Tensor:
    """Groups (G, n, D) one after another."""
    return torch.stack([whiten_group(group) for group in x])


def whiten_batched(x: Tensor) -> Tensor:
    """Groups (G, n, D) in batched calls."""
    centered = x - x.mean(1, keepdim=True)
    covariance = centered.mT @ centered / (x.shape[1] - 1)
    factor, _info = torch.linalg.cholesky_ex(covariance)
    return torch.linalg.solve_triangular(factor, centered.mT, upper=False).mT


def w_mse_loop(views: Tensor, *, group_size: int, permutations: Tensor) -> Tensor:
    """The published procedure: loops over iterations, groups, views and pairs of views."""
    count, n, _dim = views.shape
    features = views.flatten(0, 1)
    loss = 0.0
    for permutation in permutations:
        white = torch.empty_like(features)
        for index in permutation.view(-1, group_size):
            for view in range(count):
                white[index + view * n] = whiten_group(features[index + view * n])
        unit = F.normalize(white.view(count, n, -1), dim=-1)
        for first, second in combinations(range(count), 2):
            loss = loss + 2 - 2 * (unit[first] * unit[second]).sum(-1).mean()
    return loss / (len(permutations) * count * (count - 1) / 2)
