"""Losses of torch and of other packages behind the signatures of `contrastive_kernels`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .baseline import Baseline, Loss
from .loading import Unavailable, load_class


def _linear_cross_entropy(**chunking: int) -> Callable[[], Loss]:
    def load() -> Loss:
        options = getattr(nn, "LinearCrossEntropyOptions", None)
        if options is None or not hasattr(F, "linear_cross_entropy"):
            raise Unavailable("torch >= 2.13 is needed for chunked F.linear_cross_entropy")

        def info_nce(query: Tensor, key: Tensor, *, temperature: float) -> Tensor:
            query, key = F.normalize(query, dim=1) / temperature, F.normalize(key, dim=1)
            target = torch.arange(len(query), device=query.device)
            return F.linear_cross_entropy(query, key, target, options=options(**chunking))

        return info_nce

    return load


def _open_clip_loss() -> Callable[[Tensor, Tensor, float | Tensor], Tensor]:
    clip = load_class("open_clip_torch", "open_clip.loss", "ClipLoss")()
    return lambda a, b, scale: clip(F.normalize(a, dim=1), F.normalize(b, dim=1), scale)


def _open_clip() -> Loss:
    clip = _open_clip_loss()

    def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        return clip(image_features, text_features, logit_scale)

    return clip_loss


def _open_clip_symmetric() -> Loss:
    clip = _open_clip_loss()

    def info_nce(query: Tensor, key: Tensor, *, temperature: float, symmetric: bool) -> Tensor:
        if not symmetric:
            raise ValueError("symmetric must be True: ClipLoss has both directions, got False")
        return clip(query, key, 1 / temperature)

    return info_nce


def _lightly() -> Loss:
    loss_class = load_class("lightly", "lightly.loss", "NTXentLoss")

    def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
        return loss_class(temperature=temperature)(z1, z2)

    return nt_xent


def _pytorch_metric_learning() -> Loss:
    loss_class = load_class(
        "pytorch-metric-learning", "pytorch_metric_learning.losses", "SupConLoss"
    )

    def sup_con(features: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
        return loss_class(temperature=temperature)(features, labels)

    return sup_con


def _info_nce_pytorch() -> Loss:
    loss_class = load_class("info-nce-pytorch", "info_nce", "InfoNCE")

    def info_nce(
        query: Tensor, key: Tensor, *, negatives: Tensor | None = None, temperature: float
    ) -> Tensor:
        return loss_class(temperature=temperature)(query, key, negatives)

    return info_nce


def _sentence_transformers() -> Loss:
    loss_class = load_class(
        "sentence-transformers",
        "sentence_transformers.sentence_transformer.losses",
        "MultipleNegativesRankingLoss",
    )

    def info_nce(query: Tensor, key: Tensor, *, temperature: float) -> Tensor:
        loss = loss_class(None, scale=1 / temperature)
        return loss.compute_loss_from_embeddings([query, key], None)

    return info_nce


LINEAR_CROSS_ENTROPY = Baseline("F.linear_cross_entropy, automatic chunks", _linear_cross_entropy())
LINEAR_CROSS_ENTROPY_512 = Baseline(
    "F.linear_cross_entropy, chunks of 512 rows", _linear_cross_entropy(batch_chunk_size=512)
)
OPEN_CLIP = Baseline("open_clip ClipLoss", _open_clip, "open_clip_torch")
OPEN_CLIP_SYMMETRIC = Baseline("open_clip ClipLoss", _open_clip_symmetric, "open_clip_torch")
LIGHTLY = Baseline("lightly NTXentLoss", _lightly, "lightly")
PYTORCH_METRIC_LEARNING = Baseline(
    "pytorch-metric-learning SupConLoss", _pytorch_metric_learning, "pytorch-metric-learning"
)
INFO_NCE_PYTORCH = Baseline("info-nce-pytorch InfoNCE", _info_nce_pytorch, "info-nce-pytorch")
SENTENCE_TRANSFORMERS = Baseline(
    "sentence-transformers MultipleNegativesRankingLoss",
    _sentence_transformers,
    "sentence-transformers",
)
