"""sentence-transformers' losses with in-batch negatives: multiple negatives ranking and GISTEmbed,
each also with cached gradients; and its `mine_hard_negatives`.

With `gather_across_devices` documents, and those queries that they are compared with, come from all
processes of the default group; the value is the mean over the rank's own rows, and the gradient,
after DDP's mean, that of the mean over all of them.

Losses that inherit from these, such as SparseMultipleNegativesRankingLoss, are patched with them.

What versions differ in: 5.1 gathers, 5.3 has directions and hardness, and its symmetric losses
inherit from the others; 5.4 has another layout, 5.6 other relative margins.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.gist import gist
from ..losses.mnrl import mnrl
from ..types import statistics_dtype
from ._mining import Scoring
from ._own import Own, cross_entropy, one_entry
from ._ranks import group_if, own_mean, reduce_own
from .swap import Peer, Unfused

PEER = Peer("sentence_transformers", "sentence-transformers", ("5.0", "6.3"))
GATHERS, HAS_DIRECTIONS, MARGINS_BY_SIZE = (PEER.since(v) for v in ("5.1", "5.3", "5.6"))
peer: Any = PEER.load(
    "sentence_transformers.sentence_transformer.losses"
    if PEER.since("5.4")
    else "sentence_transformers.losses"
)
util: Any = PEER.load("sentence_transformers.util")

SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def _embed_each(model: Any, features: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    return [model(column)["sentence_embedding"] for column in features]


embed_columns: Callable = _embed_each
if PEER.since("6.0"):
    embed_columns = PEER.load("sentence_transformers.base.losses.merged_forward").embed_columns


def _beside(owner: type, *names: str) -> list[Own]:
    """Functions that the module of a loss imports by name."""
    if not GATHERS:
        return [Own(PEER.load(owner.__module__), *names)] if names else []
    names = ("all_gather_with_grad", *names)
    if PEER.since("6.0"):
        names = ("get_rank", *names)
    elif PEER.since("5.6"):
        names = ("is_dist_initialized", *names)
    gather = PEER.load("sentence_transformers.util.distributed")
    return [Own(PEER.load(owner.__module__), *names), Own(gather, "all_gather")]


def _ranking_own(owner: type) -> Own:
    parts = {} if HAS_DIRECTIONS else {"cross_entropy_loss": cross_entropy("mean")}
    return Own(owner, parts=parts, beside=_beside(owner))


def _guided_own(owner: type, *reductions: str, beside: tuple[str, ...] = ()) -> Own:
    cosine = {"dim": (-1,), "eps": (1e-8,)}
    parts = {"similarity_fct": Own(nn.CosineSimilarity, "forward", options=cosine, called=True)}
    if GATHERS or owner is peer.CachedGISTEmbedLoss:  # 5.0 makes that of GISTEmbedLoss for a call
        parts["cross_entropy_loss"] = cross_entropy(*reductions)
    return Own(owner, "sim_matrix", parts=parts, beside=_beside(owner, *beside))


RANKING = _ranking_own(peer.MultipleNegativesRankingLoss)
CACHED_RANKING = _ranking_own(peer.CachedMultipleNegativesRankingLoss)
GIST = _guided_own(
    peer.GISTEmbedLoss, "mean", "sum", "none",
    beside=("embed_columns", "batch_to_device") if PEER.since("6.2")
    else ("embed_columns",) if PEER.since("6.0") else (),
)  # fmt: skip
# the peer's sum would depend on the size of mini-batches
CACHED_GIST = _guided_own(peer.CachedGISTEmbedLoss, "mean")
NORMALIZES = {util.cos_sim: True, util.pytorch_cos_sim: True, util.dot_score: False}


@PEER.fused(peer.MultipleNegativesRankingLoss, "compute_loss_from_embeddings", own=RANKING)
def _ranking(self: Any, embeddings: list[Tensor], labels: Tensor | None) -> Tensor | Unfused:
    return _rank(self, embeddings)


@PEER.fused(peer.CachedMultipleNegativesRankingLoss, "calculate_loss", own=CACHED_RANKING)
def _cached_ranking(
    self: Any,
    reps: list[list[Tensor]],
    labels: Tensor | bool | None = None,
    *,
    with_backward: bool = False,
) -> Tensor | Unfused:
    """All rows at once: the loss needs no mini-batches, the embeddings keep theirs.

    Before 5.7 the second argument is with_backward.
    """
    return _finish(_rank(self, _columns(reps)), with_backward or labels is True)


def _symmetric(
    self: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor
) -> Tensor | Unfused:
    return _rank(self, embed_columns(self.model, sentence_features), **SYMMETRIC)


def _symmetric_embeddings(self: Any, embeddings: list[Tensor], labels: Tensor) -> Tensor | Unfused:
    return _rank(self, embeddings, **SYMMETRIC)


def _cached_symmetric(
    self: Any, reps: list[list[Tensor]], with_backward: bool = False
) -> Tensor | Unfused:
    if not GATHERS:
        return Unfused("queries are compared with the documents of a mini-batch only, before 5.1")
    return _finish(_rank(self, _columns(reps), **SYMMETRIC), with_backward)


symmetric: dict[str, Callable] = {"compute_loss_from_embeddings": _ranking}
cached_symmetric: dict[str, Callable] = {"calculate_loss": _cached_ranking}
if not HAS_DIRECTIONS:  # classes of their own
    owner = peer.MultipleNegativesSymmetricRankingLoss
    name = "compute_loss_from_embeddings" if GATHERS else "forward"
    form: Callable = _symmetric_embeddings if GATHERS else _symmetric
    symmetric = {name: PEER.fused(owner, name, own=_ranking_own(owner))(form)}
    owner, name = peer.CachedMultipleNegativesSymmetricRankingLoss, "calculate_loss"
    cached_symmetric = {name: PEER.fused(owner, name, own=_ranking_own(owner))(_cached_symmetric)}


@PEER.fused(peer.GISTEmbedLoss, own=GIST)
def _gist(
    self: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor
) -> Tensor | Unfused:
    features = list(sentence_features)
    reason = _no_guide(self)
    if reason is not None:
        return Unfused(reason)
    if len(features) not in (2, 3):
        return Unfused("the columns are not an anchor, a positive and at most one negative")
    if self.must_retokenize and "cu_seq_lens_q" in features[0]:
        return Unfused("texts without padding are tokenized again for the guide")
    guide_features = features
    if PEER.since("5.7"):  # models write their outputs into what they are given
        guide_features = [dict(column) for column in features]
    embeddings = embed_columns(self.model, features)
    with torch.no_grad():
        if self.must_retokenize:
            guide_features = [_for_guide(self, column) for column in guide_features]
        guides = embed_columns(self.guide, guide_features)
    return _guided(self, embeddings, guides)


@PEER.fused(peer.CachedGISTEmbedLoss, "calculate_loss", own=CACHED_GIST)
def _cached_gist(
    self: Any,
    reps: list[list[Tensor]],
    reps_guided: list[list[Tensor]],
    with_backward: bool = False,
) -> Tensor | Unfused:
    reason = _no_guide(self)
    if reason is not None:
        return Unfused(reason)
    return _finish(_guided(self, _columns(reps), _columns(reps_guided)), with_backward)


_SIGNATURE = inspect.signature(util.mine_hard_negatives)
_mine_unfused = util.mine_hard_negatives


@PEER.fused(util, "mine_hard_negatives", own=Own(util))
def mine_hard_negatives(*args: Any, **options: Any) -> Any:
    """The peer's `mine_hard_negatives`, with the search alone fused, by `top_k`."""
    given = _SIGNATURE.bind(*args, **options)
    model = given.arguments["model"]
    similarity = getattr(model, "similarity", None)
    if similarity not in NORMALIZES:
        return Unfused("the model's similarity is neither cos_sim nor dot_score")
    if given.arguments.get("use_faiss"):
        return Unfused("use_faiss=True searches with faiss", expected=True)
    given.arguments["model"] = Scoring(model, NORMALIZES[similarity])
    return _mine_unfused(*given.args, **given.kwargs)


def _columns(reps: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(column) for column in reps]


def _rank(loss: Any, embeddings: list[Tensor], **options: Any) -> Tensor | Unfused:
    """`mnrl` of the columns (N, D), with the options of the peer's loss."""
    if loss.similarity_fct not in NORMALIZES:
        return Unfused("similarity_fct is neither cos_sim nor dot_score")
    reason = one_entry(scale=loss.scale)
    if reason is not None:
        return Unfused(reason)
    if len({len(column) for column in embeddings}) > 1 or len(embeddings) < 2:
        return Unfused("documents are not whole columns with a row for each query")
    if HAS_DIRECTIONS:
        options = {
            "directions": loss.directions,
            "partition_mode": loss.partition_mode,
            "hardness_mode": loss.hardness_mode,
            "hardness_strength": loss.hardness_strength,
        }
    # half precision is widened as the peer's similarities are: gradients add up before rounding
    query, *documents = (column.to(statistics_dtype(column)) for column in embeddings)
    rows = mnrl(
        query, documents, scale=loss.scale, normalize=NORMALIZES[loss.similarity_fct],
        reduction="none", group=group_if(GATHERS and loss.gather_across_devices), **options,
    )  # fmt: skip
    return own_mean(rows)


def _no_guide(loss: Any) -> str | None:
    """Why a guided loss has to run its own code, or None."""
    if not MARGINS_BY_SIZE:
        if loss.margin_strategy == "relative" and loss.margin:
            return "relative margins of negative similarities are others before 5.6"
        if GATHERS and group_if(loss.gather_across_devices) is not None:
            return "other ranks' positives are taken for own ones before 5.6"
    return one_entry(temperature=loss.temperature)


def _guided(loss: Any, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
    """`gist` of the columns (N, D), with the options of the peer's loss."""
    (anchor, positive, *negatives), (anchor_guide, positive_guide, *negatives_guide) = (
        embeddings, guides,
    )  # fmt: skip
    group, contrast_anchors, contrast_positives, reduction = None, True, True, "mean"
    if GATHERS:
        group, reduction = group_if(loss.gather_across_devices), loss.cross_entropy_loss.reduction
        contrast_anchors, contrast_positives = loss.contrast_anchors, loss.contrast_positives
    if group is not None:
        negatives, negatives_guide = (
            [util.all_gather_with_grad(column) for column in side]
            for side in (negatives, negatives_guide)
        )
        if contrast_anchors:  # the peer gathers all but these: only this rank's contrast
            negatives, negatives_guide = [*negatives, anchor], [*negatives_guide, anchor_guide]
            contrast_anchors = False
    rows = gist(
        anchor, positive, anchor_guide, positive_guide,
        negatives=torch.cat(negatives) if negatives else None,
        negatives_guide=torch.cat(negatives_guide) if negatives else None,
        scale=1 / loss.temperature, margin=loss.margin, margin_strategy=loss.margin_strategy,
        contrast_anchors=contrast_anchors, contrast_positives=contrast_positives,
        reduction="none", group=group,
    )  # fmt: skip
    return reduce_own(rows, reduction)


def _for_guide(loss: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """A column of texts as the guide's own tokenizer writes it."""
    texts = loss.tokenizer.batch_decode(features["input_ids"], skip_special_tokens=True)
    guide = loss.guide
    return util.batch_to_device(
        guide.preprocess(texts) if PEER.since("5.4") else guide.tokenize(texts), guide.device
    )


def _finish(loss: Tensor | Unfused, with_backward: bool) -> Tensor | Unfused:
    """The loss; `with_backward` detached, its gradient left in the embeddings."""
    if isinstance(loss, Unfused) or not with_backward:
        return loss
    loss.backward()
    return loss.detach()


class MultipleNegativesRankingLoss(peer.MultipleNegativesRankingLoss):
    """The peer's `MultipleNegativesRankingLoss`, fused: `mnrl`."""

    compute_loss_from_embeddings = _ranking


class CachedMultipleNegativesRankingLoss(peer.CachedMultipleNegativesRankingLoss):
    """The peer's `CachedMultipleNegativesRankingLoss`, fused: `mnrl` of all rows at once."""

    calculate_loss = _cached_ranking


class GISTEmbedLoss(peer.GISTEmbedLoss):
    """The peer's `GISTEmbedLoss`, fused: `gist`."""

    forward = _gist


class CachedGISTEmbedLoss(peer.CachedGISTEmbedLoss):
    """The peer's `CachedGISTEmbedLoss`, fused: `gist` of all rows at once."""

    calculate_loss = _cached_gist


def _drop_in(owner: type, methods: dict[str, Callable]) -> type:
    """A subclass of a deprecated class, of its name."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        doc = f"The peer's `{owner.__name__}`, which newer versions deprecate, fused."
        return type(owner.__name__, (owner,), methods | {"__doc__": doc, "__module__": __name__})


MultipleNegativesSymmetricRankingLoss: Any = _drop_in(
    peer.MultipleNegativesSymmetricRankingLoss, symmetric
)
CachedMultipleNegativesSymmetricRankingLoss: Any = _drop_in(
    peer.CachedMultipleNegativesSymmetricRankingLoss, cached_symmetric
)
