"""transformers' CLIPModel, SiglipModel and Siglip2Model: `return_loss=True` in training.

Their forward makes the similarity matrix before the loss, so the forward as a whole is replaced; it
calls the same methods for the features. The output's `logits_per_image` and `logits_per_text`
are then None, unless the model has `keep_logits = True`: the loss is fused all the same, but the
memory is that of the peer. A call without `return_loss`, or where no gradient is recorded
(evaluation), is the peer's own and has its logits.

A Trainer, or accelerate, keeps the forward that a model has when it is prepared: patch before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses.clip import clip_loss, siglip_loss
from ..types import statistics_dtype
from ._own import Own
from .swap import Peer, Unfused

PEER = Peer("transformers", "transformers", ("5.12", "5.25"))
clip: Any = PEER.load("transformers.models.clip.modeling_clip")
siglip: Any = PEER.load("transformers.models.siglip.modeling_siglip")
siglip2: Any = PEER.load("transformers.models.siglip2.modeling_siglip2")
can_return_tuple: Any = PEER.load("transformers.utils.generic").can_return_tuple


CLIP = Own(
    clip.CLIPModel,
    beside=[Own(clip, "image_text_contrastive_loss", "contrastive_loss", "_get_vector_norm")],
)


def _clip_or_siglip(output: type) -> Callable:
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> Any:
        text = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        image = {
            "pixel_values": pixel_values,
            "interpolate_pos_encoding": interpolate_pos_encoding,
        }
        return _forward(self, output, text, image, return_loss, kwargs)

    return can_return_tuple(forward)


_clip = PEER.fused(clip.CLIPModel, own=CLIP)(_clip_or_siglip(clip.CLIPOutput))
_siglip = PEER.fused(siglip.SiglipModel, own=Own(siglip.SiglipModel))(
    _clip_or_siglip(siglip.SiglipOutput)
)


@PEER.fused(siglip2.Siglip2Model, own=Own(siglip2.Siglip2Model))
@can_return_tuple
def _siglip2(
    self: Any,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    pixel_attention_mask: Tensor | None = None,
    spatial_shapes: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    return_loss: bool | None = None,
    **kwargs: Any,
) -> Any:
    text = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
    }
    image = {
        "pixel_values": pixel_values,
        "pixel_attention_mask": pixel_attention_mask,
        "spatial_shapes": spatial_shapes,
    }
    return _forward(self, siglip2.Siglip2Output, text, image, return_loss, kwargs)


class CLIPModel(clip.CLIPModel):
    """transformers' `CLIPModel`, its loss fused: `clip_loss`."""

    forward = _clip


class SiglipModel(siglip.SiglipModel):
    """transformers' `SiglipModel`, its loss fused: `siglip_loss`."""

    forward = _siglip


class Siglip2Model(siglip2.Siglip2Model):
    """transformers' `Siglip2Model`, its loss fused: `siglip_loss`."""

    forward = _siglip2


def _forward(
    model: Any,
    output: type,
    text: dict[str, Any],
    image: dict[str, Any],
    return_loss: bool | None,
    kwargs: dict[str, Any],
) -> Any:
    """The model's `output` with the fused loss. `text`, `image`: the arguments of each tower,
    beside `kwargs` that both get."""
    sigmoid = output is not clip.CLIPOutput
    unfused = _unfused(text["input_ids"], image["pixel_values"], return_loss, sigmoid)
    if unfused is not None:
        return unfused
    if sigmoid:
        image_output = model.vision_model(**image, **kwargs)
        text_output = model.text_model(**text, **kwargs)
    else:
        if not model.config.return_dict:
            kwargs = kwargs | {"return_dict": True}
        image_output = model.get_image_features(**image, **kwargs)
        text_output = model.get_text_features(**text, **kwargs)
    texts = text_output.pooler_output
    images = image_output.pooler_output
    image_embeds = images / images.norm(dim=-1, keepdim=True)
    text_embeds = texts / texts.norm(dim=-1, keepdim=True)

    images = images.to(texts.device)
    log_scale = model.logit_scale.to(texts.device)
    wide = statistics_dtype(texts)  # the gradients of half parameters are rounded once, at the end
    scale = log_scale.to(wide).exp()
    if sigmoid:
        bias = model.logit_bias.to(texts.device)
        loss = siglip_loss(texts, images, scale, bias.to(wide))
    else:
        loss = clip_loss(texts, images, scale)
    logits = None
    if getattr(model, "keep_logits", False):
        logits = text_embeds @ image_embeds.t().to(texts.device) * log_scale.exp()
        if sigmoid:
            logits = logits + bias
    return output(
        loss=loss,
        logits_per_image=None if logits is None else logits.t(),
        logits_per_text=logits,
        text_embeds=text_embeds,
        image_embeds=image_embeds,
        text_model_output=text_output,
        vision_model_output=image_output,
    )


def _unfused(
    texts: Tensor | None, images: Tensor | None, return_loss: bool | None, sigmoid: bool
) -> Unfused | None:
    """Why the model has to run its own forward, or None."""
    if not return_loss:
        return Unfused("no loss is asked for", expected=True)
    if not torch.is_grad_enabled():
        return Unfused("no gradient is recorded, and logits are kept in evaluation", expected=True)
    if texts is None or images is None or len(texts) != len(images):
        return Unfused("texts and images are not in pairs")
    if len(texts) == 1 and not sigmoid:
        return Unfused("a batch of one pair has no negatives")
    return None
