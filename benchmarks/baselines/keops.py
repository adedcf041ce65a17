"""The losses on PyKeOps, whose symbolic matrices are never stored: one formula for CPUs and GPUs,
compiled when it first runs."""

import importlib.util
import os
import sys
from contextlib import redirect_stdout

from torch import Tensor

from .baseline import Baseline
from .loading import Unavailable, missing
from .row_lse import RowLse, clip_loss_of, info_nce_of

NAME = "PyKeOps LazyTensor"


def _row_lse() -> RowLse:
    if importlib.util.find_spec("pykeops") is None:
        raise missing("pykeops")
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")  # it would print what it compiles
    try:
        with redirect_stdout(sys.stderr):  # it says which tools it has not found
            from pykeops.torch import LazyTensor
    except Exception as error:  # it looks for compilers and tools when it is imported
        raise Unavailable(f"pykeops cannot be imported: {error}") from error

    def row_lse(x: Tensor, y: Tensor) -> Tensor:
        logits = LazyTensor(x[:, None].contiguous()) | LazyTensor(y[None].contiguous())
        return logits.logsumexp(dim=1).flatten()

    return row_lse


KEOPS_INFO_NCE = Baseline(NAME, lambda: info_nce_of(_row_lse()), "pykeops", compiles=True)
KEOPS_CLIP = Baseline(NAME, lambda: clip_loss_of(_row_lse()), "pykeops", compiles=True)
