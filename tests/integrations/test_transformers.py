"""transformers' models with a fused loss, against transformers' own."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter

import pytest
import torch
from oracles import DOUBLE, randn
from torch import Tensor, nn

pytest.importorskip("transformers")
from conformance import assert_conforms, clustered  # noqa: E402
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling  # noqa: E402

from contrastive_kernels.integrations import patched  # noqa: E402
from contrastive_kernels.integrations import transformers as fused  # noqa: E402

PEERS = {"CLIPModel": CLIPModel, "SiglipModel": SiglipModel, "Siglip2Model": Siglip2Model}
CONFIGS = {"CLIPModel": CLIPConfig, "SiglipModel": SiglipConfig, "Siglip2Model": Siglip2Config}
pytestmark = pytest.mark.usefixtures("default_dtype_double")
LENGTH, PATCHES, VOCABULARY = 6, 4, 30
LOGITS = ("logits_per_image", "logits_per_text")
parametrize_model = pytest.mark.parametrize("name", PEERS)
may_run_unfused = pytest.mark.filterwarnings("ignore:.*runs unfused")


def model(cls: type, name: str) -> nn.Module:
    """A small model, in float64; two calls give equal weights."""
    size = {
        "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "attention_dropout": 0.0, "projection_dim": 16,
    }  # fmt: skip
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "eos_token_id": 2}
    vision = {"image_size": 8, "patch_size": 4}
    if name == "Siglip2Model":
        vision = {"num_patches": PATCHES, "patch_size": 4}
    config = CONFIGS[name](text_config=size | text, vision_config=size | vision)
    if name == "CLIPModel":
        config.projection_dim = 12
    torch.manual_seed(0)
    return cls(config).double().train()


def batch(name: str, n: int, texts: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (texts or n, LENGTH), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if name == "Siglip2Model":
        return inputs | {
            "pixel_values": randn(n, PATCHES, 3 * 4 * 4),
            "pixel_attention_mask": torch.ones(n, PATCHES, dtype=torch.long),
            "spatial_shapes": torch.tensor([[2, 2]] * n),
        }
    return inputs | {"pixel_values": randn(n, 3, 8, 8)}


def step(cls: type, name: str, **options) -> tuple:
    """The model, its output for a batch, and the gradients of its loss."""
    net = model(cls, name)
    net.logit_scale.data.fill_(4.6)
    output = net(**batch(name, 5), return_loss=True, **options)
    loss = output[0]
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return net, output, gradients


def swap(name: str):
    return next(swap for swap in fused.PEER.swaps if swap.title == name)


class Given(nn.Module):
    """A tower whose features are its input."""

    def forward(self, input_ids=None, pixel_values=None, **kwargs):
        features = pixel_values if input_ids is None else input_ids
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)


def loss_of_features(cls: type, name: str, learned: bool = True):
    """The loss as a function of the features of texts and images, the scale's log and the bias,
    with a gradient for these two if `learned`."""
    net = model(cls, name)
    net.text_model = net.vision_model = Given()
    if name == "CLIPModel":
        net.text_projection = net.visual_projection = nn.Identity()

    def loss(texts, images, *scalars):
        scalars = scalars if learned else [t.detach() for t in scalars]
        parameters = dict(zip(("logit_scale", "logit_bias"), scalars, strict=False))
        inputs = {"input_ids": texts, "pixel_values": images, "return_loss": True}
        return torch.func.functional_call(net, parameters, kwargs=inputs).loss

    return loss


@parametrize_model
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
@pytest.mark.parametrize("shape", [(1, 8), (2, 3), (5, 3), (37, 16)], ids=str)
@may_run_unfused
def test_loss_of_features(name, shape, temperature):
    """At a temperature of 0.01 the gradient of the scale's log is left to the whole model, in
    float64: a float32 log-sum-exp near 100 is rounded by more than 1e-5 of it in a small batch."""
    texts = clustered(*shape)
    inputs = [texts, texts + 0.3 * randn(*shape, seed=1)]
    inputs += [-torch.tensor([temperature], dtype=DOUBLE).log()]
    if name != "CLIPModel":
        inputs += [randn(1, seed=2) - 10]
    learned = temperature != 0.01
    ours, theirs = (
        loss_of_features(cls, name, learned) for cls in (getattr(fused, name), PEERS[name])
    )
    # errors of bfloat16 are compared where there are many: of few it is chance which is smaller
    assert_conforms(ours, theirs, inputs, bfloat16=shape[0] > 30)


@parametrize_model
def test_whole_model(name):
    """Every output but the logits, and the gradient of every parameter."""
    net, output, gradients = step(getattr(fused, name), name)
    _, wanted, wanted_gradients = step(PEERS[name], name)
    assert type(output) is type(wanted)
    assert set(wanted) - set(output) == set(LOGITS)
    for key in ("loss", "text_embeds", "image_embeds"):
        torch.testing.assert_close(output[key], wanted[key], rtol=1e-10, atol=1e-12)
    for key in ("text_model_output", "vision_model_output"):
        torch.testing.assert_close(output[key].to_tuple(), wanted[key].to_tuple())
    for (parameter, _), a, b in zip(
        net.named_parameters(), gradients, wanted_gradients, strict=True
    ):
        assert (a is None) == (b is None), parameter
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=parameter)


@parametrize_model
def test_options_reach_the_towers(name):
    _, output, _ = step(getattr(fused, name), name, output_hidden_states=True)
    _, wanted, _ = step(PEERS[name], name, output_hidden_states=True)
    if wanted.text_model_output.hidden_states is None:
        assert output.text_model_output.hidden_states is None
        pytest.skip("the package's own SigLIP keeps none in this version")
    states = output.text_model_output.hidden_states, output.vision_model_output.hidden_states
    assert all(len(s) == 2 for s in states)
    torch.testing.assert_close(states[0], wanted.text_model_output.hidden_states)
    torch.testing.assert_close(states[1], wanted.vision_model_output.hidden_states)


@parametrize_model
@pytest.mark.parametrize("where", ["argument", "config"])
def test_tuples(name, where):
    def output(cls):
        net = model(cls, name)
        if where == "config":
            net.config.return_dict = False
            return net(**batch(name, 5), return_loss=True)
        return net(**batch(name, 5), return_loss=True, return_dict=False)

    try:
        output(PEERS[name])
    except AttributeError:  # of a tuple that the model's own forward gets from its towers
        pytest.skip("the package's own model raises")
    ours = output(getattr(fused, name))
    wanted = model(PEERS[name], name)(**batch(name, 5), return_loss=True).to_tuple()
    assert isinstance(ours, tuple) and len(ours) == len(wanted) - len(LOGITS)
    torch.testing.assert_close(ours[0], wanted[0])
    torch.testing.assert_close(ours[1:3], wanted[3:5])


@parametrize_model
def test_logits_are_kept_on_request(name):
    """With their gradient."""
    logits = []
    for cls in (getattr(fused, name), PEERS[name]):
        net = model(cls, name)
        net.keep_logits = True
        output = net(**batch(name, 5), return_loss=True)
        (output.loss + output.logits_per_image.square().mean()).backward()
        gradients = [net.logit_scale.grad, net.vision_model.embeddings.patch_embedding.weight.grad]
        logits.append([output.logits_per_image, output.logits_per_text, *gradients])
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-12)


@parametrize_model
@pytest.mark.parametrize(
    ("options", "gradient", "texts", "reason"),
    [
        ({}, True, 5, "no loss is asked for"),
        ({"return_loss": False}, True, 3, "no loss is asked for"),
        (
            {"return_loss": True}, False, 5,
            "no gradient is recorded, and logits are kept in evaluation",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error:.*runs unfused")
def test_evaluation_is_the_peers(name, options, gradient, texts, reason):
    inputs = batch(name, 5, texts)
    before = swap(name).fallbacks[reason]
    with torch.set_grad_enabled(gradient):
        output, wanted = (
            model(cls, name)(**inputs, **options) for cls in (getattr(fused, name), PEERS[name])
        )
    assert swap(name).fallbacks[reason] == before + 1
    torch.testing.assert_close(output.to_tuple()[:4], wanted.to_tuple()[:4], rtol=0.0, atol=0.0)
    assert output.logits_per_image is not None


@parametrize_model
@may_run_unfused
def test_what_is_no_batch_of_pairs_runs_unfused(name):
    net, reasons = model(getattr(fused, name), name), swap(name).fallbacks
    reason = "texts and images are not in pairs"
    before = reasons[reason]
    with pytest.raises((RuntimeError, IndexError, ValueError)):  # the peer's own error
        net(**batch(name, 5, 3), return_loss=True)
    assert reasons[reason] == before + 1
    if name == "CLIPModel":
        output = net(**batch(name, 1), return_loss=True)
        assert output.loss == 0.0 and reasons["a batch of one pair has no negatives"] > 0


@parametrize_model
def test_features_of_zero(name):
    """The peer divides by their norm, and so does its forward here."""
    texts, images = randn(5, 3).requires_grad_(), randn(5, 3, seed=1)
    texts.data[2] = 0.0
    scalars = [torch.ones(1, dtype=DOUBLE)] * 2
    for cls in (PEERS[name], getattr(fused, name)):
        assert loss_of_features(cls, name)(texts, images, *scalars).isnan()


def assert_as_the_peer(name, change):
    """A subclass or an instance that `change` makes: its loss and gradients, patched and not."""

    def result():
        net = change(model(PEERS[name], name))
        loss = net(**batch(name, 5), return_loss=True).loss
        return loss, *torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)

    wanted = result()
    with patched("transformers", name):
        before = swap(name).fused_calls, dict(swap(name).fallbacks)
        got = result()
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    return swap(name).fused_calls - before[0], swap(name).fallbacks - Counter(before[1])


@parametrize_model
def test_features_of_a_users_own(name):
    """CLIP's forward calls them, without arguments that nobody gave; that of SigLIP does not."""
    if name == "CLIPModel" and not fused.PEER.since("5.6"):
        pytest.skip("the features are not called before 5.6")

    def change(net):
        def features(input_ids, attention_mask=None, position_ids=None):
            out = inner(input_ids, attention_mask=attention_mask, position_ids=position_ids)
            out.pooler_output = 2 * out.pooler_output + 1
            return out

        inner = net.get_text_features
        net.get_text_features = features
        return net

    assert assert_as_the_peer(name, change) == (1, {})


@parametrize_model
def test_towers_with_hooks(name):
    def change(net):
        def shifted(module, inputs, output):
            output.pooler_output = output.pooler_output + 1
            return output

        net.text_model.register_forward_hook(shifted)
        return net

    assert assert_as_the_peer(name, change) == (1, {})


def test_a_parameter_called_logit_bias_makes_no_siglip():
    def change(net):
        net.logit_bias = nn.Parameter(torch.ones(1, dtype=DOUBLE))
        return net

    assert assert_as_the_peer("CLIPModel", change) == (1, {})


@may_run_unfused
def test_a_replaced_loss_function_counts(monkeypatch):
    module = importlib.import_module("transformers.models.clip.modeling_clip")
    monkeypatch.setattr(module, "contrastive_loss", lambda logits: logits.square().mean())
    counted = assert_as_the_peer("CLIPModel", lambda net: net)
    assert counted == (0, {"contrastive_loss is overridden": 1})


@parametrize_model
def test_patch(name):
    """Of a model that exists; a Trainer still finds the arguments of its forward."""
    net, inputs = model(PEERS[name], name), batch(name, 5)
    wanted = net(**inputs, return_loss=True)
    arguments = inspect.signature(net.forward)
    with patched("transformers", name):
        assert inspect.signature(net.forward) == arguments
        output = net(**inputs, return_loss=True)
    assert output.logits_per_image is None and wanted.logits_per_image is not None
    torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-10, atol=0.0)
    assert net(**inputs, return_loss=True).logits_per_image is not None


@parametrize_model
def test_saved_and_loaded_as_the_peer(name, tmp_path):
    net = model(PEERS[name], name)
    net.save_pretrained(tmp_path)
    loaded = getattr(fused, name).from_pretrained(tmp_path).double()
    assert type(loaded.config) is type(net.config)
    torch.testing.assert_close(loaded.state_dict(), net.state_dict(), rtol=1e-6, atol=1e-6)
