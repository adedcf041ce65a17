"""Noise-contrastive estimation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..checks import (
    check_own,
    check_positive,
    check_reduction,
    check_views,
    resolve_scale,
    scalar,
)
from ..distributed import Batch, GroupLike, collective, join
from ..ops import operands, positives, row_dot, softplus_sweep, sweep
from ..sources import NegativeSource
from ..types import Group, Loss, OwnKeys, known, statistics_dtype
from .algebra import add_rows, log_count, number_of, replicated, shared_number, softplus
from .base import ContrastiveLoss, loss
from .stats import pair_stats, tie_limit


@loss
def nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeSource,
    *,
    negatives_mask: Tensor | None = None,
    negatives_per_query: Tensor | None = None,
    temperature: float = 0.07,
    num_data: int,
    Z: float | Tensor | None = None,
    log_z: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    return_stats: bool = False,
) -> Loss:
    """Noise-contrastive estimation (InstDis, Wu et al. 2018, eq. 7; CMC, PIRL).

    With P(s) = exp(s / temperature) / Z and m noise samples, uniform out of num_data,
    loss_i = -log(P_i+ / (P_i+ + m / num_data)) - sum_j log((m / num_data) / (P_ij + m / num_data)),
    computed as softplus of logits with the bias -log Z - log(m / num_data).

    Args:
        query: (N, D).
        key: (N, D), row i is the positive of query i.
        negatives: (m, D) shared, in one tensor or in chunks, or (N, m, D) for each query; with a
            `group` every rank has the shared ones, and mean and Z are over the rows of all ranks.
        negatives_mask: (N, m), bool, of negatives (N, m, D): True where one counts; m is then the
            number of those, for each query.
        negatives_per_query: (N,), of negatives (total, D): how many of them are those of each query
            in turn, its m.
        num_data: size of the data set.
        Z: the normalisation constant, > 0; None: the estimate of this batch (`estimate_log_z`).
            The module `NCE` keeps its first estimate, as InstDis does.
        log_z: its logarithm, which cannot overflow, in place of Z.

    Returns:
        0-d, or (N,) with reduction="none".
    """
    check_reduction(reduction)
    scale = resolve_scale(temperature)
    if log_z is not None:
        log_z = scalar("log_z", log_z)
    elif isinstance(Z, Tensor):
        log_z = scalar("Z", Z).detach().log()
    elif Z is not None:
        check_positive("Z", Z)
        log_z = math.log(Z)
    given = _check(query, key, negatives, negatives_mask, negatives_per_query, num_data, group)
    backend = resolve_backend(backend, query.device)
    batch, keys, others = _join(group, query, given, negatives)
    count = number_of(keys)
    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    if log_z is None:
        log_z = _estimate(query, key, keys, count, scale, num_data, batch, others, options)
    dot, query, _key = positives(query, key, **options)
    bias = math.log(num_data) - log_count(count, torch.float64) - log_z
    pos = (scale * dot + bias).to(dot.dtype)
    of_pairs = bias.unsqueeze(1) if isinstance(bias, Tensor) and bias.dim() else bias
    pairs = operands(query, keys, scale=scale, bias=of_pairs, batch=others, **options)
    threshold = tie_limit(pos, query, key, scale, **options) if return_stats else None
    out = softplus_sweep(pairs, threshold=threshold, summed=reduction != "none")
    value = add_rows(out.value, softplus(-pos), reduction, batch)
    if not return_stats:
        return value
    counts = known(out.counts)
    if isinstance(count, Tensor):  # each row has a bias of its own
        of_rows = torch.as_tensor(bias).to(dot.dtype)
        total = counts.total - (of_rows * counts.pairs).masked_fill(count == 0, 0.0)
        counts, bias = counts._replace(total=total), 0.0
    return value, pair_stats(dot, [counts], scale, batch, bias=bias)


@collective
def estimate_log_z(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeSource,
    *,
    negatives_mask: Tensor | None = None,
    negatives_per_query: Tensor | None = None,
    temperature: float = 0.07,
    num_data: int,
    normalize: bool = True,
    backend: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """log Z of `nce`: log(num_data * mean(exp(s / temperature))) over positives and negatives."""
    scale = resolve_scale(temperature)
    given = _check(query, key, negatives, negatives_mask, negatives_per_query, num_data, group)
    options = {"normalize": normalize, "backend": resolve_backend(backend, query.device)}
    batch, keys, others = _join(group, query, given, negatives)
    found = _estimate(query, key, keys, number_of(keys), scale, num_data, batch, others, options)
    return found.to(statistics_dtype(query))


class NCE(ContrastiveLoss):
    function = staticmethod(nce)
    log_z: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # nan until the first batch; kept as a logarithm, which no dtype overflows
        self.register_buffer("log_z", torch.tensor(float("nan")))
        self._estimated = False
        self.register_load_state_dict_post_hook(_read_estimated)

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor, **options: Any) -> Loss:
        """`nce` with Z kept from the first batch, as InstDis does, unless Z or log_z is given."""
        options = self.at_call(options)
        if options.get("Z") is None and options.get("log_z") is None:
            if not self._estimated:
                shared = {k: v for k, v in options.items() if k not in _NOT_FOR_ESTIMATE}
                estimate = estimate_log_z(query, key, negatives, **shared)
                with torch.no_grad():
                    self.log_z.copy_(estimate)  # in place: DDP and load_state_dict keep the buffer
                self._estimated = True
            options["log_z"] = self.log_z
        return nce(query, key, negatives, **options)


_NOT_FOR_ESTIMATE = ("Z", "log_z", "reduction", "return_stats")


def _read_estimated(module: NCE, _incompatible_keys: Any) -> None:
    module._estimated = not bool(module.log_z.isnan())


Negatives = Tensor | NegativeSource | OwnKeys


def _check(
    query: Tensor,
    key: Tensor,
    negatives: Any,
    mask: Any,
    per_query: Any,
    num_data: int,
    group: GroupLike,
) -> Negatives:
    """The negatives, or raise."""
    n = check_views("query", query, "key", key, whole=group is None)
    found = check_own(query, negatives, mask, per_query, whole=group is None or n > 0)
    check_positive("num_data", num_data)
    return found


def _join(
    group: GroupLike, query: Tensor, keys: Negatives, negatives: Any
) -> tuple[Batch, Negatives, Batch | None]:
    """(batch of the rows, the negatives, what a sweep takes as their batch)"""
    n, m = query.shape[0], shared_number(keys)
    described = negatives if isinstance(keys, OwnKeys) else keys
    batch, others = join(group, n, m, negatives=described, replicated=True)
    return batch, *replicated(keys, n, others)


@torch.no_grad()
def _estimate(
    query: Tensor,
    key: Tensor,
    keys: Negatives,
    count: int | Tensor,
    scale: float | Tensor,
    num_data: int,
    batch: Batch,
    others: Batch | None,
    options: dict[str, Any],
) -> Tensor:
    pos = scale * row_dot(query, key, **options)
    lse = sweep(operands(query, keys, scale=scale, batch=others, **options)).lse
    # float64: each rounding of a large log Z is one of all logits
    total = batch.logsumexp(torch.cat((lse, pos))).double()
    every = batch.total_of(count.sum()) if isinstance(count, Tensor) else batch.total * count
    pairs = batch.total + every
    estimate = total - log_count(pairs, total.dtype) + math.log(num_data)
    return estimate.detach()  # no_grad lets tangents of forward mode through
