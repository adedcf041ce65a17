"""info-nce-pytorch: InfoNCE and info_nce."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..losses.info_nce import info_nce as fused
from ._own import Own, one_entry
from .swap import Peer, Unfused

PEER = Peer("info_nce", "info-nce-pytorch", ("0.1", "0.2"))
peer: Any = PEER.load("info_nce")


@PEER.fused(peer, "info_nce", own=Own(peer, "normalize", "transpose"))
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor | Unfused:
    """The peer's `info_nce`, fused; negatives (M, D) "unpaired" or (N, M, D) "paired"."""
    reason = one_entry(temperature=temperature)
    if reason is not None:
        return Unfused(reason)
    dims = {"unpaired": 2, "paired": 3}.get(negative_mode)
    if negative_keys is None:
        if len(query) == 1:
            return Unfused("a batch of one has no negatives")
    elif negative_keys.dim() != dims:
        return Unfused(f"negatives do not fit negative_mode={negative_mode!r}")
    return fused(
        query, positive_key, negatives=negative_keys, scale=1 / temperature, reduction=reduction
    )


class InfoNCE(peer.InfoNCE):
    """The peer's `InfoNCE`, fused."""

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        return info_nce(
            query, positive_key, negative_keys, temperature=self.temperature,
            reduction=self.reduction, negative_mode=self.negative_mode,
        )  # fmt: skip
