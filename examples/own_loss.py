"""A loss of your own on `row_stats`: alignment and uniformity (Wang & Isola 2020), any batch size.

    python examples/own_loss.py [rows]

uniformity = log mean_{i != j} exp(-t |z_i - z_j|^2) runs over all pairs. On the unit sphere
|z_i - z_j|^2 = 2 - 2 <z_i, z_j>, so it is a log-sum-exp of the rows' log-sum-exps, and no matrix of
pairs is ever stored.
"""

import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_kernels as ck


def uniformity(z: Tensor, t: float = 2.0) -> Tensor:
    """log mean_{i != j} exp(-t |z_i - z_j|^2) of z (N, D), normalised inside."""
    n = z.shape[0]
    ids = torch.arange(n, device=z.device)
    lse = ck.row_stats(z, z, scale=2 * t, exclude=(ids, ids), normalize=True).lse
    return lse.logsumexp(0) - 2 * t - math.log(n * (n - 1))


def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """mean_i |z1_i - z2_i|^2 of z1, z2 (N, D), normalised inside."""
    return (F.normalize(z1, dim=-1) - F.normalize(z2, dim=-1)).square().sum(-1).mean()


def main(rows: int = 20_000) -> None:
    z1, z2 = torch.randn(2, rows, 128)
    z1.requires_grad_()
    start = time.perf_counter()
    loss = alignment(z1, z2) + uniformity(z1)
    loss.backward()
    seconds = time.perf_counter() - start
    print(
        f"{rows} x 128: loss {loss.item():.4f}, gradient norm {z1.grad.norm():.2e},"
        f" {seconds:.2f} s; the pairs alone would fill {4e-9 * rows**2:.1f} GB"
    )


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
