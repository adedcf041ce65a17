"""The primitives of all losses, and the registered operators behind them."""

from .own import count_own
from .pairs import full_precision, row_dot
from .primitives import (
    checked_operands,
    keeps_frozen_keys,
    operands,
    row_softplus,
    row_stats,
    softplus_sweep,
    sweep,
)
from .registration import NAMESPACE

__all__ = [
    "NAMESPACE",
    "checked_operands",
    "count_own",
    "full_precision",
    "keeps_frozen_keys",
    "operands",
    "row_dot",
    "row_softplus",
    "row_stats",
    "softplus_sweep",
    "sweep",
]
