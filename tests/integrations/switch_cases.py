"""Drop-ins beside their peers on several ranks, each with its switches, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracles import DOUBLE, randn
from torch import Tensor, nn

import contrastive_kernels as ck
from benchmarks.peers import declare_torchvision

ROWS, RAW, DIM = 4, 6, 5
UNEVEN = (5, 2, 3)  # rows of each rank


class Case(NamedTuple):
    """A loss and its switches.

    many: those of the peer on several ranks, which one process does without.
    run: calls it with the features of two views, a scale and a bias.
    """

    package: str
    name: str
    many: dict[str, Any]
    options: dict[str, Any]
    run: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]
    rows: int = ROWS

    def build(self, module, *, alone: bool = False, **more: Any) -> nn.Module:
        many = self.many
        if self.package == "open_clip":
            many = {**many, "rank": dist.get_rank(), "world_size": dist.get_world_size()}
        return getattr(module, self.name)(**self.options, **({} if alone else many), **more)


def clip(loss, images, texts, scale, bias):
    return loss(images, texts, scale)


def biased(loss, images, texts, scale, bias):
    return loss(images, texts, scale, bias)


def in_dict(loss, images, texts, scale, bias):
    return loss(images, texts, scale, bias, output_dict=True)["contrastive_loss"]


def with_number(loss, images, texts, scale, bias):
    return loss(images, texts, 7.5)


def frozen_images(loss, images, texts, scale, bias):
    return loss(images.detach(), texts, scale)


def coca(loss, images, texts, scale, bias):
    labels = torch.ones(len(images), 4, dtype=torch.long)
    return sum(loss(images, texts, images.new_ones(len(images), 4, 7), labels, scale))


def views(loss, images, texts, scale, bias):
    return loss(images, texts)


def with_bank(loss, images, texts, scale, bias):
    """Two steps, the second of which meets the features of the first in the bank."""
    loss.memory_bank.bank = randn(11, DIM, seed=7)
    return loss(images, texts) + 2 * loss(texts, images)


CLIP_CALLS = {
    "": clip,
    ", bias": biased,
    ", frozen images": frozen_images,
    ", number": with_number,
}


def cases() -> dict[str, Case]:
    found = {}
    for local, grad in itertools.product((False, True), repeat=2):
        many = {"local_loss": local, "gather_with_grad": grad}
        title = f"local_loss={local}, gather_with_grad={grad}"
        for call, run in CLIP_CALLS.items():
            found[f"ClipLoss {title}{call}"] = Case("open_clip", "ClipLoss", many, {}, run)
        found[f"ClipLoss {title}, one pair"] = Case("open_clip", "ClipLoss", many, {}, clip, 1)
        weights = {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5}
        found[f"CoCaLoss {title}"] = Case("open_clip", "CoCaLoss", many, weights, coca)
    for way in (None, "bidir", "shift", "reduce", "gather"):
        many = {"dist_impl": way}
        found[f"SigLipLoss dist_impl={way}"] = Case("open_clip", "SigLipLoss", many, {}, in_dict)
    gather = {"gather_distributed": True}
    found["NTXentLoss"] = Case("lightly", "NTXentLoss", gather, {}, views)
    found["NTXentLoss, memory bank"] = Case(
        "lightly", "NTXentLoss", gather, {"memory_bank_size": (11, DIM)}, with_bank
    )
    found["DCLLoss"] = Case("lightly", "DCLLoss", gather, {}, views)
    weighted = {"weight_fn": lambda a, b: (a - b).square().sum(1)}
    found["DCLLoss, weights"] = Case("lightly", "DCLLoss", gather, weighted, views)
    found["DCLWLoss"] = Case("lightly", "DCLWLoss", gather, {"sigma": 0.7}, views)
    for name in ("NTXentLoss", "DCLLoss"):
        found[f"{name}, one pair"] = found[name]._replace(rows=1)
    return found


class Inputs(NamedTuple):
    """Rows of a batch in two views, encoders of them, a scale and a bias."""

    images: Tensor
    texts: Tensor
    encoders: Tensor
    scale: Tensor
    bias: Tensor

    @staticmethod
    def of(rows: int) -> Inputs:
        images = randn(rows, RAW, seed=1)
        return Inputs(
            images, images + 0.5 * randn(rows, RAW, seed=2),
            randn(2, RAW, DIM, seed=3).requires_grad_(),
            torch.tensor(6.0, dtype=DOUBLE, requires_grad=True),
            torch.tensor(-1.5, dtype=DOUBLE, requires_grad=True),
        )  # fmt: skip

    def part(self, rows: slice) -> Inputs:
        return self._replace(images=self.images[rows], texts=self.texts[rows])


GRADIENTS = ("images", "texts", "encoder", "scale", "bias")


def outcome(case: Case, loss: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The value, and the gradients of features and parameters on this rank."""
    images = F.normalize(inputs.images @ inputs.encoders[0], dim=1)
    texts = F.normalize(inputs.texts @ inputs.encoders[1], dim=1)
    value = case.run(loss, images, texts, inputs.scale, inputs.bias)
    sources = [images, texts, inputs.encoders, inputs.scale, inputs.bias]
    # twice the loss: gradients must follow an upstream gradient
    gradients = torch.autograd.grad(2 * value, sources, allow_unused=True)
    filled = (
        torch.zeros_like(s) if g is None else g for s, g in zip(sources, gradients, strict=True)
    )
    return {"value": value.detach(), **dict(zip(GRADIENTS, filled, strict=True))}


def averaged(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """The value and the gradients of parameters after DDP's mean over the ranks."""
    means = {}
    for name in ("value", "encoder", "scale", "bias"):
        means[name] = result[name].clone()
        dist.all_reduce(means[name])
        means[name] /= dist.get_world_size()
    return means


def rows_of(sizes: list[int]) -> slice:
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def modules() -> dict[str, tuple]:
    declare_torchvision()
    import lightly.loss
    import open_clip.loss

    from contrastive_kernels.integrations import lightly as fused_lightly
    from contrastive_kernels.integrations import open_clip as fused_open_clip

    return {
        "open_clip": (fused_open_clip, open_clip.loss),
        "lightly": (fused_lightly, lightly.loss),
    }


def everything() -> dict[str, dict]:
    """By case: the drop-in, the peer, one process, and where there is one, grad_scale="exact"."""
    torch.set_default_dtype(DOUBLE)
    loaded, world, report = modules(), dist.get_world_size(), {}
    for name, case in cases().items():
        fused, peer = loaded[case.package]
        whole = Inputs.of(world * case.rows)
        mine = whole.part(rows_of(world * [case.rows]))
        runs = {"ours": case.build(fused), "peer": case.build(peer)}
        if case.package == "open_clip":
            runs["exact"] = case.build(fused, grad_scale="exact")
        results = {key: outcome(case, loss, mine) for key, loss in runs.items()}
        report[name] = {
            "results": results,
            "averaged": {key: averaged(result) for key, result in results.items()},
            "one process": outcome(case, case.build(peer, alone=True), whole),
        }
    status = {
        f"{package}.{label}": s
        for package, of in ck.patch_status().items()
        for label, s in of.items()
    }
    return {"cases": report, "status": status, "patched": patched(loaded), "uneven": uneven(loaded)}


def patched(loaded: dict) -> dict[str, dict[str, Tensor]]:
    """The peer's own class with a patch, averaged, beside one process."""
    case = cases()["ClipLoss local_loss=True, gather_with_grad=False"]
    peer = loaded["open_clip"][1]
    whole = Inputs.of(dist.get_world_size() * ROWS)
    mine = whole.part(rows_of(dist.get_world_size() * [ROWS]))
    loss = case.build(peer)
    with ck.patched("open_clip", grad_scale="exact"):
        got = averaged(outcome(case, loss, mine))
    return {"got": got, "wanted": outcome(case, case.build(peer, alone=True), whole)}


def uneven(loaded: dict) -> dict[str, dict[str, dict[str, Tensor]]]:
    """grad_scale="exact" with as many rows on each rank as there happen to be."""
    sizes, report = list(UNEVEN[: dist.get_world_size()]), {}
    whole = Inputs.of(sum(sizes))
    for name, case in cases().items():
        if case.package == "open_clip" and case.run in (clip, in_dict) and case.rows > 1:
            fused, peer = loaded["open_clip"]
            loss = case.build(fused, grad_scale="exact")
            got = averaged(outcome(case, loss, whole.part(rows_of(sizes))))
            wanted = outcome(case, case.build(peer, alone=True), whole)
            report[name] = {"got": got, "wanted": wanted}
    return report
