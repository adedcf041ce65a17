"""Losses of two views, whose 2N features are all anchors: NT-Xent and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..checks import (
    check_other_rows,
    check_positive,
    check_range,
    check_reduction,
    check_vector,
    check_views,
    resolve_scale,
)
from ..distributed import Batch, GroupLike, join
from ..ops import Asked, operands, sweeps, swept_positives
from ..types import Group, Loss, Sweep, known
from .algebra import log_count, softplus
from .base import ContrastiveLoss, loss
from .nested import nested, weigh
from .stats import mi_lower_bound, pair_stats, tie_limit


@loss
@nested("z1", "z2")
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.1,
    scale: float | Tensor | None = None,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """NT-Xent (SimCLR; Chen et al. 2020, eq. 1): InfoNCE of 2N anchors with 2N - 2 negatives each.

    loss_i = log(exp(s_i+) + sum_j exp(s_ij)) - s_i+,   s = <z, z> / temperature.

    Args:
        z1, z2: (N, D), two views.
        scale: number or tensor of one element (may be learned), instead of 1 / temperature.

    Returns:
        0-d, or (2N,) with reduction="none": the anchors of z1, then those of z2.
    """
    scale = resolve_scale(temperature, scale)
    check_reduction(reduction)
    views = Views.of(z1, z2, normalize, backend, group, exchange, dots=return_stats, ends=dims)
    dot, pos, out = views.positives_and_negatives(scale, return_stats)
    rows = softplus(out.lse - pos)
    value = views.anchors.reduce_rows(weigh(rows, weights), reduction)
    if not return_stats:
        return value
    stats = pair_stats(dot.repeat(2), [out.counts], scale, views.batch, lse=rows + pos)
    bound = mi_lower_bound(views.batch.mean(rows), views.anchors.total - 2)
    return value, stats._replace(mi_lower_bound=bound)


@loss
def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.1,
    scale: float | Tensor | None = None,
    sigma: float | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """Decoupled contrastive learning (Yeh et al. 2022): the positive leaves the denominator.

    loss_i = log sum_j exp(s_ij) - w_i s_i+ over the 2N - 2 negatives of NT-Xent; w_i = 1, or with
    `sigma` (DCLW) w_i = 2 - N softmax_i(<z1_i, z2_i> / sigma), which is differentiated too.

    Args:
        z1, z2: (N, D), two views; the loss is the mean of both directions.
        scale: number or tensor of one element (may be learned), instead of 1 / temperature.
        sigma: temperature of the weights of DCLW.
        weight: (2N,), other weights w_i in the order of the anchors, instead of `sigma`.

    Returns:
        0-d, or (2N,) with reduction="none": the anchors of z1, then those of z2.
    """
    scale = resolve_scale(temperature, scale)
    check_reduction(reduction)
    if sigma is not None:
        check_positive("sigma", sigma)
        if weight is not None:
            raise ValueError("weight and sigma must not both be given")
    views = Views.of(z1, z2, normalize, backend, group, exchange, weight, dots=return_stats)
    dot, pos, out = views.positives_and_negatives(scale, return_stats)
    if sigma is not None:
        share = views.batch.softmax(pos.chunk(2)[0] / (scale * sigma))
        weight = (2 - views.batch.total * share).repeat(2)
    if weight is not None:
        pos = weight * pos
    value = views.anchors.reduce_rows(out.lse - pos, reduction)
    if not return_stats:
        return value
    return value, pair_stats(dot.repeat(2), [out.counts], scale, views.batch, lse=out.lse)


@loss
def debiased(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    tau_plus: float = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """Debiased contrastive loss (Chuang et al. 2020): `hcl` with beta = 0.

    Args:
        z1, z2: (N, D), two views.
        tau_plus: prior of a negative being of the same class, in [0, 1).
    """
    return hcl(
        z1, z2, temperature=temperature, tau_plus=tau_plus, beta=0.0, normalize=normalize,
        reduction=reduction, backend=backend, group=group, exchange=exchange,
        return_stats=return_stats,
    )  # fmt: skip


@loss
def hcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """Hard negative sampling (Robinson et al. 2021), debiased; no weight is detached.

    loss_i = log(1 + g_i / u_i),   u_i = exp(s_i+),
    g_i = max((R_i - tau_plus n u_i) / (1 - tau_plus), n exp(-1 / temperature)),
    R_i = n sum_j exp((1 + beta) s_ij) / sum_j exp(beta s_ij) over the n = 2N - 2 negatives.

    Args:
        z1, z2: (N, D), two views; the lower limit of g_i assumes unit vectors.
        tau_plus: prior of a negative being of the same class, in [0, 1).
        beta: concentration on hard negatives, >= 0; 0 is the debiased loss.

    Returns:
        0-d, or (2N,) with reduction="none": the anchors of z1, then those of z2.
    """
    scale = resolve_scale(temperature)
    check_reduction(reduction)
    check_range("tau_plus", tau_plus, 0.0, 1.0)
    check_range("beta", beta, 0.0)
    views = Views.of(z1, z2, normalize, backend, group, exchange, dots=return_stats)
    sharp = (1 + beta) * scale
    flat = [beta * scale] if beta > 0 else []
    dot, pos, out, *weights = views.positives_and_negatives(sharp, return_stats, *flat)
    pos = pos / (1 + beta)
    log_n = log_count(views.anchors.total - 2, pos.dtype)
    log_r = out.lse
    for weight in weights:
        log_r = out.lse - weight.lse + log_n
    log_g = _log_debiased(log_r, pos + log_n, tau_plus).clamp(min=log_n - scale)
    value = views.anchors.reduce_rows(softplus(log_g - pos), reduction)
    if not return_stats:
        return value
    return value, pair_stats(dot.repeat(2), [out.counts], sharp, views.batch)


class NTXent(ContrastiveLoss):
    function = staticmethod(nt_xent)


class DCL(ContrastiveLoss):
    function = staticmethod(dcl)


class Debiased(ContrastiveLoss):
    function = staticmethod(debiased)


class HCL(ContrastiveLoss):
    function = staticmethod(hcl)


class Views(NamedTuple):
    """Two views z1, z2 (N, D) of the samples of a batch, for sweeps and nothing else, their
    similarity (N,), unless a sweep is to give its logits, and the batch of their 2N anchors. With
    `ends` sweeps are of prefixes, and give logits and statistics of each."""

    z1: Tensor
    z2: Tensor
    dot: Tensor | None
    aligned: bool
    normalize: bool
    backend: str
    batch: Batch
    anchors: Batch
    ends: Sequence[int] | None = None

    @staticmethod
    def of(
        z1: Tensor,
        z2: Tensor,
        normalize: bool,
        backend: str,
        group: GroupLike,
        exchange: str,
        weight: Tensor | None = None,
        *,
        dots: bool,
        ends: Sequence[int] | None = None,
    ) -> Views:
        """Of arguments of a loss, or raise; `weight` has an entry for each anchor. `dots`: the
        similarity is needed."""
        n = check_views("z1", z1, "z2", z2, whole=group is None)
        if weight is not None:
            check_vector("weight", weight, 2 * n)
        backend = resolve_backend(backend, z1.device)
        batch, _ = join(group, n, exchange=exchange)
        check_other_rows("z1", batch.total)
        aligned, dot, z1, z2 = swept_positives(
            z1, z2, batch, normalize=normalize, backend=backend, dots=dots, one_way=False,
            prefixes=ends is not None,
        )  # fmt: skip
        return Views(z1, z2, dot, aligned, normalize, backend, batch, batch.times(2), ends)

    def sweep_negatives(
        self, scales: Sequence[float | Tensor], threshold: Tensor | None
    ) -> list[Sweep]:
        """Statistics of each of the 2N features against all but itself and its positive, for each
        scale; of the first one those of its positive and above a threshold too."""
        ids = self.anchors.own_ids(self.z1.device, repeat=2)
        options: dict[str, Any] = {
            "more": self.z2, "exclude": (ids, ids), "normalize": self.normalize,
            "backend": self.backend, "batch": self.anchors, "ends": self.ends,
        }  # fmt: skip
        first, *others = scales
        pairs = operands(self.z1, None, scale=first, aligned=self.aligned, **options)
        more = (operands(self.z1, None, scale=scale, **options) for scale in others)
        return sweeps([Asked(pairs, threshold=threshold), *map(Asked, more)])

    def positives_and_negatives(
        self, scale: float | Tensor, ranks: bool, *scales: float | Tensor
    ) -> tuple[Any, ...]:
        """(similarity of the positives (N,) if it is there, their logits (2N,), the sweep over the
        negatives, those with other scales)."""
        pos = None if self.dot is None else scale * self.dot
        limit = None
        if ranks:
            both = self.z1, self.z2
            limit = tie_limit(known(pos), *both, scale, self.normalize, self.backend).repeat(2)
        out, *more = self.sweep_negatives((scale, *scales), limit)
        positive = known(out.partner) if self.aligned else known(pos).repeat(2)
        return self.dot, positive, out, *more


def _log_debiased(log_r: Tensor, log_nu: Tensor, tau_plus: float) -> Tensor:
    """log((R - tau_plus n u) / (1 - tau_plus)), -inf where that is not positive."""
    if tau_plus == 0:
        return log_r
    share = torch.exp((math.log(tau_plus) + log_nu - log_r).clamp(max=0))
    positive = ~(share >= 1)  # NaN stays
    share = torch.where(positive, share, 0.0)  # the log must not see 0, not even in its gradient
    log_g = log_r + torch.log1p(-share) - math.log1p(-tau_plus)
    return torch.where(positive, log_g, -torch.inf)
