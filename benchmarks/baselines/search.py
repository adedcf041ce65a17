"""Exact searches of the largest products."""

import torch
from torch import Tensor

from .baseline import Baseline, Loss
from .loading import load_class

CHUNK = 2**26  # products at a time


def in_chunks(queries: Tensor, keys: Tensor, *, k: int) -> Tensor:
    """torch.topk of the products with a chunk of the keys, merged with those before."""
    best = queries.new_full((len(queries), k), -torch.inf)
    for chunk in keys.split(max(k, CHUNK // len(queries))):
        found = (queries @ chunk.T).topk(min(k, len(chunk)), dim=1).values
        best = torch.cat((best, found), 1).topk(k, dim=1).values
    return best


def _faiss() -> Loss:
    index_class = load_class("faiss-cpu", "faiss", "IndexFlatIP")

    def search(queries: Tensor, keys: Tensor, *, k: int) -> Tensor:
        index = index_class(keys.shape[1])
        index.add(keys.numpy())
        return torch.from_numpy(index.search(queries.numpy(), k)[0])

    return search


CHUNKS = Baseline("torch.topk of chunks of the product", lambda: in_chunks)
FAISS = Baseline("faiss IndexFlatIP", _faiss, "faiss-cpu")
