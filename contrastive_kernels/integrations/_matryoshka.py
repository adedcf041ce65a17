"""sentence-transformers' MatryoshkaLoss around its ranking and GISTEmbed losses: one call of ours
at all prefixes, of embeddings that are made once. Matryoshka2dLoss makes one of them.

Around a loss with cached gradients the package has put a CachedLossDecorator in the place of that
loss's `calculate_loss`; the decorator's call is fused, so that a patch reaches losses made before.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ._own import Own
from ._sentence import (
    CACHED_GIST,
    CACHED_RANKING,
    GIST,
    PEER,
    RANKING,
    columns_of,
    embed_columns,
    finish,
    guided,
    guided_columns,
    no_guide,
    no_rank,
    peer,
    rank,
)
from .swap import Unfused

module: Any = PEER.load(peer.MatryoshkaLoss.__module__)
_METHODS = {  # of the package, before any patch
    (owner, name): getattr(owner, name)
    for owner, names in {
        peer.MultipleNegativesRankingLoss: ("forward", "compute_loss_from_embeddings"),
        peer.GISTEmbedLoss: ("forward",),
        peer.CachedMultipleNegativesRankingLoss: ("calculate_loss",),
        peer.CachedGISTEmbedLoss: ("calculate_loss",),
    }.items()
    for name in names
}


@PEER.fused(peer.MatryoshkaLoss, own=Own(peer.MatryoshkaLoss))
def forward(
    self: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor
) -> Tensor | Unfused:
    loss = self.loss
    if isinstance(getattr(loss, "calculate_loss", None), module.CachedLossDecorator):
        return loss(sentence_features, labels)
    if isinstance(loss, peer.GISTEmbedLoss) and not PEER.since("5.7"):
        # which puts its embeddings where those of the model are kept for the next prefix
        return Unfused("GISTEmbedLoss after its first prefix is one of its guide", expected=True)
    if isinstance(loss, peer.GISTEmbedLoss):
        reason = _replaced(loss, peer.GISTEmbedLoss, GIST, **_methods(loss, "forward"))
    elif isinstance(loss, peer.MultipleNegativesRankingLoss):
        methods = _methods(loss, "forward", "compute_loss_from_embeddings")
        reason = _replaced(loss, peer.MultipleNegativesRankingLoss, RANKING, **methods)
        reason = reason or no_rank(loss)
    else:
        return Unfused(f"there is no fused form of {type(loss).__name__}", expected=True)
    if reason is not None:
        return Unfused(reason)
    if loss.model is not self.model or getattr(loss, "guide", None) is self.model:
        return Unfused("the loss has another model, or its guide is the model")
    if isinstance(loss, peer.GISTEmbedLoss):
        columns = guided_columns(loss, sentence_features)
        return columns if isinstance(columns, Unfused) else guided(loss, *columns, _prefixes(self))
    embeddings = embed_columns(self.model, sentence_features)
    prefixes = _prefixes(self)
    value = rank(loss, embeddings, prefixes)
    if not isinstance(value, Unfused):
        return value
    # columns that do not fit: the embeddings are there, the package's own loss of each prefix
    total: Any = 0.0
    for dim, weight in zip(*prefixes.values(), strict=True):
        short = [module.shrink(column, dim) for column in embeddings]
        total = total + weight * loss.compute_loss_from_embeddings(short, labels)
    return total


@PEER.fused(
    module.CachedLossDecorator, "__call__",
    own=Own(module.CachedLossDecorator, beside=[Own(module, "shrink")]),
)  # fmt: skip
def cached(self: Any, reps: list[list[Tensor]], *args: Any, **options: Any) -> Tensor | Unfused:
    loss = getattr(self.fn, "__self__", None)
    for owner, own, cannot, run in _CACHED:
        if isinstance(loss, owner):
            reason = _replaced(loss, owner, own, calculate_loss=self.fn.__func__) or cannot(loss)
            if reason is not None:
                return Unfused(reason)
            return run(_prefixes(self), loss, reps, *args, **options)
    return Unfused(f"there is no fused form of {type(loss).__name__}", expected=True)


def _rank(
    prefixes: dict[str, list],
    loss: Any,
    reps: list[list[Tensor]],
    labels: Tensor | bool | None = None,
    *,
    with_backward: bool = False,
) -> Tensor | Unfused:
    value = rank(loss, columns_of(reps), prefixes)
    return finish(value, with_backward or labels is True)


def _guide(
    prefixes: dict[str, list],
    loss: Any,
    reps: list[list[Tensor]],
    reps_guided: list[list[Tensor]],
    with_backward: bool = False,
) -> Tensor | Unfused:
    value = guided(loss, columns_of(reps), columns_of(reps_guided), prefixes)
    return finish(value, with_backward)


_CACHED: list[tuple[type, Own, Callable[[Any], str | None], Callable[..., Tensor | Unfused]]] = [
    (peer.CachedMultipleNegativesRankingLoss, CACHED_RANKING, no_rank, _rank),
    (peer.CachedGISTEmbedLoss, CACHED_GIST, no_guide, _guide),
]


class CachedLossDecorator(module.CachedLossDecorator):
    __call__ = cached


def fuse_cached(loss: Any) -> None:
    """Give a loss with cached gradients our decorator in the place of the peer's."""
    theirs = getattr(loss, "calculate_loss", None)
    if isinstance(theirs, module.CachedLossDecorator):
        theirs.__class__ = CachedLossDecorator


def _prefixes(loss: Any) -> dict[str, list]:
    """dims and weights of this step, which draws as the package does; those of equal prefixes are
    added."""
    which: Any = range(len(loss.matryoshka_dims))
    if 0 < loss.n_dims_per_step < len(which):
        which = random.sample(which, loss.n_dims_per_step)
    weights: Counter[int] = Counter()
    for i in which:
        weights[loss.matryoshka_dims[i]] += loss.matryoshka_weights[i]
    return {"dims": list(weights), "weights": list(weights.values())}


def _replaced(loss: Any, owner: type, own: Own, **methods: Any) -> str | None:
    """Why the loss inside is not what is fused, or None: a method, as it is found, that is neither
    the package's nor ours, or a part that is not the package's."""
    for name, found in methods.items():
        ours = (s.method for s in PEER.swaps if s.owner is owner and s.name == name)
        if found not in (_METHODS[owner, name], *ours):
            return f"{name} of the loss is overridden"
    return own.replaced(loss)


def _methods(loss: Any, *names: str) -> dict[str, Any]:
    """Methods of a loss, as they are found."""
    return {name: vars(loss).get(name, getattr(type(loss), name)) for name in names}
