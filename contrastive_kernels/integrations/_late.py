"""Losses of late interaction that take what scores queries and documents as an argument: their own
code with fused scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..backends import resolve_backend
from ..ops import equal_sets, token_scores
from .swap import Unfused


def scores(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    *,
    own: bool,
    zeros: bool,
) -> Tensor:
    """`max_sim` of queries (Q, L, D) and documents (G, K, L, D), those of all groups for every
    query, (Q, G K); or with `own` those of its own group, (Q, K). `zeros`: as `token_scores` takes
    it."""
    each = documents.shape[1]
    mask = None if document_mask is None else document_mask.flatten(0, 1).bool()
    return token_scores(
        equal_sets(queries, None if query_mask is None else query_mask.bool()),
        equal_sets(documents.flatten(0, 1), mask),
        own=each if own else 0,
        normalize=False,
        zeros=zeros,
        backend=resolve_backend("auto", queries.device),
    )


def with_fused_scores(
    forward: Callable[..., Tensor], attribute: str, fused: Callable[[Any], Callable | None]
) -> Callable[..., Tensor | Unfused]:
    """The peer's `forward`, which finds its scoring in an attribute, with the fused scoring in its
    place, where there is one for it."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Tensor | Unfused:
        found = fused(getattr(self, attribute))
        if found is None:
            return Unfused(f"{attribute} is not one of those that are fused")
        twin = copy.copy(self)  # of the same parameters
        setattr(twin, attribute, found)
        return forward(twin, *args, **kwargs)

    method.runs_theirs = True  # type: ignore[attr-defined]  # so that nothing it reads is missed
    return method


def one_of(functions: Mapping[Callable, Callable]) -> Callable[[Any], Callable | None]:
    """The fused form of a function, or None."""

    def find(function: Any) -> Callable | None:
        return next((fused for peer, fused in functions.items() if peer is function), None)

    return find
