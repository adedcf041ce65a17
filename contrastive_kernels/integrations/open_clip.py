"""open_clip's losses: ClipLoss, CoCaLoss, DistillClipLoss and SigLipLoss.

`patch("open_clip", "ClipLoss")` serves CoCaLoss too, whose contrastive part is ClipLoss.forward.
The version range is that of the sources compared; their losses are the same line by line.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..common import scalar
from ..distillation import clip_distill
from ..losses import clip_loss, siglip_loss
from .swap import Peer, Unfused

PEER = Peer("open_clip", "open_clip_torch", ("3.0", "3.4"))
peer = PEER.load("open_clip.loss")

LossOrDict = Tensor | dict[str, Tensor] | Unfused
_CLIP = ("get_logits", "get_ground_truth")


@PEER.fused(peer.ClipLoss)
def _clip(
    self,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    output_dict: bool = False,
) -> LossOrDict:
    reason = _reason(self, peer.ClipLoss, _CLIP, logit_scale=logit_scale, logit_bias=logit_bias)
    reason = reason or _no_negatives(image_features)
    if reason is not None:
        return Unfused(reason)
    loss = clip_loss(image_features, text_features, logit_scale, normalize=False)
    if isinstance(logit_bias, Tensor):
        # it cancels in the softmax; a parameter must still get its gradient, of 0
        loss = loss + 0.0 * logit_bias.reshape(()).to(loss)
    _cache_labels(self, image_features)
    return {"contrastive_loss": loss} if output_dict else loss


@PEER.fused(peer.DistillClipLoss)
def _distill(
    self,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    dist_image_features: Tensor,
    dist_text_features: Tensor,
    dist_logit_scale: float | Tensor,
    output_dict: bool = False,
) -> tuple[Tensor, Tensor] | dict[str, Tensor] | Unfused:
    reason = _reason(
        self, peer.DistillClipLoss, (*_CLIP, "dist_loss"),
        logit_scale=logit_scale, dist_logit_scale=dist_logit_scale,
    )  # fmt: skip
    reason = reason or _no_negatives(image_features)
    if reason is not None:
        return Unfused(reason)
    scale = scalar("logit_scale", logit_scale)  # for both losses, so that its gradient rounds once
    contrastive = clip_loss(image_features, text_features, scale, normalize=False)
    distill = clip_distill(
        image_features, text_features, scale,
        dist_image_features, dist_text_features, dist_logit_scale, normalize=False,
    )  # fmt: skip
    _cache_labels(self, image_features)
    if output_dict:
        return {"contrastive_loss": contrastive, "distill_loss": distill}
    return contrastive, distill


@PEER.fused(peer.SigLipLoss)
def _siglip(
    self,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    output_dict: bool = False,
) -> LossOrDict:
    methods = ("get_logits", "get_ground_truth", "_loss")
    reason = _reason(self, peer.SigLipLoss, methods, logit_scale=logit_scale, logit_bias=logit_bias)
    if reason is not None:
        return Unfused(reason)
    bias = 0.0 if logit_bias is None else logit_bias
    loss = siglip_loss(image_features, text_features, logit_scale, bias, normalize=False)
    return {"contrastive_loss": loss} if output_dict else loss


class ClipLoss(peer.ClipLoss):
    """open_clip's `ClipLoss`, fused: `clip_loss`."""

    forward = _clip


class CoCaLoss(peer.CoCaLoss, ClipLoss):
    """open_clip's `CoCaLoss`, its contrastive part fused: `clip_loss`."""


class DistillClipLoss(peer.DistillClipLoss):
    """open_clip's `DistillClipLoss`, fused: `clip_loss` and `clip_distill`."""

    forward = _distill


class SigLipLoss(peer.SigLipLoss):
    """open_clip's `SigLipLoss`, fused: `siglip_loss`."""

    forward = _siglip


def _reason(loss: nn.Module, owner: type, methods: tuple[str, ...], **scalars) -> str | None:
    """Why `loss` has to run its own code, or None. `methods`: those that the fused form replaces
    as they are in the peer's class `owner`."""
    if loss.world_size > 1:
        return "features are gathered from several processes"
    for name in methods:
        if getattr(type(loss), name) is not getattr(owner, name):
            return f"{name} is overridden"
    for name, value in scalars.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            return f"{name} has more than one entry"
    return None


def _no_negatives(image_features: Tensor) -> str | None:
    return "a batch of one pair has no negatives" if len(image_features) == 1 else None


def _cache_labels(loss: nn.Module, image_features: Tensor) -> None:
    """Leaves in the loss the labels that its readers may ask it to cache."""
    if loss.cache_labels:
        loss.get_ground_truth(image_features.device, len(image_features))
