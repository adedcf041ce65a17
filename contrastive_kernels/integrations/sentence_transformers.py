"""sentence-transformers' losses with in-batch negatives: multiple negatives ranking and GISTEmbed,
each also with cached gradients, and at several prefixes of the embeddings (`_matryoshka.py`);
and its `mine_hard_negatives` (`_mining.py`).

With `gather_across_devices` documents, and those queries that they are compared with, come from all
processes of the default group; the value is the mean over the rank's own rows, and the gradient,
after DDP's mean, that of the mean over all of them.

Losses that inherit from these, such as SparseMultipleNegativesRankingLoss, are patched with them.

What versions differ in: 5.1 gathers, 5.3 has directions and hardness, and its symmetric losses
inherit from the others; 5.4 has another layout, 5.6 other relative margins.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from . import _matryoshka, _multi_vector
from ._mining import mine_hard_negatives as mine_hard_negatives
from ._sentence import (
    CACHED_GIST,
    CACHED_RANKING,
    GATHERS,
    GIST,
    HAS_DIRECTIONS,
    PEER,
    RANKING,
    columns_of,
    embed_columns,
    finish,
    guided,
    guided_columns,
    no_guide,
    peer,
    rank,
    ranking_own,
)
from .swap import Unfused

SYMMETRIC: dict[str, Any] = {
    "directions": ("query_to_doc", "doc_to_query"),
    "partition_mode": "per_direction",
}


@PEER.fused(peer.MultipleNegativesRankingLoss, "compute_loss_from_embeddings", own=RANKING)
def _ranking(self: Any, embeddings: list[Tensor], labels: Tensor | None) -> Tensor | Unfused:
    return rank(self, embeddings)


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
    return finish(rank(self, columns_of(reps)), with_backward or labels is True)


def _symmetric(
    self: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor
) -> Tensor | Unfused:
    return rank(self, embed_columns(self.model, sentence_features), **SYMMETRIC)


def _symmetric_embeddings(self: Any, embeddings: list[Tensor], labels: Tensor) -> Tensor | Unfused:
    return rank(self, embeddings, **SYMMETRIC)


def _cached_symmetric(
    self: Any, reps: list[list[Tensor]], with_backward: bool = False
) -> Tensor | Unfused:
    if not GATHERS:
        return Unfused("queries are compared with the documents of a mini-batch only, before 5.1")
    return finish(rank(self, columns_of(reps), **SYMMETRIC), with_backward)


symmetric: dict[str, Callable] = {"compute_loss_from_embeddings": _ranking}
cached_symmetric: dict[str, Callable] = {"calculate_loss": _cached_ranking}
if not HAS_DIRECTIONS:  # classes of their own
    owner = peer.MultipleNegativesSymmetricRankingLoss
    name = "compute_loss_from_embeddings" if GATHERS else "forward"
    form: Callable = _symmetric_embeddings if GATHERS else _symmetric
    symmetric = {name: PEER.fused(owner, name, own=ranking_own(owner))(form)}
    owner, name = peer.CachedMultipleNegativesSymmetricRankingLoss, "calculate_loss"
    cached_symmetric = {name: PEER.fused(owner, name, own=ranking_own(owner))(_cached_symmetric)}


@PEER.fused(peer.GISTEmbedLoss, own=GIST)
def _gist(
    self: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor
) -> Tensor | Unfused:
    columns = guided_columns(self, sentence_features)
    return columns if isinstance(columns, Unfused) else guided(self, *columns)


@PEER.fused(peer.CachedGISTEmbedLoss, "calculate_loss", own=CACHED_GIST)
def _cached_gist(
    self: Any,
    reps: list[list[Tensor]],
    reps_guided: list[list[Tensor]],
    with_backward: bool = False,
) -> Tensor | Unfused:
    reason = no_guide(self)
    if reason is not None:
        return Unfused(reason)
    return finish(guided(self, columns_of(reps), columns_of(reps_guided)), with_backward)


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


class MatryoshkaLoss(peer.MatryoshkaLoss):
    """The peer's `MatryoshkaLoss`, fused around the losses above, cached ones too: all prefixes in
    one sweep."""

    forward = _matryoshka.forward

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _matryoshka.fuse_cached(self.loss)


class Matryoshka2dLoss(peer.Matryoshka2dLoss):
    """The peer's `Matryoshka2dLoss` with `MatryoshkaLoss`, fused."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loss.__class__ = MatryoshkaLoss


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

if PEER.since("6.0"):
    globals().update(_multi_vector.drop_ins(PEER))
