"""Losses of late interaction around a model that takes token embeddings for texts."""

from __future__ import annotations

import torch
from oracles import DOUBLE, generator, randn
from torch import Tensor, nn


class Tokens(nn.Module):
    """Token embeddings are the features "tokens", masks those of the texts."""

    skiplist: list[int] = []
    do_query_expansion = False
    device = torch.device("cpu")

    def forward(self, features: dict[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
        return {
            "token_embeddings": features["tokens"], "attention_mask": features["attention_mask"]
        }  # fmt: skip


def column(tokens: Tensor, seed: int, empty: int | None = None) -> dict[str, Tensor]:
    """Texts of `tokens`, of which some, not the first, do not count."""
    mask = torch.rand(tokens.shape[:2], generator=generator(seed)) < 0.7
    mask[:, 0] = True
    if empty is not None:
        mask[empty] = False
    ids = torch.arange(mask.numel()).view(mask.shape) + 10
    return {"tokens": tokens, "input_ids": ids, "attention_mask": mask.long()}


def texts(*shapes: tuple[int, int, int], dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """Token embeddings that share a direction, so that products are far from 0, but of each fourth
    token, whose products are negative."""
    made = []
    for seed, shape in enumerate(shapes):
        tokens = 0.5 * randn(*shape, seed=seed) + randn(shape[-1], seed=1000)
        tokens[:, ::4] *= -1
        made.append(tokens.to(dtype))
    return made
