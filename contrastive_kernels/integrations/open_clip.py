"""open_clip's losses: ClipLoss, CoCaLoss, DistillClipLoss and SigLipLoss.

`patch("open_clip", "ClipLoss")` serves CoCaLoss too, whose contrastive part is ClipLoss.forward.
Over several processes each loss has the value and gradients of open_clip's switches, or with
`grad_scale="exact"`, an option of ours, those of one process with the whole batch, whatever the
switches say (gradients after DDP's mean). docs/integrations.md has the table.

Since 2.32 ClipLoss takes a logit_bias; else the losses of all versions are the same.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from ..checks import scalar
from ..distributed import world_size
from ..losses.clip import clip_loss, siglip_loss
from ..losses.clip_distill import clip_distill
from ..types import Group
from ._own import Own, one_entry
from ._ranks import group_if, own_clip_loss, own_mean, whole_loss_inputs
from .swap import Peer, Unfused, check_option

PEER = Peer("open_clip", "open_clip_torch", ("2.30", "3.4"))
HAS_BIAS = PEER.since("2.32")
peer: Any = PEER.load("open_clip.loss")

C = TypeVar("C", bound=type)
LossOrDict = Tensor | dict[str, Tensor] | Unfused
GRAD_SCALES = ("peer", "exact")

_LOGITS = ("get_logits", "get_ground_truth")
_GATHER = Own(peer, "gather_features")
_EXCHANGE = Own(peer, "neighbour_exchange_with_grad", "neighbour_exchange_bidir_with_grad")
CLIP = Own(peer.ClipLoss, *_LOGITS, beside=[_GATHER])
DISTILL = Own(peer.DistillClipLoss, *_LOGITS, "dist_loss", beside=[_GATHER])
SIGLIP = Own(peer.SigLipLoss, *_LOGITS, "_loss", beside=[_EXCHANGE])


def _refuse(loss: Any, unfused: Unfused) -> None:
    """The peer's own code cannot give exact gradients over processes."""
    if loss.world_size > 1 and _exact(loss):
        raise RuntimeError(
            f'grad_scale="exact" must run fused over processes, but {unfused.reason}'
        )


@PEER.fused(peer.ClipLoss, own=CLIP, refuse=_refuse, grad_scale=GRAD_SCALES)
def _clip(
    self: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    output_dict: bool = False,
) -> LossOrDict:
    if not HAS_BIAS and logit_bias is not None:
        if not isinstance(logit_bias, bool):
            return Unfused("ClipLoss has no logit_bias before 2.32")
        output_dict = logit_bias  # the fourth argument
        logit_bias = None
    reason = _reason(self, logit_scale=logit_scale, logit_bias=logit_bias)
    reason = reason or _no_negatives(self, image_features)
    if reason is not None:
        return Unfused(reason)
    features, scale, group = (image_features, text_features), logit_scale, _group(self)
    switched = group is not None and not _exact(self)
    options = {"group": group, "gather_with_grad": self.gather_with_grad}
    if switched and self.local_loss:
        loss = own_clip_loss(*features, scale, **options)
    else:
        if switched:
            features, scale = whole_loss_inputs(features, scale, **options)
        loss = clip_loss(*features, scale, normalize=False, group=group)
    if isinstance(logit_bias, Tensor):
        # it cancels in the softmax; a parameter must still get its gradient, of 0
        loss = loss + 0.0 * logit_bias.reshape(()).to(loss)
    _cache_labels(self, image_features)
    return {"contrastive_loss": loss} if output_dict else loss


@PEER.fused(peer.DistillClipLoss, own=DISTILL, refuse=_refuse, grad_scale=GRAD_SCALES)
def _distill(
    self: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    dist_image_features: Tensor,
    dist_text_features: Tensor,
    dist_logit_scale: float | Tensor,
    output_dict: bool = False,
) -> tuple[Tensor, Tensor] | dict[str, Tensor] | Unfused:
    reason = _reason(self, logit_scale=logit_scale, dist_logit_scale=dist_logit_scale)
    reason = reason or _no_negatives(self, image_features)
    group = _group(self)
    switched = group is not None and not _exact(self)
    if switched and self.local_loss:
        reason = reason or "distillation with local_loss over several processes"
    if reason is not None:
        return Unfused(reason)
    student = (image_features, text_features), scalar("logit_scale", logit_scale)
    teacher = (dist_image_features, dist_text_features), dist_logit_scale
    if switched:
        options = {"group": group, "gather_with_grad": self.gather_with_grad}
        student, teacher = (whole_loss_inputs(*model, **options) for model in (student, teacher))
    (features, scale), (dist_features, dist_scale) = student, teacher
    contrastive = clip_loss(*features, scale, normalize=False, group=group)
    distill = clip_distill(
        *features, scale, *dist_features, dist_scale, normalize=False, group=group
    )
    _cache_labels(self, image_features)
    if output_dict:
        return {"contrastive_loss": contrastive, "distill_loss": distill}
    return contrastive, distill


@PEER.fused(peer.SigLipLoss, own=SIGLIP, refuse=_refuse, grad_scale=GRAD_SCALES)
def _siglip(
    self: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    output_dict: bool = False,
) -> LossOrDict:
    reason = _reason(self, logit_scale=logit_scale, logit_bias=logit_bias)
    if reason is not None:
        return Unfused(reason)
    bias = 0.0 if logit_bias is None else logit_bias
    inputs = image_features, text_features, logit_scale, bias
    group = _group(self)
    if group is None or _exact(self):
        loss = siglip_loss(*inputs, normalize=False, group=group)
    else:  # exact too, but the value is that of own images
        rows = siglip_loss(*inputs, normalize=False, reduction="none", group=group)
        loss = own_mean(rows)
    return {"contrastive_loss": loss} if output_dict else loss


def _with_grad_scale(cls: C) -> C:
    """Gives the constructor of `cls` the option grad_scale."""
    owner: Any = cls
    init = owner.__init__

    def __init__(self: Any, *args: Any, grad_scale: str = "peer", **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.grad_scale = check_option("grad_scale", grad_scale, GRAD_SCALES)

    owner.__init__ = __init__
    return cls


@_with_grad_scale
class ClipLoss(peer.ClipLoss):
    """open_clip's `ClipLoss`, fused: `clip_loss`.

    grad_scale: "peer" or "exact", see the module.
    """

    forward = _clip


@_with_grad_scale
class CoCaLoss(peer.CoCaLoss, ClipLoss):
    """open_clip's `CoCaLoss`, its contrastive part fused: `clip_loss`.

    grad_scale: "peer" or "exact", of the contrastive part, see the module.
    """


@_with_grad_scale
class DistillClipLoss(peer.DistillClipLoss):
    """open_clip's `DistillClipLoss`, fused: `clip_loss` and `clip_distill`.

    grad_scale: "peer" or "exact", see the module.
    """

    forward = _distill


@_with_grad_scale
class SigLipLoss(peer.SigLipLoss):
    """open_clip's `SigLipLoss`, fused: `siglip_loss`.

    grad_scale: "peer" or "exact", see the module. The gradients are the same with both.
    """

    forward = _siglip


def _reason(loss: Any, **scalars: Any) -> str | None:
    """Why `loss` has to run its own code, or None."""
    if loss.world_size > 1:
        if getattr(loss, "use_horovod", False):
            return "features are gathered by horovod"
        if loss.world_size != world_size() or loss.rank != dist.get_rank():
            return "rank and world_size are not those of the default process group"
    return one_entry(**scalars)


def _group(loss: Any) -> Group | None:
    return group_if(loss.world_size > 1)


def _exact(loss: Any) -> bool:
    """Whether `grad_scale`, of the drop-in or of a patch, is "exact"."""
    return getattr(loss, "grad_scale", "peer") == "exact"


def _no_negatives(loss: Any, image_features: Tensor) -> str | None:
    alone = len(image_features) == 1 and loss.world_size == 1
    return "a batch of one pair has no negatives" if alone else None


def _cache_labels(loss: Any, image_features: Tensor) -> None:
    """Leaves in the loss the labels that its readers may ask it to cache."""
    if loss.cache_labels:
        ranks = 1 if loss.local_loss else loss.world_size
        loss.get_ground_truth(image_features.device, ranks * len(image_features))
