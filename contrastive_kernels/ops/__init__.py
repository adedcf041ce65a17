"""The primitives of all losses, and the registered operators behind them."""

from .pairs import full_precision
from .primitives import (
    checked_operands,
    keeps_frozen_keys,
    operands,
    row_dot,
    row_softplus,
    row_stats,
    softplus_sweep,
    sweep,
)
from .registration import NAMESPACE

__all__ = [
    "NAMESPACE",
    "checked_operands",
    "full_precision",
    "keeps_frozen_keys",
    "operands",
    "row_dot",
    "row_softplus",
    "row_stats",
    "softplus_sweep",
    "sweep",
]
