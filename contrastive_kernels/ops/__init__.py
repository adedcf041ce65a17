"""The primitives of all losses, and the registered operators behind them."""

from .hard_negatives import hard_negatives
from .joint import Asked, sweeps
from .max_sim import max_sim, token_scores
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
from .row_operators import (
    add_class_dot_gradient,
    class_dot,
    has_row_kernels,
    row_distance,
    row_distance_gradients,
)
from .rows import add_rows, sum_rows, take_rows
from .rowwise import BLOCK_ELEMENTS, can_tie, own_gradient, tied
from .token_sets import TokenSets, check_token_sets, equal_sets, uneven_sets
from .top_k import top_k

__all__ = [
    "BLOCK_ELEMENTS",
    "NAMESPACE",
    "Asked",
    "KeyBias",
    "Part",
    "TokenSets",
    "add_class_dot_gradient",
    "add_rows",
    "can_nest",
    "can_tie",
    "check_token_sets",
    "checked_operands",
    "class_dot",
    "count_own",
    "equal_sets",
    "full_precision",
    "hard_negatives",
    "has_row_kernels",
    "keeps_frozen_keys",
    "max_sim",
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
    "token_scores",
    "top_k",
    "uneven_sets",
]
