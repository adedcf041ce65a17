"""Time over the number of frozen negatives."""

from dataclasses import replace

from . import large
from .inputs import Sizes

_FROZEN = next(case for case in large.CASES if case.name == "info_nce_frozen")
_ROWS = tuple(
    replace(
        _FROZEN,
        name=f"info_nce_frozen_{m}",
        group="scaling",
        sizes=Sizes(1024, m),
        baselines=(),
        memory=False,
        bfloat16_at_most=None,
    )
    for m in (8_000, 40_000, 200_000, 1_000_000)
)
_MILLION = replace(_ROWS[-1], memory=True)

CASES = (
    *_ROWS[:-1],
    _MILLION,
    replace(_MILLION, name="info_nce_forward_1000000", passes="forward"),
)
