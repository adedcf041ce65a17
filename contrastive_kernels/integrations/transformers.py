"""transformers' models of two towers that learn CLIP's or SigLIP's loss: `return_loss=True` in
training.

A model's own forward runs, but the similarities of its embeddings are not made (`Product`), and the
loss comes from them. The output's logits are then None, unless the model has `keep_logits = True`:
the loss is fused all the same, but the memory is that of the peer. A call without `return_loss`, or
where no gradient is recorded (evaluation), is the peer's own and has its logits.

A Trainer, or accelerate, keeps the forward that a model has when it is prepared: patch before.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from ..losses.clip import clip_loss, siglip_loss
from ..losses.info_nce import info_nce
from ..types import statistics_dtype
from ._own import Own
from ._product import Product, with_products
from .swap import Peer, Unfused

PEER = Peer("transformers", "transformers", ("4.50", "5.25"))


def _clip(texts: Product, images: Product) -> Tensor:
    return clip_loss(texts.x, texts.y, texts.scale)


def _smoothed_clip(texts: Product, images: Product) -> Tensor:
    """With torch's label smoothing of 0.1, which compares the positive with the mean of all."""
    x, y = (t.to(statistics_dtype(t)) for t in (texts.x, texts.y))
    above = (x * y).sum(1).mean() - x.mean(0) @ y.mean(0)
    return _clip(texts, images) + 0.1 * (texts.scale * above).reshape(())


def _two_scales(texts: Product, audios: Product) -> Tensor:
    """Both from texts to audios, as in the peer, whose second matrix is transposed twice."""
    of_texts, of_audios = (info_nce(texts.x, texts.y, scale=p.scale) for p in (texts, audios))
    return (of_texts + of_audios) / 2


def _siglip(texts: Product, images: Product) -> Tensor:
    return siglip_loss(texts.x, texts.y, texts.scale, texts.bias)


# by class: its module, and the loss of the pairs of its two outputs
MODELS = {
    "CLIPModel": ("clip", _clip),
    "AltCLIPModel": ("altclip", _clip),
    "BlipModel": ("blip", _clip),
    "ChineseCLIPModel": ("chinese_clip", _clip),
    "CLIPSegModel": ("clipseg", _clip),
    "GroupViTModel": ("groupvit", _clip),
    "MetaClip2Model": ("metaclip_2", _clip),
    "OwlViTModel": ("owlvit", _clip),
    "Owlv2Model": ("owlv2", _clip),
    "Tipsv2Model": ("tipsv2", _clip),
    "VisionTextDualEncoderModel": ("vision_text_dual_encoder", _clip),
    "AlignModel": ("align", _smoothed_clip),
    "ClapModel": ("clap", _two_scales),
    "SiglipModel": ("siglip", _siglip),
    "Siglip2Model": ("siglip2", _siglip),
}


def _named(module: ModuleType, function: Any) -> Iterator[str]:
    """The functions of `module` that one of them names, and those that these name."""
    for name in function.__code__.co_names:
        found = vars(module).get(name)
        if isinstance(found, FunctionType) and found.__module__ == module.__name__:
            yield from (name, *_named(module, found))


def _forward(owner: type, loss: Callable[[Product, Product], Tensor]) -> Callable:
    """The fused form of the forward of `owner`."""
    own: Any = inspect.unwrap(owner.forward)  # type: ignore[attr-defined]
    inner = with_products(own, f"{__name__}.{owner.__name__}")
    names = list(inspect.signature(own).parameters)[1:]
    other = "input_features" if "input_features" in names else "pixel_values"

    def given(name: str, args: tuple, kwargs: dict) -> Any:
        place = names.index(name)
        return args[place] if place < len(args) else kwargs.get(name)

    # torch.compile knows no Product: it has the towers, and leaves out what is around them
    inner = torch.compiler.disable(inner, recursive=False)

    @functools.partial(torch.compiler.disable, recursive=False)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_loss(inner(self, *args, **kwargs), loss, getattr(self, "keep_logits", False))

    if own is not owner.forward:  # type: ignore[attr-defined]
        run = PEER.load("transformers.utils.generic").can_return_tuple(run)

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        texts, others, asked = (given(n, args, kwargs) for n in ("input_ids", other, "return_loss"))
        unfused = _unfused(texts, others, asked, loss)
        if unfused is not None:
            return unfused
        place = names.index("return_loss")
        if place < len(args):
            args = (*args[:place], None, *args[place + 1 :])
        else:
            kwargs = kwargs | {"return_loss": None}
        return run(self, *args, **kwargs)

    return forward


@functools.partial(torch.compiler.disable, recursive=False)
def _with_loss(output: Any, loss: Callable[[Product, Product], Tensor], keep: bool) -> Any:
    """An output, or a tuple of its values, whose logits are two `Product`, those of texts last."""
    is_tuple = isinstance(output, tuple)
    values = output if is_tuple else output.values()
    others, texts = (value for value in values if isinstance(value, Product))
    value = loss(texts, others)

    def kept(entry: Any) -> Any:
        if not isinstance(entry, Product):
            return entry
        return entry.matrix() if keep else None

    if is_tuple:
        return value, *(entry for entry in map(kept, output) if entry is not None)
    return type(output)(**{"loss": value} | {name: kept(v) for name, v in output.items()})


def _unfused(
    texts: Tensor | None, others: Tensor | None, asked: bool | None, loss: Callable
) -> Unfused | None:
    """Why a model has to run its own forward, or None."""
    if not asked:
        return Unfused("no loss is asked for", expected=True)
    if not torch.is_grad_enabled():
        return Unfused("no gradient is recorded, and logits are kept in evaluation", expected=True)
    if texts is None or others is None or len(texts) != len(others):
        return Unfused("texts and images are not in pairs")
    if len(texts) == 1 and loss is not _siglip:
        return Unfused("a batch of one pair has no negatives")
    return None


def _drop_in(name: str, folder: str, loss: Callable) -> type:
    module = PEER.load(f"transformers.models.{folder}.modeling_{folder}")
    owner = getattr(module, name)
    named = dict.fromkeys(_named(module, inspect.unwrap(owner.forward)))
    beside = [Own(module, *named)] if named else []
    form = PEER.fused(owner, own=Own(owner, beside=beside))(_forward(owner, loss))
    doc = f"transformers' `{name}`, its loss fused."
    return type(name, (owner,), {"forward": form, "__doc__": doc, "__module__": __name__})


for _name, (_folder, _loss) in MODELS.items():
    if importlib.util.find_spec(f"transformers.models.{_folder}"):  # not in all versions
        globals()[_name] = _drop_in(_name, _folder, _loss)
