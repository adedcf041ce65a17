"""What users put in the place of parts of the packages' losses, and the reason that is given."""

from __future__ import annotations

import copy
import importlib
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from conformance import since
from oracles import DOUBLE, randn
from torch import nn

N, DIM = 7, 5
HOME = {
    "info_nce": "info_nce",
    "lightly": "lightly.loss",
    "open_clip": "open_clip.loss",
    "pytorch_metric_learning": "pytorch_metric_learning.losses",
    "sentence_transformers": "sentence_transformers.sentence_transformer.losses",
}
if not since("sentence-transformers", "5.4"):
    HOME["sentence_transformers"] = "sentence_transformers.losses"


class Case(NamedTuple):
    """reason: None where the call runs fused all the same. change: of an instance, which it may
    also replace. base: makes a subclass of the drop-in or of the package's class."""

    peer: str
    name: str
    reason: str | None
    change: Callable[[Any], Any] | None = None
    base: Callable[[type], type] | None = None
    options: Callable[[], dict] = dict


def put(**attributes: Any) -> Callable[[Any], None]:
    """Sets attributes; `a__b` is that of a part, and a function becomes a method of its object."""

    def change(loss: Any) -> None:
        for path, value in attributes.items():
            *parts, name = path.split("__")
            thing = loss
            for part in parts:
                thing = getattr(thing, part)
            bound = isinstance(value, types.FunctionType)
            made = value() if isinstance(value, type) else value
            setattr(thing, name, types.MethodType(value, thing) if bound else made)

    return change


def sub(**methods: Callable) -> Callable[[type], type]:
    return lambda cls: type(cls.__name__, (cls,), methods)


def hook(part: str) -> Callable[[Any], None]:
    return lambda loss: getattr(loss, part).register_forward_hook(lambda m, x, out: 2 * out)


def twice(name: str) -> Callable:
    """A method that doubles its parent's result."""

    def method(self, *args, **kwargs):
        out = inherited(type(self), name)(self, *args, **kwargs)
        return tuple(2 * o for o in out) if isinstance(out, tuple) else doubled(out)

    return method


def inherited(cls: type, name: str) -> Callable:
    """The package's own method."""
    packages = tuple(HOME)
    return next(
        vars(c)[name] for c in cls.__mro__
        if name in vars(c) and c.__module__.partition(".")[0] in packages
    )  # fmt: skip


def doubled(out: Any) -> Any:
    if isinstance(out, dict):  # of pytorch-metric-learning
        return {k: v | {"losses": 2 * v["losses"]} for k, v in out.items()}
    return 2 * out


class OtherEntropy(nn.CrossEntropyLoss):
    def forward(self, logits, labels):
        return super().forward(logits / 3, labels)


class DotProduct(nn.Module):
    def forward(self, a, b):
        return (a * b).sum(-1)


class OtherBank(nn.Module):
    size = (0,)

    def forward(self, out, update=False):
        return 3 * out, None


def entropy(**options: Any) -> Callable[[Any], None]:
    return put(cross_entropy=nn.CrossEntropyLoss(**options))


def guide_entropy(**options: Any) -> Callable[[Any], None]:
    return put(cross_entropy_loss=nn.CrossEntropyLoss(**options))


def bank() -> dict:
    return {"memory_bank_size": (11, DIM)}


def half_mean(self, losses, *args):
    return losses.sum() / 5


def by_items(self, mat, indices_tuple):
    """Reads pairs by their number."""
    a1, p = indices_tuple[0], indices_tuple[1]
    reduced = {"losses": mat[a1, p].sum(), "indices": None, "reduction_type": "already_reduced"}
    return {"loss": reduced}


def with_distance(name: str, **options: Any) -> Callable[[], dict]:
    def make() -> dict:
        distances = importlib.import_module("pytorch_metric_learning.distances")
        return {"distance": getattr(distances, name)(**options)}

    return make


def with_reducer(name: str) -> Callable[[], dict]:
    def make() -> dict:
        reducers = importlib.import_module("pytorch_metric_learning.reducers")
        return {"reducer": getattr(reducers, name)()}

    return make


def kind(name: str) -> type:
    """A distance that changes nothing."""
    distances = importlib.import_module("pytorch_metric_learning.distances")
    return type(name, (distances.CosineSimilarity,), {})


def parameter(name: str) -> Callable[[Any], None]:
    def change(loss: Any) -> None:
        value = getattr(loss, name)
        delattr(loss, name)
        setattr(loss, name, nn.Parameter(torch.tensor(float(value), dtype=DOUBLE)))

    return change


def deep(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    def changed(loss: Any) -> Any:
        change(loss)
        return copy.deepcopy(loss)

    return changed


L, C, P, S = "lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers"
CASES = [
    # lightly
    Case(L, "NTXentLoss", None),
    Case(L, "NTXentLoss", None, entropy(label_smoothing=0.2)),
    Case(L, "NTXentLoss", None, entropy(reduction="sum")),
    Case(L, "NTXentLoss", None, entropy(reduction="none", label_smoothing=0.7)),
    Case(L, "NTXentLoss", None, entropy(reduction="sum", label_smoothing=0.3), options=bank),
    Case(L, "NTXentLoss", None, parameter("temperature")),
    Case(L, "NTXentLoss", "cross_entropy.weight is a tensor", entropy(weight=randn(13))),
    Case(L, "NTXentLoss", "cross_entropy.ignore_index is 0", entropy(ignore_index=0)),
    Case(L, "NTXentLoss", "the cross_entropy is MultiMarginLoss",
         put(cross_entropy=nn.MultiMarginLoss)),
    Case(L, "NTXentLoss", "cross_entropy.forward is overridden", put(cross_entropy=OtherEntropy)),
    Case(L, "NTXentLoss", "cross_entropy has hooks", hook("cross_entropy")),
    Case(L, "NTXentLoss", "the memory_bank is OtherBank", put(memory_bank=OtherBank)),
    Case(L, "NTXentLoss", "temperature has more than one entry",
         put(temperature=randn(N, 1).exp())),
    Case(L, "DCLLoss", "_loss is overridden", put(_loss=twice("_loss"))),
    Case(L, "DCLLoss", "_loss is overridden", base=sub(_loss=twice("_loss"))),
    Case(L, "DCLWLoss", "_loss is overridden", deep(put(_loss=twice("_loss")))),
    Case(L, "DCLLoss", None, parameter("temperature")),
    Case(L, "DCLLoss", None, lambda loss: setattr(loss, "weight_fn", lambda a, b: 0.3)),
    Case(L, "DCLLoss", "weight_fn does not give a weight of each row",
         lambda loss: setattr(loss, "weight_fn", lambda a, b: (a * b).sum(1, keepdim=True))),
    # open_clip
    Case(C, "ClipLoss", None),
    Case(C, "ClipLoss", "get_logits is overridden", put(get_logits=twice("get_logits"))),
    Case(C, "ClipLoss", "get_logits is overridden", base=sub(get_logits=twice("get_logits"))),
    Case(C, "ClipLoss", "get_logits is overridden", deep(put(get_logits=twice("get_logits")))),
    Case(C, "ClipLoss", "get_ground_truth is overridden",
         put(get_ground_truth=lambda self, device, n: torch.arange(n).flip(0))),
    Case(C, "SigLipLoss", "_loss is overridden", put(_loss=twice("_loss"))),
    Case(C, "SigLipLoss", "get_logits is overridden", base=sub(get_logits=twice("get_logits"))),
    # pytorch-metric-learning
    Case(P, "NTXentLoss", None, options=with_reducer("MeanReducer")),
    Case(P, "NTXentLoss", "loss_method is overridden",
         base=sub(pair_based_loss=twice("pair_based_loss"))),
    Case(P, "NTXentLoss", "_compute_loss is overridden", put(_compute_loss=twice("_compute_loss"))),
    Case(P, "NTXentLoss", "MeanReducer needs the loss of every pair",
         put(reducer__pos_pair_reduction=half_mean)),
    Case(P, "NTXentLoss", "MeanReducer needs the loss of every pair", hook("reducer")),
    Case(P, "NTXentLoss", "temperature has more than one entry",
         put(temperature=randn(46, 1).exp())),
    Case(P, "NTXentLoss", None, parameter("temperature")),
    Case(P, "SupConLoss", None),
    Case(P, "SupConLoss", None, parameter("temperature")),
    Case(P, "SupConLoss", "loss_method is overridden",
         base=sub(mat_based_loss=twice("mat_based_loss"))),
    Case(P, "SupConLoss", "loss_method is overridden",
         deep(put(loss_method=twice("mat_based_loss")))),
    Case(P, "SupConLoss", "distance.compute_mat is overridden",
         put(distance__compute_mat=twice("compute_mat"))),
    Case(P, "SupConLoss", "distance.normalize is overridden",
         put(distance__normalize=lambda self, x, **options: x / 3)),
    Case(P, "SupConLoss", "distance.is_inverted is False", put(distance__is_inverted=False)),
    Case(P, "SupConLoss", "distance has hooks", hook("distance")),
    Case(P, "SupConLoss", "the distance is LpDistance", options=with_distance("LpDistance")),
    Case(P, "SupConLoss", None, lambda loss: setattr(loss.distance, "__class__", kind("Same"))),
    Case(P, "SupConLoss", "zero_losses is overridden", put(zero_losses=twice("zero_losses"))),
    Case(P, "SupConLoss", None, put(reducer__low=1.5)),
    Case(P, "SupConLoss", None, put(reducer__element_reduction=half_mean)),
    Case(P, "SupConLoss", None, hook("reducer"), options=with_reducer("MeanReducer")),
    # sentence-transformers
    Case(S, "MultipleNegativesRankingLoss", None),
    Case(S, "MultipleNegativesRankingLoss", None, parameter("scale")),
    Case(S, "MultipleNegativesRankingLoss", "similarity_fct is neither cos_sim nor dot_score",
         lambda loss: setattr(loss, "similarity_fct", lambda a, b: -torch.cdist(a, b))),
    Case(S, "MultipleNegativesRankingLoss", "scale has more than one entry",
         put(scale=randn(N, 1).exp())),
    Case(S, "GISTEmbedLoss", None),
    *[
        Case(S, "GISTEmbedLoss", None, guide_entropy(reduction="sum")),
        Case(S, "GISTEmbedLoss", None, guide_entropy(reduction="none")),
        Case(S, "GISTEmbedLoss", "cross_entropy_loss.label_smoothing is 0.2",
             guide_entropy(label_smoothing=0.2)),
    ] * since("sentence-transformers", "5.1"),
    Case(S, "GISTEmbedLoss", "the similarity_fct is DotProduct",
         put(similarity_fct=DotProduct)),
    Case(S, "GISTEmbedLoss", "similarity_fct.eps is 9.0", put(similarity_fct__eps=9.0)),
    Case(S, "GISTEmbedLoss", "sim_matrix is overridden", put(sim_matrix=twice("sim_matrix"))),
    Case(S, "GISTEmbedLoss", "sim_matrix is overridden", base=sub(sim_matrix=twice("sim_matrix"))),
    Case(S, "CachedGISTEmbedLoss", None),
    Case(S, "CachedGISTEmbedLoss", "cross_entropy_loss.reduction is 'sum'",
         guide_entropy(reduction="sum")),
    Case(S, "CachedGISTEmbedLoss", "sim_matrix is overridden",
         put(sim_matrix=twice("sim_matrix"))),
]  # fmt: skip
