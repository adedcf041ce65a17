"""Drop-ins in the transforms of torch.func and in forward mode, against their peers there."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from conformance import clustered
from oracles import randn
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from contrastive_kernels.integrations import solo

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
# integration, the peer's module, class, further inputs; None: labels
CALLS = [
    ("info_nce", "info_nce", "InfoNCE", ()),
    ("info_nce", "info_nce", "InfoNCE", (randn(7, 5, seed=3),)),
    ("lightly", "lightly.loss", "NTXentLoss", ()),
    ("lightly", "lightly.loss", "DCLLoss", ()),
    ("open_clip", "open_clip.loss", "ClipLoss", (10.0,)),
    ("open_clip", "open_clip.loss", "SigLipLoss", (10.0, -5.0)),
    ("pytorch_metric_learning", "pytorch_metric_learning.losses", "NTXentLoss", None),
    ("pytorch_metric_learning", "pytorch_metric_learning.losses", "SupConLoss", None),
]


def ways(function: Callable[[Tensor], Tensor], batch: bool) -> dict[str, Tensor]:
    x, along = clustered(6, 5, seed=1), randn(6, 5, seed=2)
    one = torch.ones((), dtype=x.dtype)
    found = {
        "grad": grad(function)(x),
        "vjp": vjp(function, x)[1](one)[0],
        "jacrev": jacrev(function)(x),
        "jvp": jvp(function, (x,), (along,))[1],
        "jacfwd": jacfwd(function)(x),
    }
    if batch:
        found["hessian"] = hessian(function)(x)
        found["vmap"] = vmap(function)(torch.stack((x, along)))
        found["vmap of grad"] = vmap(grad(function))(torch.stack((x, along)))
    return found


EMBEDDINGS = "sentence_transformers.sentence_transformer.losses"


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("which", [0, 1])
def test_ranking_of_sentence_transformers(negatives, which):
    pytest.importorskip("sentence_transformers")
    fused = import_module("contrastive_kernels.integrations.sentence_transformers")
    others = [clustered(6, 5, seed=2 + i) for i in range(1 + negatives)]

    def of(package):
        loss = package.MultipleNegativesRankingLoss(None)
        return lambda x: loss.compute_loss_from_embeddings(
            [*others[:which], x, *others[which:]], None
        )

    expected = ways(of(import_module(EMBEDDINGS)), batch=True)
    for how, got in ways(of(fused), batch=True).items():
        torch.testing.assert_close(got, expected[how], rtol=1e-8, atol=1e-8, msg=how)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_models_of_transformers(name):
    """By their images, and vmap of it."""
    pytest.importorskip("transformers")
    from test_transformers import PEERS, batch, model

    fused = import_module("contrastive_kernels.integrations.transformers")
    given, results = batch(name, 3), []
    pixels = given.pop("pixel_values")
    for cls in (getattr(fused, name), PEERS[name]):
        net = model(cls, name)
        net.set_attn_implementation("eager")

        def run(x, net=net):
            return net(**given, pixel_values=x, return_loss=True)[0]

        made = [grad(run)(pixels), vjp(run, pixels)[1](torch.ones((), dtype=pixels.dtype))[0]]
        results.append([*made, vmap(grad(run))(torch.stack((pixels, 0.5 * pixels)))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "module", "loss", "more"), CALLS)
def test_as_the_peer(name, module, loss, more):
    pytest.importorskip(module.split(".")[0])
    peer = getattr(import_module(module), loss)()
    fused = getattr(import_module(f"contrastive_kernels.integrations.{name}"), loss)()
    inputs = (LABELS,) if more is None else (clustered(6, 5, seed=2), *more)
    batch = loss != "SupConLoss"  # whose peer has control flow that vmap refuses
    expected = ways(lambda x: peer(x, *inputs), batch)
    for how, got in ways(lambda x: fused(x, *inputs), batch).items():
        torch.testing.assert_close(
            got, expected[how], rtol=1e-8, atol=1e-8, msg=lambda text, how=how: f"{how}: {text}"
        )


@pytest.mark.parametrize("function", [solo.wmse_loss_func, solo.nnclr_loss_func])
def test_solo(function):
    x, other, along = clustered(6, 5, seed=1), clustered(6, 5, seed=2), randn(6, 5, seed=3)

    def loss(x: Tensor) -> Tensor:
        return function(x, other)

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(x), expected)
    torch.testing.assert_close(vmap(grad(loss))(x[None])[0], expected)
    torch.testing.assert_close(jvp(loss, (x,), (along,))[1], (expected * along).sum())
