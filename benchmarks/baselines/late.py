"""Late interaction with a score of each query for every document, as public code makes it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .baseline import Baseline, Loss
from .loading import load_class

Scores = Callable[[Tensor, Tensor], Tensor]  # of tokens (N, Lq, D) and (M, Ld, D): (N, M)


def dense_scores(queries: Tensor, documents: Tensor) -> Tensor:
    """The largest of all products of tokens, summed over those of a query."""
    return torch.einsum("nqd,mtd->nmqt", queries, documents).amax(3).sum(2)


def contrast(scores: Scores) -> Loss:
    """Of documents (N, K, Ld, D), the first of which is the positive: every place in turn, as
    PyLate's Contrastive and sentence-transformers' multi-vector loss do it."""

    def late_interaction(queries: Tensor, documents: Tensor) -> Tensor:
        made = torch.stack([scores(queries, each) for each in documents.unbind(1)], 2)
        target = torch.arange(len(queries), device=queries.device) * documents.shape[1]
        return F.cross_entropy(made.flatten(1), target)

    return late_interaction


def _pylate() -> Loss:
    return contrast(load_class("pylate", "pylate.scores", "colbert_scores"))


DENSE = Baseline("torch.einsum, as PyLate", lambda: contrast(dense_scores))
PYLATE = Baseline("PyLate's scores", _pylate, "pylate")
