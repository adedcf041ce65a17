"""Sets of tokens, those of each query or each document, as rows of one matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..checks import check_features, check_mask, check_numbers


class TokenSets(NamedTuple):
    """Tokens (T, D), of which those up to ends_i belong to set i.

    ends: (sets,), int64. kept: (T,), bool, which of them count; None: all. width: how many each set
    has, where all have as many; else counts (sets,) says it.
    """

    tokens: Tensor
    ends: Tensor
    kept: Tensor | None = None
    width: int | None = None
    counts: Tensor | None = None

    @property
    def number(self) -> int:
        return self.ends.shape[0]

    def padded(self) -> tuple[Tensor, Tensor | None]:
        """(sets, L, D), and where there are tokens that count, (sets, L), or None: everywhere."""
        if self.width is not None:
            shape = (self.number, self.width)
            return self.tokens.view(*shape, -1), None if self.kept is None else self.kept.view(
                shape
            )
        assert self.counts is not None
        tokens, there = reference.padded(self.tokens, self.counts)
        if self.kept is not None:
            there = there & reference.padded(self.kept, self.counts)[0]
        return tokens, there

    def cleared(self) -> TokenSets:
        """Zeros in the place of tokens that do not count, whatever they are."""
        if self.kept is None:
            return self
        return self._replace(tokens=self.tokens.masked_fill(~self.kept.unsqueeze(1), 0.0))


def equal_sets(tokens: Tensor, mask: Tensor | None = None) -> TokenSets:
    """Sets (sets, L, D) of as many tokens, of which those count where the mask (sets, L) is
    True."""
    number, width = tokens.shape[:2]
    ends = torch.arange(1, number + 1, device=tokens.device) * width
    kept = None if mask is None else mask.flatten()
    return TokenSets(tokens.flatten(0, 1), ends, kept, width)


def uneven_sets(tokens: Tensor, counts: Tensor, kept: Tensor | None = None) -> TokenSets:
    """Sets that lie one after the other in tokens (T, D), the next counts_i of them set i."""
    return TokenSets(tokens, counts.cumsum(0), kept, None, counts)


def check_token_sets(
    name: str,
    tokens: Any,
    mask: Any,
    lengths: Any,
    dims: tuple[int, ...] = (3,),
    *,
    whole: bool = True,
) -> TokenSets:
    """The sets that a user means, or raise: tokens (N, L, D), or (N, K, L, D) if `dims` allow it,
    with a mask of the leading sizes; or (T, D) with lengths (N,). `name` is that of the tokens,
    "queries" or "documents"; those of the others begin likewise."""
    one = "query" if name == "queries" else name.removesuffix("s")
    if mask is not None and lengths is not None:
        raise ValueError(
            f"{one}_mask and {one}_lengths must not both be given: the one is for {name} of shape "
            "(N, L, D), the other for (total, D)"
        )
    check_features(name, tokens, (2,) if lengths is not None else dims, whole=False)
    if whole and lengths is None and tokens.shape[0] == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(tokens.shape)}")
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dim() != 1:
            got = tuple(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
            raise ValueError(f"{one}_lengths must be a tensor of shape (N,), got {got}")
        if whole and lengths.shape[0] == 0:
            raise ValueError(f"{one}_lengths must not be empty")
        counts = check_numbers(
            f"{one}_lengths", lengths, lengths.shape, tokens.shape[0], tokens.device, name
        )
        return uneven_sets(tokens, counts)
    if 0 in tokens.shape[1:]:
        raise ValueError(f"{name} must not be empty, got shape {tuple(tokens.shape)}")
    if mask is not None:
        mask = check_mask(f"{one}_mask", mask, tokens.shape[:-1], tokens.device, "a token")
    if tokens.dim() == 4:
        tokens = tokens.flatten(0, 1)
        mask = None if mask is None else mask.flatten(0, 1)
    return equal_sets(tokens, mask)
