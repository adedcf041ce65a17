"""What sentence-transformers' losses are fused with: the package, what it must have as its own, and
`mnrl` and `gist` of its columns, with the options of its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.gist import gist
from ..losses.mnrl import mnrl
from ..types import statistics_dtype
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


def ranking_own(owner: type) -> Own:
    parts = {} if HAS_DIRECTIONS else {"cross_entropy_loss": cross_entropy("mean")}
    return Own(owner, parts=parts, beside=_beside(owner))


def _guided_own(owner: type, *reductions: str, beside: tuple[str, ...] = ()) -> Own:
    cosine = {"dim": (-1,), "eps": (1e-8,)}
    parts = {"similarity_fct": Own(nn.CosineSimilarity, "forward", options=cosine, called=True)}
    if GATHERS or owner is peer.CachedGISTEmbedLoss:  # 5.0 makes that of GISTEmbedLoss for a call
        parts["cross_entropy_loss"] = cross_entropy(*reductions)
    return Own(owner, "sim_matrix", parts=parts, beside=_beside(owner, *beside))


RANKING = ranking_own(peer.MultipleNegativesRankingLoss)
CACHED_RANKING = ranking_own(peer.CachedMultipleNegativesRankingLoss)
GIST = _guided_own(
    peer.GISTEmbedLoss, "mean", "sum", "none",
    beside=("embed_columns", "batch_to_device") if PEER.since("6.2")
    else ("embed_columns",) if PEER.since("6.0") else (),
)  # fmt: skip
# the peer's sum would depend on the size of mini-batches
CACHED_GIST = _guided_own(peer.CachedGISTEmbedLoss, "mean")
ALL_FEATURES: Mapping[str, Any] = {}  # no prefixes of them
NORMALIZES = {util.cos_sim: True, util.pytorch_cos_sim: True, util.dot_score: False}


def columns_of(reps: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(column) for column in reps]


def no_rank(loss: Any) -> str | None:
    """Why a ranking loss has to run its own code, whatever the embeddings, or None."""
    if loss.similarity_fct not in NORMALIZES:
        return "similarity_fct is neither cos_sim nor dot_score"
    return one_entry(scale=loss.scale)


def rank(
    loss: Any, embeddings: list[Tensor], prefixes: Mapping[str, Any] = ALL_FEATURES, **options: Any
) -> Tensor | Unfused:
    """`mnrl` of the columns (N, D), with the options of the peer's loss; `prefixes`: dims and
    weights, of unit vectors."""
    reason = no_rank(loss)
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
        query, documents, scale=loss.scale,
        normalize=NORMALIZES[loss.similarity_fct] or bool(prefixes), reduction="none",
        group=group_if(GATHERS and loss.gather_across_devices), **prefixes, **options,
    )  # fmt: skip
    return own_mean(rows)


def no_guide(loss: Any) -> str | None:
    """Why a guided loss has to run its own code, or None."""
    if not MARGINS_BY_SIZE:
        if loss.margin_strategy == "relative" and loss.margin:
            return "relative margins of negative similarities are others before 5.6"
        if GATHERS and group_if(loss.gather_across_devices) is not None:
            return "other ranks' positives are taken for own ones before 5.6"
    return one_entry(temperature=loss.temperature)


def guided_columns(
    loss: Any, sentence_features: Iterable[dict[str, Tensor]]
) -> tuple[list[Tensor], list[Tensor]] | Unfused:
    """The columns (N, D) of a guided loss, and those of its guide."""
    features = list(sentence_features)
    reason = no_guide(loss)
    if reason is not None:
        return Unfused(reason)
    if len(features) not in (2, 3):
        return Unfused("the columns are not an anchor, a positive and at most one negative")
    if loss.must_retokenize and "cu_seq_lens_q" in features[0]:
        return Unfused("texts without padding are tokenized again for the guide")
    guide_features = features
    if PEER.since("5.7"):  # models write their outputs into what they are given
        guide_features = [dict(column) for column in features]
    embeddings = embed_columns(loss.model, features)
    with torch.no_grad():
        if loss.must_retokenize:
            guide_features = [_for_guide(loss, column) for column in guide_features]
        return embeddings, embed_columns(loss.guide, guide_features)


def guided(
    loss: Any,
    embeddings: list[Tensor],
    guides: list[Tensor],
    prefixes: Mapping[str, Any] = ALL_FEATURES,
) -> Tensor:
    """`gist` of the columns (N, D), with the options of the peer's loss; `prefixes` as for
    `rank`."""
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
        reduction="none", group=group, **prefixes,
    )  # fmt: skip
    return reduce_own(rows, reduction)


def _for_guide(loss: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """A column of texts as the guide's own tokenizer writes it."""
    texts = loss.tokenizer.batch_decode(features["input_ids"], skip_special_tokens=True)
    guide = loss.guide
    return util.batch_to_device(
        guide.preprocess(texts) if PEER.since("5.4") else guide.tokenize(texts), guide.device
    )


def finish(loss: Tensor | Unfused, with_backward: bool) -> Tensor | Unfused:
    """The loss; `with_backward` detached, its gradient left in the embeddings."""
    if isinstance(loss, Unfused) or not with_backward:
        return loss
    loss.backward()
    return loss.detach()
