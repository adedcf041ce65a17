"""The nearest keys of queries, against what searches exactly: torch.topk, faiss."""

import torch
from torch import Tensor

import contrastive_kernels as ck

from ..baselines import search
from . import oracle
from .case import Case
from .inputs import Sizes, of_sizes, unit_rows
from .operations import one_product
from .oracle import Tensors

K = {"k": 16}


@of_sizes("nmd")
def queries_and_keys(sizes: Sizes, generator: torch.Generator) -> Tensors:
    return {
        "queries": unit_rows(sizes.n, sizes.d, generator),
        "keys": unit_rows(sizes.m, sizes.d, generator),
    }


def top_k(queries: Tensor, keys: Tensor, *, k: int, backend: str = "auto") -> Tensor:
    return ck.top_k(queries, keys, k, backend=backend).values


CASES = (
    Case(
        "top_k",
        "search",
        top_k,
        Sizes(1024, 131072),
        queries_and_keys,
        oracle.result(search.exact),
        K,
        (search.CHUNKS.bounded(0.6), search.FAISS.bounded(1.0)),
        one_product,
        passes="forward",
        memory=True,
    ),
)
