"""info-nce-pytorch: InfoNCE and info_nce."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ..losses.info_nce import info_nce as fused
from ._own import Own, one_entry
from .swap import Peer, Unfused

PEER = Peer("info_nce", "info-nce-pytorch", ("0.1", "0.2"))
peer: Any = PEER.load("info_nce")


SIGNATURE = inspect.signature(peer.info_nce)
# of the class too: temperature (tau in 0.1.0), reduction since 0.1.3, negative_mode since 0.1.4
OPTIONS = list(SIGNATURE.parameters)[3:]
_HELPERS = [name for name in ("normalize", "transpose") if hasattr(peer, name)]  # since 0.1.1


@PEER.fused(peer, "info_nce", own=Own(peer, *_HELPERS))
def info_nce(*args: Any, **kwargs: Any) -> Tensor | Unfused:
    """The peer's `info_nce`, fused; negatives (M, D) "unpaired" or (N, M, D) "paired"."""
    given = SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    query, positive_key, negative_keys, temperature, *more = given.args
    reduction = more[0] if "reduction" in OPTIONS else "mean"
    negative_mode = more[1] if "negative_mode" in OPTIONS else "unpaired"
    reason = one_entry(temperature=temperature)
    if reason is not None:
        return Unfused(reason)
    dims = {"unpaired": 2, "paired": 3}.get(negative_mode)
    if negative_keys is None:
        if "tau" in OPTIONS:
            return Unfused("no negatives are given")
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
        options = {name: getattr(self, name) for name in OPTIONS}
        return info_nce(query, positive_key, negative_keys, **options)
