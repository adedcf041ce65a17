"""The losses on PyKeOps, whose symbolic matrices are never stored: one formula for CPUs and GPUs,
compiled when it first runs."""

import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout

import torch
import torch.nn.functional as F
from torch import Tensor

from .peers import Loss, Peer, PeerUnavailable, missing

NAME = "PyKeOps LazyTensor"


def _row_lse() -> Callable[[Tensor, Tensor], Tensor]:
    """log sum_j exp <x_i, y_j>."""
    if importlib.util.find_spec("pykeops") is None:
        raise missing("pykeops")
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")  # it would print what it compiles
    try:
        with redirect_stdout(sys.stderr):  # it says which tools it has not found
            from pykeops.torch import LazyTensor
    except Exception as error:  # it looks for compilers and tools when it is imported
        raise PeerUnavailable(f"pykeops cannot be imported: {error}") from error

    def row_lse(x: Tensor, y: Tensor) -> Tensor:
        logits = LazyTensor(x[:, None].contiguous()) | LazyTensor(y[None].contiguous())
        return logits.logsumexp(dim=1).flatten()

    return row_lse


def _info_nce() -> Loss:
    row_lse = _row_lse()

    def info_nce(
        query: Tensor, key: Tensor, *, negatives: Tensor | None = None, temperature: float
    ) -> Tensor:
        query, key = F.normalize(query, dim=1) / temperature, F.normalize(key, dim=1)
        positive = (query * key).sum(1)
        if negatives is None:
            return (row_lse(query, key) - positive).mean()
        return (torch.logaddexp(row_lse(query, negatives), positive) - positive).mean()

    return info_nce


def _clip_loss() -> Loss:
    row_lse = _row_lse()

    def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        images = logit_scale * F.normalize(image_features, dim=1)
        texts = F.normalize(text_features, dim=1)
        lse = row_lse(images, texts) + row_lse(texts, images)
        return (lse / 2 - (images * texts).sum(1)).mean()

    return clip_loss


KEOPS_INFO_NCE = Peer(NAME, _info_nce, "pykeops", compiles=True)
KEOPS_CLIP = Peer(NAME, _clip_loss, "pykeops", compiles=True)
