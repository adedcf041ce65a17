"""sentence-transformers' `mine_hard_negatives`, with a model whose similarities are made when they
are asked for: of torch.topk the first alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import top_k
from ._own import Own
from ._sentence import NORMALIZES, PEER, util
from .swap import Unfused

_SIGNATURE = inspect.signature(util.mine_hard_negatives)


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
    return mine_hard_negatives.__wrapped__(*given.args, **given.kwargs)


class Scoring:
    """A model, but for `similarity`: `normalize` says whether it is that of cosines."""

    def __init__(self, model: Any, normalize: bool) -> None:
        self._model, self._normalize = model, normalize

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def similarity(self, queries: Any, corpus: Any) -> Similarities:
        return Similarities(self._model.similarity, queries, corpus, self._normalize)


class Similarities:
    """similarity(queries, corpus), which torch.topk takes without its being made; what else is done
    with it is done with the matrix."""

    def __init__(
        self, similarity: Callable[..., Tensor], queries: Any, corpus: Any, normalize: bool
    ) -> None:
        self._similarity, self._normalize = similarity, normalize
        self._queries, self._corpus = queries, corpus
        self._moves: list[tuple[tuple, dict[str, Any]]] = []

    def to(self, *args: Any, **options: Any) -> Similarities:
        self._moves.append((args, options))
        return self

    def _moved(self, t: Tensor) -> Tensor:
        for args, options in self._moves:
            t = t.to(*args, **options)
        return t

    def _whole(self) -> Tensor:
        return self._moved(self._similarity(self._queries, self._corpus))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), options: dict | None = None
    ) -> Any:
        options = options or {}
        first = args[0] if len(args) == 1 else None
        if function is torch.topk and isinstance(first, cls) and set(options) == {"k", "dim"}:
            queries, corpus = (torch.as_tensor(t) for t in (first._queries, first._corpus))
            dense = all(t.layout == torch.strided and t.dim() == 2 for t in (queries, corpus))
            if dense and options["dim"] in (1, -1) and queries.dtype == corpus.dtype:
                found = top_k(queries, corpus, options["k"], normalize=first._normalize)
                values = first._moved(found.values.to(queries.dtype))
                return torch.return_types.topk((values, found.ids.to(values.device)))
        whole = [a._whole() if isinstance(a, cls) else a for a in args]
        options = {n: a._whole() if isinstance(a, cls) else a for n, a in options.items()}
        return function(*whole, **options)
