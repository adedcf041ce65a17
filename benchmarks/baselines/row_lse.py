"""The losses around any function of rows: row_lse(x, y) is log sum_j exp <x_i, y_j> of each x_i."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .baseline import Loss

RowLse = Callable[[Tensor, Tensor], Tensor]


def info_nce_of(row_lse: RowLse) -> Loss:
    def info_nce(
        query: Tensor, key: Tensor, *, negatives: Tensor | None = None, temperature: float
    ) -> Tensor:
        query, key = F.normalize(query, dim=1) / temperature, F.normalize(key, dim=1)
        positive = (query * key).sum(1)
        if negatives is None:
            return (row_lse(query, key) - positive).mean()
        return (torch.logaddexp(row_lse(query, negatives), positive) - positive).mean()

    return info_nce


def clip_loss_of(row_lse: RowLse) -> Loss:
    def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        images = logit_scale * F.normalize(image_features, dim=1)
        texts = F.normalize(text_features, dim=1)
        lse = row_lse(images, texts) + row_lse(texts, images)
        return (lse / 2 - (images * texts).sum(1)).mean()

    return clip_loss
