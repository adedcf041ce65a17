"""The losses in plain torch without the whole matrix: blocks of rows, each of them checkpointed.

What a trainer writes whom the dense loss left without memory. Every block of logits is computed
again in the backward pass.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .row_lse import clip_loss_of, info_nce_of

ROWS = 2048


def _by_blocks(block: Callable[[Tensor, int], Tensor], rows: Tensor) -> Tensor:
    """block(rows[start:start + ROWS], start) of all blocks, one entry for each row."""
    parts = [
        checkpoint(block, part, ROWS * i, use_reentrant=False, preserve_rng_state=False)
        for i, part in enumerate(rows.split(ROWS))
    ]
    return torch.cat(parts)


def _logits(x: Tensor, y: Tensor) -> Tensor:
    logits = x @ y.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def row_lse(x: Tensor, y: Tensor, *, without_diagonal: bool = False) -> Tensor:
    """log sum_j exp <x_i, y_j>."""

    def block(part: Tensor, start: int) -> Tensor:
        logits = _logits(part, y)
        if without_diagonal:
            logits.diagonal(start).fill_(-torch.inf)
        return logits.logsumexp(1)

    return _by_blocks(block, x)


info_nce = info_nce_of(row_lse)
clip_loss = clip_loss_of(row_lse)


def siglip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    images = logit_scale * F.normalize(image_features, dim=1)
    texts = F.normalize(text_features, dim=1)

    def block(part: Tensor, start: int) -> Tensor:
        logits = _logits(part, texts) + logit_bias
        return -F.logsigmoid(-logits).sum(1) - logits.diagonal(start)

    return _by_blocks(block, images).mean()


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    positive = (z[: len(z1)] * z[len(z1) :]).sum(1) / temperature
    return (row_lse(z / temperature, z, without_diagonal=True) - positive.repeat(2)).mean()
