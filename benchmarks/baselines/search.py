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


def exact(queries: Tensor, keys: Tensor, *, k: int) -> Tensor:
    """The k largest products in float64, of those that are far the largest in float32."""
    queries, keys = queries.double(), keys.double()
    best = queries.new_empty((len(queries), 0), dtype=torch.float32)
    ids = torch.empty_like(best, dtype=torch.int64)
    start = 0
    for chunk in keys.float().split(max(2 * k, CHUNK // len(queries))):
        found = (queries.float() @ chunk.T).topk(min(2 * k, len(chunk)), dim=1)
        both = torch.cat((best, found.values), 1)
        which = torch.cat((ids, found.indices + start), 1)
        best, place = both.topk(min(2 * k, both.shape[1]), dim=1)
        ids, start = which.gather(1, place), start + len(chunk)
    rows = [query @ keys[own].T for query, own in zip(queries, ids, strict=True)]
    return torch.stack(rows).topk(k, dim=1).values


def _faiss() -> Loss:
    index_class = load_class("faiss-cpu", "faiss", "IndexFlatIP")

    def search(queries: Tensor, keys: Tensor, *, k: int) -> Tensor:
        index = index_class(keys.shape[1])
        index.add(keys.numpy())
        return torch.from_numpy(index.search(queries.numpy(), k)[0])

    return search


CHUNKS = Baseline("torch.topk of chunks of the product", lambda: in_chunks)
FAISS = Baseline("faiss IndexFlatIP", _faiss, "faiss-cpu")
