"""Fused kernels for contrastive and whitening losses in PyTorch.

Each loss is a function of tensors and a module of the same options. The values and gradients are
those of the dense formulas; the N x M similarity matrix is never stored.
"""

from .backends import backends
from .cached import cached_step
from .files import FileNegatives, write_negatives
from .integrations import patch, patch_status, patched, unpatch
from .losses import table as _table
from .losses.stats import mi_lower_bound
from .losses.table import *  # noqa: F403
from .ops import hard_negatives, max_sim, row_softplus, row_stats, top_k
from .queue import FeatureQueue, MemoryBank
from .sources import NegativeSource
from .types import HardNegatives, LossStats, RowColumnStats, RowStats, TopK
from .whitening import Whitening, check_whitening, whiten
from .workspace import workspace_limit

__version__ = "0.1.0"

__all__ = [
    "FeatureQueue",
    "FileNegatives",
    "HardNegatives",
    "LossStats",
    "MemoryBank",
    "NegativeSource",
    "RowColumnStats",
    "RowStats",
    "TopK",
    "Whitening",
    "backends",
    "cached_step",
    "check_whitening",
    "hard_negatives",
    "max_sim",
    "mi_lower_bound",
    "patch",
    "patch_status",
    "patched",
    "row_softplus",
    "row_stats",
    "top_k",
    "unpatch",
    "whiten",
    "workspace_limit",
    "write_negatives",
]
__all__ += _table.__all__
