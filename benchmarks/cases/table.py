"""The table of cases on a CPU: one row each, used for speed, memory and correctness alike."""

from . import large, scaling, small, swap, whitening

# Largest peak beyond inputs and gradients that a case of ours may have.
MEMORY_LIMIT_MB = 64

CASES = {
    case.name: case
    for case in (*large.CASES, *swap.CASES, *small.CASES, *whitening.CASES, *scaling.CASES)
}
