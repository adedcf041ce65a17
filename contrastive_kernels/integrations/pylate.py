"""PyLate's losses of late interaction: Contrastive, CachedContrastive and Distillation.

They run PyLate's own code, with the scores from `max_sim`: (Q, Q N) numbers, never the products of
tokens. As in PyLate a token of a document that its mask leaves out has the product 0, which may be
the largest. Scores of half precision stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._late import one_of, scores, with_fused_scores
from ._own import Own
from .swap import Peer

PEER = Peer("pylate", "pylate", ("1.6", "1.7"))
peer: Any = PEER.load("pylate.losses")
scoring: Any = PEER.load("pylate.scores")
CALL = scoring.ColBERTScores.__call__  # as it is now
SCORES = Own(PEER.load("pylate.scores.colbert"), "colbert_scores", "colbert_kd_scores")


def colbert_scores(
    queries_embeddings: Tensor,
    documents_embeddings: Tensor,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
) -> Tensor:
    """What the peer's `ColBERTScores()` gives for tensors."""
    masks = queries_mask, documents_mask
    return scores(queries_embeddings, documents_embeddings, *masks, own=False, zeros=True)


def colbert_kd_scores(
    queries_embeddings: Tensor,
    documents_embeddings: Tensor,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
) -> Tensor:
    """The peer's `colbert_kd_scores` of tensors."""
    masks = queries_mask, documents_mask
    return scores(queries_embeddings, documents_embeddings, *masks, own=True, zeros=True)


def _of_metric(metric: Any) -> Callable | None:
    is_own = type(metric) is scoring.ColBERTScores and type(metric).__call__ is CALL
    return colbert_scores if is_own else None


def _swap(owner: Any, fused: Callable[[Any], Callable | None]) -> Callable:
    forward = with_fused_scores(owner.forward, "score_metric", fused)
    return PEER.fused(owner, own=Own(owner, beside=[SCORES]))(forward)


_contrastive = _swap(peer.Contrastive, _of_metric)
_cached = _swap(peer.CachedContrastive, _of_metric)
_distillation = _swap(peer.Distillation, one_of({scoring.colbert_kd_scores: colbert_kd_scores}))


class Contrastive(peer.Contrastive):
    """The peer's `Contrastive`, fused."""

    forward = _contrastive


class CachedContrastive(peer.CachedContrastive):
    """The peer's `CachedContrastive`, fused."""

    forward = _cached


class Distillation(peer.Distillation):
    """The peer's `Distillation`, fused."""

    forward = _distillation
