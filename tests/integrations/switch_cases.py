"""Drop-ins beside their peers on several ranks, each with its switches, in float64."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracles import DOUBLE, randn
from torch import Tensor, nn

import contrastive_kernels as ck
from benchmarks.baselines.loading import declare_torchvision
from contrastive_kernels import reference

PACKAGES = ("open_clip", "lightly", "sentence_transformers")
ROWS, RAW, DIM = 4, 6, 5
UNEVEN, EMPTY = (5, 2, 3), (3, 0, 5)  # rows of each rank


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
        many = {} if alone else self.many
        if self.package == "open_clip" and not alone:
            many = {**many, "rank": dist.get_rank(), "world_size": dist.get_world_size()}
        models = ()
        if self.package == "sentence_transformers":
            models = stubs()[: 2 if "GIST" in self.name else 1]
        return getattr(module, self.name)(*models, **self.options, **many, **more)


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


def distill(loss, images, texts, scale, bias):
    """A teacher that learns too."""
    return sum(loss(images, texts, scale, 0.5 * texts, images + texts, 1.5 * scale))


def views(loss, images, texts, scale, bias):
    return loss(images, texts)


def with_bank(loss, images, texts, scale, bias):
    """Two steps, the second of which meets the features of the first in the bank."""
    loss.memory_bank.bank = randn(11, DIM, seed=7)
    return loss(images, texts) + 2 * loss(texts, images)


class Embeddings(nn.Module):
    """Stands in for a model whose embeddings come with its inputs, under a name."""

    def __init__(self, name: str) -> None:
        from transformers import BertTokenizerFast

        super().__init__()
        self.name, self.max_seq_length = name, 16
        self.tokenizer = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3})

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.name]}

    def __getitem__(self, index: int) -> nn.Module:
        return self


@cache
def stubs() -> tuple[Embeddings, Embeddings]:
    return Embeddings("model"), Embeddings("guide")


def columns(images: Tensor, texts: Tensor, negatives: int) -> list[Tensor]:
    """Queries, documents, and columns of hard negatives."""
    return [images, texts, images - texts, 2 * texts - images][: 2 + negatives]


def guides(embeddings: list[Tensor]) -> list[Tensor]:
    return [column.detach() @ randn(DIM, 3, seed=9) for column in embeddings]


def ranking(negatives: int = 0):
    def run(loss, images, texts, scale, bias):
        return loss.compute_loss_from_embeddings(columns(images, texts, negatives), None)

    return run


def in_batches(embeddings: list[Tensor]) -> list[list[Tensor]]:
    return [list(column.split(3)) for column in embeddings]


def cached_ranking(loss, images, texts, scale, bias):
    return loss.calculate_loss(in_batches(columns(images, texts, 1)))


def cached_backward(loss, images, texts, scale, bias):
    """The gradient that `calculate_loss` leaves in the embeddings, as that of the value."""
    embeddings = columns(images, texts, 1)
    leaves = [column.detach().requires_grad_() for column in embeddings]
    value = loss.calculate_loss(in_batches(leaves), with_backward=True)
    product = sum((e * leaf.grad).sum() for e, leaf in zip(embeddings, leaves, strict=True))
    return value + product - product.detach()


def gist(negatives: int = 0):
    def run(loss, images, texts, scale, bias):
        embeddings = columns(images, texts, negatives)
        pairs = zip(embeddings, guides(embeddings), strict=True)
        return loss([{"model": e, "guide": g} for e, g in pairs], None)

    return run


def cached_gist(loss, images, texts, scale, bias):
    embeddings = columns(images, texts, 2)
    return loss.calculate_loss(in_batches(embeddings), in_batches(guides(embeddings)))


CLIP_CALLS = {
    "": clip,
    ", bias": biased,
    ", frozen images": frozen_images,
    ", number": with_number,
}


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
HARD = {"hardness_mode": "all_negatives", "hardness_strength": 3.0}
SENTENCE_CASES = {
    "Ranking": ("MultipleNegativesRankingLoss", {}, ranking()),
    "Ranking, negatives": ("MultipleNegativesRankingLoss", HARD, ranking(2)),
    "Ranking, both directions": ("MultipleNegativesRankingLoss", BOTH, ranking(1)),
    "Ranking, all directions": (
        "MultipleNegativesRankingLoss", {"directions": ALL, **HARD}, ranking(1)
    ),
    "Symmetric ranking": ("MultipleNegativesSymmetricRankingLoss", {}, ranking()),
    "Cached ranking": (
        "CachedMultipleNegativesRankingLoss", {"mini_batch_size": 3}, cached_ranking
    ),
    "Cached ranking, backward": (
        "CachedMultipleNegativesRankingLoss", {"mini_batch_size": 3}, cached_backward
    ),
    "GIST": ("GISTEmbedLoss", {"temperature": 0.1}, gist()),
    "GIST, negatives": ("GISTEmbedLoss", {"temperature": 0.1, "margin": 0.1}, gist(1)),
    "GIST, documents": (
        "GISTEmbedLoss", {"temperature": 0.1, "contrast_anchors": False}, gist(1)
    ),
    "Cached GIST": (
        "CachedGISTEmbedLoss", {"temperature": 0.1, "mini_batch_size": 3}, cached_gist
    ),
}  # fmt: skip


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
        found[f"DistillClipLoss {title}"] = Case("open_clip", "DistillClipLoss", many, {}, distill)
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
    return found | {
        title: Case("sentence_transformers", name, {"gather_across_devices": True}, options, run)
        for title, (name, options, run) in SENTENCE_CASES.items()
    }


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
    from sentence_transformers.sentence_transformer import losses

    from contrastive_kernels.integrations import lightly as fused_lightly
    from contrastive_kernels.integrations import open_clip as fused_open_clip
    from contrastive_kernels.integrations import sentence_transformers as fused_sentences

    return {
        "open_clip": (fused_open_clip, open_clip.loss),
        "lightly": (fused_lightly, lightly.loss),
        "sentence_transformers": (fused_sentences, losses),
    }


def everything() -> dict[str, dict]:
    """By case: the drop-in, the peer, one process, and where there is one, grad_scale="exact"."""
    torch.set_default_dtype(DOUBLE)
    warnings.simplefilter("ignore")  # the packages' own, and that one combination runs unfused
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
    return {
        "cases": report, "status": status, "patched": patched(loaded), "uneven": uneven(loaded),
        "own rows": uneven_own_rows(loaded),
    }  # fmt: skip


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


OWN_ROWS = {
    "ClipLoss local_loss=True, gather_with_grad=True": lambda images, texts, scale, bias:
        reference.clip_loss(images, texts, scale, reduction="none"),
    "SigLipLoss dist_impl=bidir": lambda images, texts, scale, bias:
        reference.siglip_loss(images, texts, scale, bias, reduction="none"),
    "NTXentLoss": lambda images, texts, scale, bias:
        reference.nt_xent(images, texts, temperature=0.5, reduction="none").view(2, -1).mean(0),
}  # fmt: skip


def uneven_own_rows(loaded: dict) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Losses of own rows, one rank without any, beside the mean of the ranks' means."""
    sizes, report = list(EMPTY[: dist.get_world_size()]), {}
    whole = Inputs.of(sum(sizes))
    for name, rows in OWN_ROWS.items():
        case = cases()[name]
        got = outcome(case, case.build(loaded[case.package][0]), whole.part(rows_of(sizes)))
        mean = case._replace(run=partial(mean_of_means, rows, sizes))
        wanted = outcome(mean, None, whole)
        report[name] = {"got": averaged(got), "wanted": wanted, "value": got["value"]}
    return report


def mean_of_means(rows: Callable, sizes: list[int], loss: None, *inputs: Tensor) -> Tensor:
    means = [part.sum() / max(len(part), 1) for part in rows(*inputs).split(sizes)]
    return sum(means) / len(sizes)
