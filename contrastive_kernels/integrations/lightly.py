"""lightly's losses: NTXentLoss with its memory bank, DCLLoss, DCLWLoss, KoLeoLoss, and WMSELoss
with its Whitening2d; and NNCLR's support set, NNMemoryBankModule.

Before 1.5.21 DCLLoss adds the log-sum-exps of the two views, where later there is one of both.
Before 1.6 WMSELoss and Whitening2d cannot be made: they ask torch for solve_triangular in vain.

With `gather_distributed` negatives come from all processes of the default group; the value is the
mean over the rank's own rows, and the gradient, after DDP's mean, that of one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import resolve_backend
from ..losses.info_nce import info_nce
from ..losses.koleo import koleo
from ..losses.nt_xent import dcl, nt_xent
from ..losses.whitening import w_mse
from ..ops import checked_operands, keeps_frozen_keys, row_dot, sweep, top_k
from ..types import statistics_dtype
from ..whitening import whiten
from ._own import Own, cross_entropy, one_entry
from ._ranks import group_if, own_mean, reduce_own
from .swap import Peer, Unfused

PEER = Peer("lightly", "lightly", ("1.5.20", "1.7"))
peer: Any = PEER.load("lightly.loss")
banks: Any = PEER.load("lightly.models.modules.memory_bank")
nearest: Any = PEER.load("lightly.models.modules.nn_memory_bank")
ranks: Any = PEER.load("lightly.utils.dist")
whitened: Any = PEER.load("lightly.loss.wmse_loss")

ALONE = Unfused("a batch of one pair has no negatives")
RUNNING = Unfused("running statistics whiten in evaluation", expected=True)


_RANKS = Own(ranks, "world_size", "rank", "gather", "eye_rank")
NT_XENT = Own(
    peer.NTXentLoss,
    parts={
        "memory_bank": Own(
            banks.MemoryBankModule, "forward", options={"feature_dim_first": (True,)}
        ),
        "cross_entropy": cross_entropy("mean", "sum", "none", label_smoothing=True),
    },
    beside=[_RANKS],
)
DCL = Own(peer.DCLLoss, "_loss", beside=[_RANKS])
JOINT = PEER.since("1.5.21")


@PEER.fused(peer.NTXentLoss, own=NT_XENT)
def _nt_xent(self: Any, out0: Tensor, out1: Tensor) -> Tensor | Unfused:
    reason = one_entry(temperature=self.temperature)
    if reason is not None:
        return Unfused(reason)
    scale = 1 / self.temperature
    bank, smoothing = self.memory_bank, self.cross_entropy.label_smoothing
    if bank.size[0] == 0:
        group = group_if(self.gather_distributed)
        if len(out0) == 1 and group is None:
            return ALONE
        if smoothing and group is not None:
            return Unfused("cross_entropy.label_smoothing over several processes")
        rows = nt_xent(out0, out1, scale=scale, reduction="none", group=group)
        if smoothing:
            rows = rows + smoothing * scale * _above_other_rows(out0, out1)
        return reduce_own(rows, self.cross_entropy.reduction)
    # features of the bank are taken as they are
    dtype = statistics_dtype(out0)
    out0, out1 = F.normalize(out0.to(dtype), dim=1), F.normalize(out1.to(dtype), dim=1)
    if bank.bank.dim() == 1:
        bank.forward(out1)  # lightly 1.5 makes a bank of unknown dim when it sees features
    negatives = bank.bank.to(dtype) if dtype == torch.float64 else bank.bank
    if keeps_frozen_keys(out0, negatives, resolve_backend("auto", out0.device)):
        negatives = negatives.clone()  # the queue moves on before the backward pass
    rows = info_nce(
        out0, out1, negatives=negatives, scale=scale, normalize=False, reduction="none"
    )  # fmt: skip
    if smoothing:
        rows = rows + smoothing * scale * _above_negatives(out0, out1, negatives)
    bank.forward(out1, update=out0.requires_grad)
    return reduce_own(rows, self.cross_entropy.reduction)


@PEER.fused(peer.DCLLoss, own=DCL)
def _dcl(self: Any, out0: Tensor, out1: Tensor) -> Tensor | Unfused:
    reason = one_entry(temperature=self.temperature)
    if reason is not None:
        return Unfused(reason)
    group = group_if(self.gather_distributed)
    if len(out0) == 1 and group is None:
        return ALONE
    if group is not None and not JOINT:
        return Unfused("DCLLoss over several processes, before 1.5.21")
    weight = None
    if self.weight_fn:
        views = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        both = [_row_weights(self.weight_fn(*pair), views[0]) for pair in (views, reversed(views))]
        if any(len(weights) != len(out0) or weights.dim() != 1 for weights in both):
            return Unfused("weight_fn does not give a weight of each row")
        weight = torch.cat(both)
    if not JOINT:
        return _separate_dcl(out0, out1, 1 / self.temperature, weight).mean()
    return own_mean(
        dcl(
            out0, out1, scale=1 / self.temperature, weight=weight, reduction="none", group=group
        )
    )  # fmt: skip


def _separate_dcl(
    out0: Tensor, out1: Tensor, scale: float | Tensor, weight: Tensor | None
) -> Tensor:
    """(2N,), of both views: -w z+ + log sum_j exp(z) over the other rows of the own view
    + the same of the other view."""
    ids = torch.arange(len(out0), dtype=torch.int32, device=out0.device)
    options: dict[str, Any] = {"scale": scale, "normalize": True, "exclude": (ids, ids)}
    rows = [
        sweep(checked_operands(view, None, **options)).lse
        + sweep(checked_operands(view, other, **options)).lse
        for view, other in ((out0, out1), (out1, out0))
    ]
    dot = row_dot(out0, out1, normalize=True, backend=resolve_backend("auto", out0.device))
    positive = (scale * dot).repeat(2)
    return torch.cat(rows) - (positive if weight is None else weight * positive)


def _row_weights(weights: Any, like: Tensor) -> Tensor:
    """Weights of the rows of `like`, from one of all of them too."""
    weights = weights if isinstance(weights, Tensor) else like.new_tensor(weights)
    one = weights.numel() == 1 and weights.dim() < 2
    return weights.expand(len(like)) if one else weights


WHITENING = Own(whitened.Whitening2d)


@PEER.fused(whitened.Whitening2d, own=WHITENING)
def _whitening(self: Any, x: Tensor) -> Tensor | Unfused:
    if self.track_running_stats and not self.training:
        return RUNNING
    if x.dim() != 2 or x.shape[1] != self.num_features:
        return Unfused("the input is not (N, num_features)")
    z = whiten(x, eps=self.eps)
    _keep_running_stats(self, x.unsqueeze(0))
    return z.to(x.dtype)


W_MSE = Own(
    whitened.WMSELoss,
    functions={"loss_f": [whitened.norm_mse_loss]},
    parts={
        "whitening": Own(
            whitened.Whitening2d,
            functions={"forward": [whitened.Whitening2d.forward, _whitening]},
            called=True,
        )
    },
)


@PEER.fused(whitened.WMSELoss, own=W_MSE)
def _w_mse(self: Any, input: Tensor) -> Tensor | Unfused:
    layer, size = self.whitening, self.w_size
    if layer.track_running_stats and not layer.training:
        return RUNNING
    n = len(input) // self.num_samples
    if len(input) % self.num_samples or n % size or n < size or self.num_samples < 2:
        return Unfused("the batch is not whole groups of w_size samples of each view")
    if input.dim() != 2 or input.shape[1] != layer.num_features:
        return Unfused("the input is not (N, embedding_dim)")
    drawn = torch.stack([torch.randperm(n) for _ in range(self.w_iter)])
    views = input.view(self.num_samples, n, -1)
    groups = drawn.to(input.device)
    loss = w_mse(views, group_size=size, permutations=groups, eps=layer.eps)
    # in the peer's order: iterations, groups, views
    places = (
        groups.view(-1, 1, size) + n * torch.arange(self.num_samples, device=groups.device)[:, None]
    )
    _keep_running_stats(layer, input[places.view(-1, size)])
    return loss


@torch.no_grad()
def _keep_running_stats(layer: Any, groups: Tensor) -> None:
    """Move the running mean and covariance by the statistics of groups (K, n, D), one after the
    other."""
    if not (layer.training and layer.track_running_stats):
        return
    groups = groups.detach().to(statistics_dtype(groups))
    count, momentum = len(groups), layer.momentum
    left = (1 - momentum) ** torch.arange(count - 1, -1, -1, device=groups.device).to(groups)
    mean = groups.mean(1, keepdim=True)
    rows = groups - mean
    covariance = torch.einsum("k,knd,kne->de", left, rows, rows) / (groups.shape[1] - 1)
    new = (left @ mean.squeeze(1)).view_as(layer.running_mean), covariance
    for running, value in zip((layer.running_mean, layer.running_variance), new, strict=True):
        running.mul_((1 - momentum) ** count).add_(momentum * value)


DISTANCE = Own(
    nn.PairwiseDistance, "forward", options={"norm": (2,), "keepdim": (False,)}, called=True
)


@PEER.fused(peer.KoLeoLoss, own=Own(peer.KoLeoLoss, parts={"pairwise_distance": DISTANCE}))
def _koleo(self: Any, x: Tensor) -> Tensor | Unfused:
    eps = self.eps
    if not (isinstance(eps, float | int) and eps > 0 and self.pairwise_distance.eps == eps):
        return Unfused("eps is not one number > 0")
    if x.dim() != 2 or len(x) < 2:
        return Unfused("x is not (N, D) of at least 2 rows")
    return koleo(F.normalize(x.to(statistics_dtype(x)), eps=eps), eps=eps, normalize=False)


@PEER.fused(nearest.NNMemoryBankModule, own=Own(nearest.NNMemoryBankModule))
def _nearest(self: Any, output: Tensor, update: bool = False) -> Tensor | Unfused:
    if self.size[0] == 0 or output.dim() != 2 or torch.float64 in (output.dtype, self.bank.dtype):
        return Unfused("output is not (N, D), of at most 32 bits, beside a bank of such")
    output, bank = super(nearest.NNMemoryBankModule, self).forward(output, update=update)
    bank = bank.to(output.device).t()
    ids = top_k(output.detach(), bank, 1).ids
    return bank.index_select(0, ids.flatten())


# Label smoothing e makes a loss (1 - e) (lse - z+) + e mean_j (lse - z_j) of its logits z, which is
# lse - z+ + e (z+ - mean_j z_j): these give the similarity of the positive above the mean of all.


def _above_other_rows(out0: Tensor, out1: Tensor) -> Tensor:
    """(2N,), of both views."""
    dtype = statistics_dtype(out0)
    views = F.normalize(out0.to(dtype), dim=1), F.normalize(out1.to(dtype), dim=1)
    z = torch.cat(views)
    others = z @ z.sum(0) - z.square().sum(1)
    return (views[0] * views[1]).sum(1).repeat(2) - others / (len(z) - 1)


def _above_negatives(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
    """(N,), of unit vectors against negatives (M, D)."""
    positive = (query * key).sum(1)
    total = negatives.to(query.dtype).sum(0)
    return positive - (positive + query @ total) / (1 + len(negatives))


class NTXentLoss(peer.NTXentLoss):
    """lightly's `NTXentLoss`, fused: `nt_xent`, or `info_nce` with a memory bank."""

    forward = _nt_xent


class DCLLoss(peer.DCLLoss):
    """lightly's `DCLLoss`, fused: `dcl`."""

    forward = _dcl


class DCLWLoss(peer.DCLWLoss):
    """lightly's `DCLWLoss`, fused: `dcl` with detached weights."""

    forward = _dcl


class KoLeoLoss(peer.KoLeoLoss):
    """lightly's `KoLeoLoss`, fused: `koleo`."""

    forward = _koleo


class NNMemoryBankModule(nearest.NNMemoryBankModule):
    """lightly's `NNMemoryBankModule`, fused: `top_k`."""

    forward = _nearest


class Whitening2d(whitened.Whitening2d):
    """lightly's `Whitening2d`, fused: `whiten`."""

    forward = _whitening


class WMSELoss(whitened.WMSELoss):
    """lightly's `WMSELoss`, fused: `w_mse`."""

    forward = _w_mse
