"""solo-learn's loss functions and its Whitening2d, by the signatures of its current source.

The methods of solo-learn import these functions by name, so the line to change is that import; the
package itself is not needed here. (Its release 1.0.2 on PyPI is older and has other signatures.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends import runs_dense
from ..distributed import world_size
from ..losses.algebra import softplus
from ..losses.info_nce import info_nce
from ..ops import checked_operands, sweep
from ..whitening import whiten
from ..whitening.operators import dense_view_distance, view_distance


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """mean_i -log(sum_pos exp(s) / (sum_pos exp(s) + sum_neg exp(s))), s = <z, z> / temperature.

    Args:
        z: (V N, D) projected features of all views, normalised here.
        indexes: (V N,) integers; equal ones, of other rows, are positives. With class labels this
            is the supervised form that has its sum inside the logarithm (Khosla et al., eq. 3).

    A row without a positive raises in neither package: it makes the loss inf.
    """
    _one_process()
    own = torch.arange(len(z), dtype=torch.int32, device=z.device)
    given = checked_operands(
        z, None, scale=1 / temperature, normalize=True, exclude=(own, own), keep=(indexes, indexes)
    )
    positives = sweep(given)
    negatives = sweep(given._replace(exclude=(indexes, indexes), keep=None))
    return softplus(negatives.lse - positives.lse).mean()


def mocov2plus_loss_func(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1
) -> Tensor:
    """InfoNCE against a queue (D, K); features and queue are taken as they are."""
    return info_nce(query, key, negatives=queue.T, scale=1 / temperature, normalize=False)


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """2 temperature times InfoNCE among the batch.

    Keys get a gradient only without a process group, as in solo-learn: gathered ones get none.
    """
    _one_process()
    key = key.detach() if dist.is_available() and dist.is_initialized() else key
    return 2 * temperature * info_nce(query, key, scale=1 / temperature)


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE of the nearest neighbours `nn` (N, D) against the predictions `p` (N, D)."""
    return info_nce(nn, p, scale=1 / temperature)


def wmse_loss_func(z1: Tensor, z2: Tensor, simplified: bool = True) -> Tensor:
    """2 - 2 cos of whitened features; `simplified` gives no gradient to z2, as in solo-learn.

    `contrastive_kernels.w_mse` is the whole method, with its permutations and groups.
    """
    distance = dense_view_distance if runs_dense("auto") else view_distance
    return distance(torch.stack((z1, z2.detach() if simplified else z2)), True).mean()


class Whitening2d(nn.Module):
    """Cholesky whitening of a batch (N, output_dim)."""

    def __init__(self, output_dim: int, eps: float = 0.0) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return whiten(x, eps=self.eps)


def _one_process() -> None:
    if world_size() > 1:
        raise NotImplementedError(
            "this loss gathers features of all processes, which is not fused: use solo-learn's own"
        )
