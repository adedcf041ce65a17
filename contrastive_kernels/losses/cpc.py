"""Contrastive predictive coding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import once_differentiable
from ..backends import resolve_backend
from ..checks import (
    check_choice,
    check_features,
    check_pair,
    check_reduction,
    check_same_rows,
    resolve_scale,
)
from ..distributed import Batch, join
from ..ops import can_tie, operands, positives, sweep
from ..types import Group, IdPair, Loss
from .algebra import softplus
from .base import ContrastiveLoss, loss
from .stats import mi_lower_bound, norm, pair_stats, tie_limit

SOURCES = ("sequences", "times", "both")


@loss
def cpc(
    predictions: Tensor,
    targets: Tensor,
    *,
    negatives_from: str = "both",
    temperature: float = 1.0,
    scale: float | Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """CPC (van den Oord et al. 2018, eq. 4): InfoNCE of predictions of a sequence's own future.

    loss_nts = -log(exp(z_+) / (exp(z_+) + sum_j exp(z_j))),   z = <prediction, target> /
    temperature, z_+ for prediction (n, t, s) and the target of sequence n at time t + s + 1, over
    the (t, s) whose target there is, t + s + 1 < T.

    Args:
        predictions: (N, T, S, D), from each time those of S steps ahead, already projected (W_s c_t
            in the paper).
        targets: (N, T, D), the encoded z_t.
        negatives_from: "sequences": the targets of all times of other sequences; "times": those of
            other times of the same one; "both".
        scale: number or tensor of one element (may be learned), instead of 1 / temperature.

    Returns:
        0-d, the mean over all predictions with a target; or with reduction="none" one loss for each
        of them, (N, P): by step, then by time. LossStats has their rank and lse, (N P,).
    """
    whole = group is None  # else the rank's part may be empty
    check_features("predictions", predictions, (4,), whole=whole)
    check_features("targets", targets, (3,), whole=whole)
    check_pair(predictions, targets, "predictions", "targets")
    check_same_rows("predictions", predictions, "targets", targets)
    n, times, dim = targets.shape
    if predictions.shape[1] != times:
        raise ValueError(
            f"predictions must have the {times} times of targets, got {predictions.shape[1]}"
        )
    steps = min(predictions.shape[2], times - 1)
    if steps < 1:
        raise ValueError(
            "predictions and targets must have at least 1 step and 2 times, got shapes "
            f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        )
    check_choice("negatives_from", negatives_from, SOURCES)
    check_reduction(reduction)
    scale = resolve_scale(temperature, scale)
    backend = resolve_backend(backend, targets.device)
    batch, _ = join(group, n, exchange=exchange)
    if negatives_from == "sequences" and batch.total < 2:
        raise ValueError('negatives_from="sequences" needs at least 2 sequences, got 1')

    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    queries = _queries(predictions, steps, backend)
    count = queries.shape[1]
    numbers = torch.arange(n * times, device=targets.device).view(n, times)
    which = _of_queries(numbers, steps).flatten()
    x, y = queries.flatten(0, 1), targets.flatten(0, 1)
    dot, x, y = positives(x, y, which=which, **options)
    pos = scale * dot
    every_target = batch.times(times)
    exclude, keep = _ids(batch, every_target, times, steps, negatives_from, targets.device)
    pairs = operands(x, y, scale=scale, exclude=exclude, keep=keep, batch=every_target, **options)
    threshold = None
    if return_stats:
        size = None if normalize else torch.as_tensor(scale).abs() * norm(x) * norm(y)[which]
        threshold = tie_limit(pos, x, y, scale, size=size, **options)
    out = sweep(pairs, threshold=threshold)
    rows = softplus(out.lse - pos)
    every_query = batch.times(count)
    value = every_query.reduce_rows(rows.view(n, count), reduction)
    if not return_stats:
        return value
    stats = pair_stats(dot, [out.counts], scale, every_query, lse=rows + pos)
    every = every_target.total
    sizes = {"sequences": every - times, "times": times - 1, "both": every - 1}
    bound = mi_lower_bound(every_query.mean(rows), sizes[negatives_from])
    return value, stats._replace(mi_lower_bound=bound)


class CPC(ContrastiveLoss):
    function = staticmethod(cpc)


def _queries(predictions: Tensor, steps: int, backend: str) -> Tensor:
    """The predictions (N, T, S, D) that have a target, (N, P, D): by step, then by time."""
    if can_tie(backend, predictions, 0) and predictions.requires_grad:
        return _Queries.apply(predictions, steps)
    return torch.cat(_with_target(predictions, steps), 1)


def _with_target(of_predictions: Tensor, steps: int) -> list[Tensor]:
    times = of_predictions.shape[1]
    return [of_predictions[:, : times - 1 - s, s] for s in range(steps)]


class _Queries(torch.autograd.Function):
    """`_queries`, whose gradient autograd would lay out whole for every step."""

    @staticmethod
    def forward(ctx: Any, predictions: Tensor, steps: int) -> Tensor:
        ctx.shape, ctx.steps = predictions.shape, steps
        return torch.cat(_with_target(predictions, steps), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.new_zeros(ctx.shape)
        start = 0
        for part in _with_target(total, ctx.steps):
            part.copy_(grad[:, start : start + part.shape[1]])
            start += part.shape[1]
        return total, None


def _of_queries(of_targets: Tensor, steps: int) -> Tensor:
    """What belongs to the targets (N, T, ...), for each query: (N, P, ...)."""
    return torch.cat([of_targets[:, s + 1 :] for s in range(steps)], 1)


def _ids(
    batch: Batch,
    every_target: Batch,
    times: int,
    steps: int,
    negatives_from: str,
    device: torch.device,
) -> tuple[IdPair | None, IdPair | None]:
    """(exclude, keep) of queries and targets: by sequence, or by the target itself."""
    sequences = batch.own_ids(device).repeat_interleave(times)
    of_queries = _of_queries(sequences.view(-1, times), steps).flatten()
    if negatives_from == "sequences":
        return (of_queries, sequences), None
    own = every_target.own_ids(device)
    exclude = (_of_queries(own.view(-1, times), steps).flatten(), own)
    return exclude, (of_queries, sequences) if negatives_from == "times" else None
