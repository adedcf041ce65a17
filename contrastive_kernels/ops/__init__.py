"""The primitives of all losses, and the registered operators behind them."""

from .hard_negatives import hard_negatives
from .joint import Asked, sweeps
from .nested import can_nest
from .own import count_own
from .pairs import KeyBias, Part, full_precision, row_dot
from .primitives import (
    checked_operands,
    keeps_frozen_keys,
    operands,
    positives,
    row_softplus,
    row_stats,
    softplus_sweep,
    squares,
    sweep,
    swept_positives,
)
from .registration import NAMESPACE
from .row_operators import class_dot, has_row_kernels, row_distance, row_distance_gradients
from .rows import sum_rows, take_rows
from .rowwise import BLOCK_ELEMENTS, can_tie, own_gradient, tied
from .top_k import top_k

__all__ = [
    "BLOCK_ELEMENTS",
    "NAMESPACE",
    "Asked",
    "KeyBias",
    "Part",
    "can_nest",
    "can_tie",
    "checked_operands",
    "class_dot",
    "count_own",
    "full_precision",
    "hard_negatives",
    "has_row_kernels",
    "keeps_frozen_keys",
    "operands",
    "own_gradient",
    "positives",
    "row_distance",
    "row_distance_gradients",
    "row_dot",
    "row_softplus",
    "row_stats",
    "softplus_sweep",
    "squares",
    "sum_rows",
    "sweep",
    "sweeps",
    "swept_positives",
    "take_rows",
    "tied",
    "top_k",
]
