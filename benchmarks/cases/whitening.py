"""Whitening and W-MSE in groups."""

from functools import partial

import contrastive_kernels as ck
from contrastive_kernels import reference

from ..baselines import whitening
from ..baselines.baseline import batched, published
from . import oracle
from .case import Case
from .inputs import Groups, Samples, groups_and_upstream, views_and_permutations
from .operations import (
    w_mse_flops,
    whiten_flops,
    whiten_newton_schulz_flops,
    whiten_zca_flops,
)

FLOPS = {"zca": whiten_zca_flops, "newton_schulz": whiten_newton_schulz_flops}
BFLOAT16_AT_MOST = 1.1  # of float32's time: the arithmetic is the same


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
        bfloat16_at_most=BFLOAT16_AT_MOST,
    )


def whiten_by(method: str, count: int, rows: int, dim: int, at_most: float) -> Case:
    """The same with another method, against batched torch and its autograd."""
    definition = whitening.projected(partial(reference.whiten, method=method))
    return Case(
        f"whiten_{method}_{dim}",
        "whitening",
        whitening.projected(partial(ck.whiten, method=method)),
        Groups(count, rows, dim),
        groups_and_upstream,
        oracle.whole(definition),
        {},
        (batched(definition).bounded(at_most),),
        FLOPS[method],
        frozen=("upstream",),
        bfloat16_at_most=BFLOAT16_AT_MOST,
    )


CASES = (
    whiten(64, 128, 64, 0.25),
    whiten(32, 256, 128, 0.35),
    whiten(16, 512, 256, 0.45),
    whiten_by("zca", 64, 128, 64, 0.5),
    whiten_by("zca", 32, 256, 128, 0.7),
    whiten_by("newton_schulz", 64, 128, 64, 0.6),
    whiten_by("newton_schulz", 32, 256, 128, 0.6),
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
        bfloat16_at_most=BFLOAT16_AT_MOST,
    ),
)
