"""The losses of the grid: rows x features x dtype, beside dense torch, eager and compiled."""

from dataclasses import replace

import contrastive_kernels as ck

from ..baselines import dense, packages
from ..baselines.baseline import Baseline, compiled, eager
from . import large, oracle
from .case import Case
from .inputs import Sizes, image_text_bias, ranked

_LARGE = {case.name: case for case in large.CASES}


def _row(case: Case, sizes: Sizes, *others: Baseline) -> Case:
    """A case with the dense form of its loss, and these baselines."""
    form = getattr(dense, case.loss.__name__)
    baselines = (eager(form), compiled(form), *others)
    made = replace(case.resized(sizes), group="grid", baselines=baselines)
    return replace(made, memory=False, bfloat16_at_most=None)


# The columns stay in proportion to the rows.
_ROWS = (
    _row(_LARGE["info_nce"], Sizes(256, 256), packages.LINEAR_CROSS_ENTROPY),
    _row(_LARGE["clip_loss"], Sizes(256, 256)),
    _row(_LARGE["nt_xent"], Sizes(256, 512)),
    _row(_LARGE["sup_con"], Sizes(256, 256)),
    _row(_LARGE["info_nce_frozen"], Sizes(256, 1024)),
    _row(_LARGE["cacr"], Sizes(256, 256, k=4)),
    _row(
        Case("mnrl", "grid", ck.mnrl, Sizes(1, 1), ranked, oracle.whole(dense.mnrl)),
        Sizes(256, 512),
    ),
    _row(
        Case(
            "siglip_loss",
            "grid",
            ck.siglip_loss,
            Sizes(1, 1),
            image_text_bias,
            oracle.by_rows(oracle.siglip_loss),
        ),
        Sizes(256, 256),
    ),
)
CASES = {case.name: case for case in _ROWS}

# Matrices of n x m that the dense form holds at its peak, measured and rounded up; that of nt_xent
# is m x m, twice as large. So many are taken of others.
MATRICES = {"info_nce": 3, "info_nce_frozen": 3, "mnrl": 3, "nt_xent": 6, "sup_con": 6}
OTHERS = 4


def dense_bytes(case: Case) -> int:
    """About what the dense form needs: its matrices, and features with their unit vectors and the
    gradients of both."""
    sizes = case.sizes
    matrices = MATRICES.get(case.name, OTHERS) * sizes.n * sizes.m
    features = 4 * (sizes.n * (1 + sizes.k) + sizes.m) * sizes.d
    return (matrices + features) * case.dtype.itemsize
