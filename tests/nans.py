"""NaN of all kinds of bits, and how they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

# float32: quiet and signalling, of both signs, with payloads; NVIDIA's GPUs write 0x7fffffff
NANS = (
    0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FBFFFFF, 0x7FC12345
)  # fmt: skip
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
MANTISSAS = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


def put_nan(t: Tensor, at: int, bits: int) -> None:
    """Makes an element NaN, with as much of the bits of this float32 as its type holds.

    By its word: a NaN that is converted becomes a quiet one.
    """
    size, mantissa = 8 * t.element_size(), MANTISSAS[t.dtype]
    payload = (bits & 0x7FFFFF) << max(mantissa - 23, 0) >> max(23 - mantissa, 0)
    payload |= bits & 1  # which the shift may have lost
    word = (1 << size - 1) - (1 << mantissa) | payload
    word -= (bits >> 31) << size - 1  # the sign, of a number with two's complement
    t.view(-1).view(WORDS[t.element_size()])[at] = word
    assert t.view(-1)[at].isnan()
