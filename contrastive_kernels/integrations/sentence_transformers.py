"""sentence-transformers' losses with in-batch negatives: multiple negatives ranking and GISTEmbed,
each also with cached gradients.

With `gather_across_devices` documents, and those queries that they are compared with, come from all
processes of the default group; the value is the mean over the rank's own rows, and the gradient,
after DDP's mean, that of the mean over all of them.

Losses that inherit from these, such as the symmetric ones and SparseMultipleNegativesRankingLoss,
are patched with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.gist import gist
from ..losses.mnrl import mnrl
from ..types import statistics_dtype
from ._own import Own, cross_entropy, one_entry
from ._ranks import group_if, own_mean, reduce_own
from .swap import Peer, Unfused

PEER = Peer("sentence_transformers", "sentence-transformers", ("6.2", "6.3"))
peer: Any = PEER.load("sentence_transformers.sentence_transformer.losses")
util: Any = PEER.load("sentence_transformers.util")
embed_columns: Any = PEER.load("sentence_transformers.base.losses.merged_forward").embed_columns

_GATHER = Own(PEER.load("sentence_transformers.util.distributed"), "all_gather")


def _beside(module: str, *names: str) -> list[Own]:
    """Functions that a module of the peer's losses imports by name."""
    names = ("all_gather_with_grad", "get_rank", *names)
    return [Own(PEER.load(f"{peer.__name__}.{module}"), *names), _GATHER]


def _guided_own(owner: type, beside: list[Own], *reductions: str) -> Own:
    cosine = {"dim": (-1,), "eps": (1e-8,)}
    return Own(
        owner,
        "sim_matrix",
        parts={
            "similarity_fct": Own(nn.CosineSimilarity, "forward", options=cosine, called=True),
            "cross_entropy_loss": cross_entropy(*reductions),
        },
        beside=beside,
    )


RANKING = Own(peer.MultipleNegativesRankingLoss, beside=_beside("multiple_negatives_ranking"))
CACHED_RANKING = Own(
    peer.CachedMultipleNegativesRankingLoss, beside=_beside("cached_multiple_negatives_ranking")
)
GIST = _guided_own(
    peer.GISTEmbedLoss,
    _beside("gist_embed", "embed_columns", "batch_to_device"),
    "mean", "sum", "none",
)  # fmt: skip
# the peer's sum would depend on the size of mini-batches
CACHED_GIST = _guided_own(peer.CachedGISTEmbedLoss, _beside("cached_gist_embed"), "mean")
NORMALIZES = {util.cos_sim: True, util.pytorch_cos_sim: True, util.dot_score: False}


@PEER.fused(peer.MultipleNegativesRankingLoss, "compute_loss_from_embeddings", own=RANKING)
def _ranking(self: Any, embeddings: list[Tensor], labels: Tensor | None) -> Tensor | Unfused:
    return _rank(self, embeddings)


@PEER.fused(peer.CachedMultipleNegativesRankingLoss, "calculate_loss", own=CACHED_RANKING)
def _cached_ranking(
    self: Any,
    reps: list[list[Tensor]],
    labels: Tensor | None = None,
    *,
    with_backward: bool = False,
) -> Tensor | Unfused:
    """All rows at once: the loss needs no mini-batches, the embeddings keep theirs."""
    return _finish(_rank(self, [torch.cat(column) for column in reps]), with_backward)


@PEER.fused(peer.GISTEmbedLoss, own=GIST)
def _gist(
    self: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor
) -> Tensor | Unfused:
    features = list(sentence_features)
    reason = one_entry(temperature=self.temperature)
    if reason is not None:
        return Unfused(reason)
    if len(features) not in (2, 3):
        return Unfused("the columns are not an anchor, a positive and at most one negative")
    if self.must_retokenize and "cu_seq_lens_q" in features[0]:
        return Unfused("texts without padding are tokenized again for the guide")
    # models write their outputs into what they are given
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
    *,
    with_backward: bool = False,
) -> Tensor | Unfused:
    reason = one_entry(temperature=self.temperature)
    if reason is not None:
        return Unfused(reason)
    columns = ([torch.cat(column) for column in side] for side in (reps, reps_guided))
    return _finish(_guided(self, *columns), with_backward)


def _rank(loss: Any, embeddings: list[Tensor]) -> Tensor | Unfused:
    """`mnrl` of the columns (N, D), with the options of the peer's loss."""
    if loss.similarity_fct not in NORMALIZES:
        return Unfused("similarity_fct is neither cos_sim nor dot_score")
    reason = one_entry(scale=loss.scale)
    if reason is not None:
        return Unfused(reason)
    if len({len(column) for column in embeddings}) > 1 or len(embeddings) < 2:
        return Unfused("documents are not whole columns with a row for each query")
    # half precision is widened as the peer's similarities are: gradients add up before rounding
    query, *documents = (column.to(statistics_dtype(column)) for column in embeddings)
    rows = mnrl(
        query, documents, scale=loss.scale, directions=loss.directions,
        partition_mode=loss.partition_mode, hardness_mode=loss.hardness_mode,
        hardness_strength=loss.hardness_strength, normalize=NORMALIZES[loss.similarity_fct],
        reduction="none", group=group_if(loss.gather_across_devices),
    )  # fmt: skip
    return own_mean(rows)


def _guided(loss: Any, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
    """`gist` of the columns (N, D), with the options of the peer's loss."""
    (anchor, positive, *negatives), (anchor_guide, positive_guide, *negatives_guide) = (
        embeddings, guides,
    )  # fmt: skip
    group, contrast_anchors = group_if(loss.gather_across_devices), loss.contrast_anchors
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
        contrast_anchors=contrast_anchors, contrast_positives=loss.contrast_positives,
        reduction="none", group=group,
    )  # fmt: skip
    return reduce_own(rows, loss.cross_entropy_loss.reduction)


def _for_guide(loss: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """A column of texts as the guide's own tokenizer writes it."""
    texts = loss.tokenizer.batch_decode(features["input_ids"], skip_special_tokens=True)
    return util.batch_to_device(loss.guide.preprocess(texts), loss.guide.device)


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


with warnings.catch_warnings(action="ignore", category=DeprecationWarning):

    class MultipleNegativesSymmetricRankingLoss(peer.MultipleNegativesSymmetricRankingLoss):
        """The peer's `MultipleNegativesSymmetricRankingLoss`, which is deprecated, fused."""

        compute_loss_from_embeddings = _ranking

    class CachedMultipleNegativesSymmetricRankingLoss(
        peer.CachedMultipleNegativesSymmetricRankingLoss
    ):
        """The peer's `CachedMultipleNegativesSymmetricRankingLoss`, which is deprecated, fused."""

        calculate_loss = _cached_ranking
