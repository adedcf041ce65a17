"""sentence-transformers' losses for multi-vector encoders, since 6.0.

They run the package's own code, with the scores from `max_sim`: (Q, Q N) numbers, never the
products of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._late import one_of, scores, with_fused_scores
from ._own import Own
from .swap import Peer

NAMES = (
    "MultiVectorMultipleNegativesRankingLoss",
    "CachedMultiVectorMultipleNegativesRankingLoss",
    "MultiVectorDistillKLDivLoss",
    "MultiVectorMarginMSELoss",
)


def drop_ins(peer: Peer) -> dict[str, type]:
    """The fused subclasses by their names; the methods are those that a patch sets."""
    losses = peer.load("sentence_transformers.multi_vector_encoder.losses")
    find = one_of(_functions(peer))
    home = peer.load("sentence_transformers.multi_vector_encoder.scoring.colbert")
    beside = [Own(home, "maxsim", "maxsim_pairwise")]
    made = {}
    for name in NAMES:
        owner = getattr(losses, name)
        forward = with_fused_scores(owner.forward, "similarity_fct", find)
        methods = {"forward": peer.fused(owner, own=Own(owner, beside=beside))(forward)}
        doc = f"The peer's `{name}`, fused: its scores are those of `max_sim`."
        module = f"{__package__}.sentence_transformers"
        made[name] = type(name, (owner,), methods | {"__doc__": doc, "__module__": module})
    return made


def _functions(peer: Peer) -> dict[Callable, Callable]:
    """The package's scoring functions, with the fused ones."""
    scoring = peer.load("sentence_transformers.multi_vector_encoder.scoring")
    empty = peer.load("sentence_transformers.util.similarity")._EMPTY_DOCUMENT_SCORE
    found: dict[Callable, Callable] = {}
    for name, fused in (
        ("colbert_scores", _scores),
        ("colbert_kd_scores", partial(_scores, own=True)),
        ("colbert_scores_pairwise", _pairwise),
    ):
        for prefix, mean in (("", False), ("mean_", True)):
            if hasattr(scoring, prefix + name):
                found[getattr(scoring, prefix + name)] = partial(fused, mean=mean, empty=empty)
    return found


def _scores(
    queries: Tensor,
    documents: Tensor,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    *,
    mean: bool,
    empty: float,
    own: bool = False,
) -> Tensor:
    found = scores(queries, documents, queries_mask, documents_mask, own=own, zeros=False).float()
    if documents_mask is not None:  # what a document without a token has there
        without = ~documents_mask.bool().any(-1)
        found = torch.where(without if own else without.flatten(), empty, found)
    if mean:
        count: Any = queries.shape[1]
        if queries_mask is not None:
            count = queries_mask.bool().sum(1, keepdim=True).clamp(min=1)
        found = found / count
    return found


def _pairwise(
    queries: Tensor,
    documents: Tensor,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    one = None if documents_mask is None else documents_mask.unsqueeze(1)
    return _scores(queries, documents.unsqueeze(1), queries_mask, one, own=True, **options).squeeze(
        1
    )
