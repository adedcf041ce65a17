"""Losses over the processes of the default group, with the gradients that peers give there.

A peer reports on each rank the mean over the rank's own rows, or that over all; and the features
that a rank gathers carry a gradient home, or they do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..autograd import no_transform
from ..backends import resolve_backend
from ..checks import check_views, scalar
from ..distributed import GroupLike, all_gather, collective, join, world_size
from ..losses.algebra import softplus
from ..losses.info_nce import info_nce
from ..ops import operands, row_dot, sweep
from ..types import known


def group_if(gathers: bool) -> dist.ProcessGroup | None:
    """The default group for a loss that gathers, if it has several processes."""
    if not gathers or world_size() == 1:
        return None
    no_transform("a loss over processes")
    return dist.group.WORLD


def own_mean(rows: Tensor) -> Tensor:
    """The mean of the losses (n,) of this rank's rows; 0 without one."""
    return rows.sum() / max(len(rows), 1)


def reduce_own(rows: Tensor, reduction: str) -> Tensor:
    """`own_mean`, the sum, or with "none" the losses themselves."""
    if reduction == "mean":
        return own_mean(rows)
    return rows.sum() if reduction == "sum" else rows


def whole_loss_inputs(
    features: tuple[Tensor, Tensor],
    logit_scale: float | Tensor,
    *,
    gather_with_grad: bool,
    group: dist.ProcessGroup,
) -> tuple[tuple[Tensor, Tensor], float | Tensor]:
    """Features and scale for a loss of all rows, with the gradients that these have where each
    rank computes the whole loss by itself, as open_clip does with local_loss=False."""
    scale = scalar("logit_scale", logit_scale)
    if isinstance(scale, Tensor):
        scale = _Backward.apply(scale, lambda grad: all_gather(grad.unsqueeze(0), group).mean(0))
    if not gather_with_grad:  # features get their gradient from this rank's loss, not from all
        x, y = (_Backward.apply(t, lambda grad: grad / group.size()) for t in features)
        features = x, y
    return features, scale


@collective
def own_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    gather_with_grad: bool,
    group: GroupLike,
) -> Tensor:
    """The mean `clip_loss` of this rank's pairs, as open_clip has it with local_loss=True: with
    the gradient to the features of all ranks, or as queries against keys without gradient."""
    check_views("image_features", image_features, "text_features", text_features, whole=False)
    loss = _own_pairs if gather_with_grad else _own_queries
    return loss(image_features, text_features, scalar("logit_scale", logit_scale), group)


def _own_pairs(x: Tensor, y: Tensor, scale: float | Tensor, group: GroupLike) -> Tensor:
    """Both directions from one sweep."""
    batch, _ = join(group, len(x))
    backend = resolve_backend("auto", x.device)
    value = scale.detach() if isinstance(scale, Tensor) else scale
    dot = row_dot(x, y, backend=backend)
    ids = batch.own_ids(x.device)
    given = operands(x, y, scale=value, exclude=(ids, ids), backend=backend, batch=batch)
    out = sweep(given, mean=True, columns=True)

    def direction(lse: Tensor, mean: Tensor) -> Tensor:
        # d lse / d scale = mean / scale. The sweep itself would give this rank the gradient of its
        # rows of the matrix, columns of other ranks' pairs among them. A scale is never 0: exp()
        if isinstance(scale, Tensor):
            lse = lse + mean.detach() / value * (scale - value)
        return softplus(lse - scale * dot)

    rows = direction(out.lse, known(out.mean))
    columns = direction(known(out.col_lse), known(out.col_mean))
    return own_mean(rows + columns) / 2


def _own_queries(x: Tensor, y: Tensor, scale: float | Tensor, group: Any) -> Tensor:
    """`group` is the call, which `info_nce` joins."""
    directions = [
        info_nce(
            query, key.detach(), scale=scale, normalize=False, reduction="none", group=group
        )
        for query, key in ((x, y), (y, x))
    ]  # fmt: skip
    return own_mean(directions[0] + directions[1]) / 2


class _Backward(torch.autograd.Function):
    """The tensor itself, with `change` applied to its gradient."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None
