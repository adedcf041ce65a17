"""transformers' other models with CLIP's loss, fused, against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import randn
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from contrastive_kernels.integrations import patched  # noqa: E402
from contrastive_kernels.integrations import transformers as fused  # noqa: E402

pytestmark = pytest.mark.usefixtures("default_dtype_double")
N, LENGTH, SIZE, VOCABULARY = 5, 6, 8, 30
LAYERS = {
    "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "attention_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "projection_dim": 16,
}  # fmt: skip
TEXT = LAYERS | {
    "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH + 2, "eos_token_id": 2,
    "pad_token_id": 1,
}  # fmt: skip
VISION = LAYERS | {"image_size": SIZE, "patch_size": 4}
GROUPS = VISION | {
    "depths": [1, 1, 1], "num_group_tokens": [2, 2, 0], "num_output_groups": [2, 2, 0],
    "num_hidden_layers": 3, "assign_eps": 1.0, "dropout": 0.0, "patch_size": 2,
}  # fmt: skip
AUDIO = {
    "hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1],
    "num_attention_heads": [2, 2], "spec_size": 16, "num_mel_bins": 8, "window_size": 2,
    "patch_size": 4, "patch_stride": [4, 4],
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0,
    "projection_dim": 16,
}  # fmt: skip
CONVOLUTIONS = {
    "image_size": SIZE, "in_channels": [32], "out_channels": [16], "kernel_sizes": [3],
    "strides": [1], "num_block_repeats": [1], "expand_ratios": [1], "depthwise_padding": [],
    "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 16, "dropout_rate": 0.0,
    "drop_connect_rate": 0.0,
}  # fmt: skip
# arguments of the configuration of each model
SIZES: dict[str, dict] = {
    "AltCLIPModel": {"text_config": TEXT | {"project_dim": 16}, "vision_config": VISION},
    "BlipModel": {"text_config": TEXT | {"encoder_hidden_size": 16}, "vision_config": VISION},
    "ChineseCLIPModel": {"text_config": TEXT, "vision_config": VISION},
    "CLIPSegModel": {"text_config": TEXT, "vision_config": VISION},
    "GroupViTModel": {
        "text_config": TEXT, "vision_config": GROUPS, "projection_intermediate_dim": 8,
    },
    "MetaClip2Model": {"text_config": TEXT, "vision_config": VISION},
    "OwlViTModel": {"text_config": TEXT, "vision_config": VISION},
    "Owlv2Model": {"text_config": TEXT, "vision_config": VISION},
    "Tipsv2Model": {"text_config": TEXT, "vision_config": VISION},
    "AlignModel": {"text_config": TEXT, "vision_config": CONVOLUTIONS, "projection_dim": 16},
    "ClapModel": {"text_config": TEXT, "audio_config": AUDIO, "projection_dim": 16},
    "VisionTextDualEncoderModel": {},
}  # fmt: skip
parametrize_model = pytest.mark.parametrize(
    "name", [name for name in SIZES if hasattr(fused, name)]
)


def build(name: str, home: Any) -> nn.Module:
    """A small model of one of the two modules in float64, without dropout, of equal weights."""
    if name == "VisionTextDualEncoderModel":
        towers = transformers.ViTConfig(**VISION), transformers.BertConfig(**TEXT)
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            *towers, projection_dim=16
        )
    else:
        config = getattr(transformers, name.replace("Model", "Config"))(**SIZES[name])
    torch.manual_seed(0)
    net = getattr(transformers, name)(config)
    if home is fused:
        net, state = getattr(fused, name)(config), net.state_dict()
        net.load_state_dict(state)
    return net.double().eval()  # neither dropout nor statistics of the batch


def batch(name: str, n: int = N) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (n, LENGTH), generator=generator)
    tokens[:, -1] = 2
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if name == "ClapModel":
        return inputs | {"input_features": randn(n, 1, 16, 8)}
    return inputs | {"pixel_values": randn(n, 3, SIZE, SIZE)}


def results(net: nn.Module, name: str, **options) -> tuple[dict, list[Tensor | None]]:
    output = net(**batch(name), return_loss=True, **options)
    gradients = torch.autograd.grad(output["loss"], list(net.parameters()), allow_unused=True)
    return dict(output), gradients


@parametrize_model
def test_loss_and_gradients(name):
    """Every output but the logits, and the gradient of every parameter."""
    swap = next(s for s in fused.PEER.swaps if s.title == name)
    wanted, wanted_gradients = results(build(name, transformers), name)
    before = swap.fused_calls
    with patched("transformers", name):
        of_patched = results(build(name, transformers), name)
    for output, gradients in (of_patched, results(build(name, fused), name)):
        left_out = set(wanted) - set(output)
        assert {key[:7] for key in left_out} == {"logits_"} and len(left_out) == 2
        for key in set(output) - {key for key in output if key.endswith("_output")}:
            torch.testing.assert_close(output[key], wanted[key], rtol=1e-9, atol=1e-12)
        for a, b in zip(gradients, wanted_gradients, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    assert swap.fused_calls == before + 2 and any(g is not None and g.any() for g in gradients)


@parametrize_model
def test_logits_and_pairs(name):
    """Logits on request, a batch of one and evaluation are the package's."""
    net, peer = (build(name, home) for home in (fused, transformers))
    with torch.no_grad():
        for inputs in (batch(name), batch(name, 1)):
            ours, wanted = (dict(model(**inputs, return_loss=True)) for model in (net, peer))
            assert set(ours) == set(wanted)
    net.keep_logits = True
    ours, wanted = (dict(model(**batch(name), return_loss=True)) for model in (net, peer))
    assert list(ours) == list(wanted)
    for key in [key for key in wanted if key.startswith("logits_")]:
        torch.testing.assert_close(ours[key], wanted[key], rtol=1e-9, atol=1e-12)


@parametrize_model
def test_a_replaced_loss_counts(name, monkeypatch):
    swap = next(s for s in fused.PEER.swaps if s.title == name)
    functions = swap.own.beside[0]
    assert "contrastive_loss" in functions.functions
    monkeypatch.setattr(functions.owner, "contrastive_loss", lambda logits: logits.square().mean())
    wanted = build(name, transformers)(**batch(name), return_loss=True)["loss"]
    with pytest.warns(UserWarning, match="runs unfused: contrastive_loss is overridden"):
        got = build(name, fused)(**batch(name), return_loss=True)["loss"]
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=0.0)
    swap.fallbacks.clear()


def test_segmentation_of_group_vit():
    """Its own products of features are made."""
    if not hasattr(fused, "GroupViTModel"):
        pytest.skip("no such model in this version")
    outputs = []
    for home in (fused, transformers):
        net = build("GroupViTModel", home)
        outputs.append(net(**batch("GroupViTModel"), return_loss=True, output_segmentation=True))
    ours, wanted = (o["segmentation_logits"] for o in outputs)
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-9, atol=0.0)


def test_compiled():
    """The towers are; what is around them runs fused all the same."""
    net = build("CLIPSegModel", fused)
    output = torch.compile(net, backend="eager")(**batch("CLIPSegModel"), return_loss=True)
    wanted = build("CLIPSegModel", transformers)(**batch("CLIPSegModel"), return_loss=True)
    assert output.logits_per_text is None
    torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-9, atol=0.0)
