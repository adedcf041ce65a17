"""Whitening and W-MSE in groups."""

import contrastive_kernels as ck

from ..baselines import whitening
from ..baselines.baseline import batched, published
from . import oracle
from .case import Case
from .inputs import Groups, Samples, groups_and_upstream, views_and_permutations
from .operations import w_mse_flops, whiten_flops


def whiten(count: int, rows: int, dim: int, at_most: float) -> Case:
    """So many groups, forward and backward."""
    return Case(
        f"whiten_{dim}",
        "whitening",
        whitening.projected(ck.whiten),
        Groups(count, rows, dim),
        groups_and_upstream,
        oracle.whole(whitening.projected(whitening.whiten_batched)),
        {},
        (
            published(whitening.projected(whitening.whiten_loop)).bounded(at_most),
            batched(whitening.projected(whitening.whiten_batched)).bounded(0.5),
        ),
        whiten_flops,
        frozen=("upstream",),
    )


CASES = (
    whiten(64, 128, 64, 0.25),
    whiten(32, 256, 128, 0.35),
    whiten(16, 512, 256, 0.45),
    Case(
        "w_mse",
        "whitening",
        ck.w_mse,
        Samples(1024, 256, k=4),
        views_and_permutations(4),
        oracle.whole(whitening.w_mse_loop),
        {"group_size": 256},
        (published(whitening.w_mse_loop).bounded(0.3),),
        w_mse_flops,
    ),
)
