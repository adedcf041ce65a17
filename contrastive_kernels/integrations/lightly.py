"""lightly's losses: NTXentLoss with its memory bank, DCLLoss and DCLWLoss.

With `gather_distributed` negatives come from all processes of the default group; the value is the
mean over the rank's own rows, and the gradient, after DDP's mean, that of one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import resolve_backend
from ..losses.info_nce import info_nce
from ..losses.nt_xent import dcl, nt_xent
from ..ops import keeps_frozen_keys
from ..types import statistics_dtype
from ._ranks import group_if, own_mean
from .swap import Peer, Unfused

PEER = Peer("lightly", "lightly", ("1.5.26", "1.7"))
peer: Any = PEER.load("lightly.loss")

ALONE = Unfused("a batch of one pair has no negatives")


@PEER.fused(peer.NTXentLoss)
def _nt_xent(self: Any, out0: Tensor, out1: Tensor) -> Tensor | Unfused:
    scale = 1 / self.temperature
    bank = self.memory_bank
    if bank.size[0] == 0:
        group = group_if(self.gather_distributed)
        if len(out0) == 1 and group is None:
            return ALONE
        return own_mean(nt_xent(out0, out1, scale=scale, reduction="none", group=group))
    # features of the bank are taken as they are
    dtype = statistics_dtype(out0)
    out0, out1 = F.normalize(out0.to(dtype), dim=1), F.normalize(out1.to(dtype), dim=1)
    if bank.bank.dim() == 1:
        bank(out1)  # lightly 1.5 makes a bank of unknown dim when it sees features
    negatives = bank.bank.to(dtype) if dtype == torch.float64 else bank.bank
    if keeps_frozen_keys(out0, negatives, resolve_backend("auto", out0.device)):
        negatives = negatives.clone()  # the queue moves on before the backward pass
    loss = info_nce(out0, out1, negatives=negatives, scale=scale, normalize=False)
    bank(out1, update=out0.requires_grad)
    return loss


@PEER.fused(peer.DCLLoss)
def _dcl(self: Any, out0: Tensor, out1: Tensor) -> Tensor | Unfused:
    group = group_if(self.gather_distributed)
    if len(out0) == 1 and group is None:
        return ALONE
    weight = None
    if self.weight_fn:
        views = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        weight = torch.cat((self.weight_fn(*views), self.weight_fn(*reversed(views))))
    return own_mean(
        dcl(
            out0, out1, scale=1 / self.temperature, weight=weight, reduction="none", group=group
        )
    )  # fmt: skip


class NTXentLoss(peer.NTXentLoss):
    """lightly's `NTXentLoss`, fused: `nt_xent`, or `info_nce` with a memory bank."""

    forward = _nt_xent


class DCLLoss(peer.DCLLoss):
    """lightly's `DCLLoss`, fused: `dcl`."""

    forward = _dcl


class DCLWLoss(peer.DCLWLoss):
    """lightly's `DCLWLoss`, fused: `dcl` with detached weights."""

    forward = _dcl
