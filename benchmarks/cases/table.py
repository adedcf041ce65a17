"""The table of cases on a CPU: one row each, used for speed, memory and correctness alike."""

from . import large, late, scaling, search, small, swap, whitening

# Largest peak beyond inputs and gradients that a case of ours may have.
MEMORY_LIMIT_MB = 64

CASES = {
    case.name: case
    for group in (large, swap, small, whitening, search, late, scaling)
    for case in group.CASES
}
