"""Fused kernels for contrastive and whitening losses in PyTorch.

Each loss is a function of tensors and a module of the same options. The values and gradients are
those of the dense formulas; the N x M similarity matrix is never stored.
"""

from .backends import backends
from .common import LossStats
from .distillation import clip_distill
from .guided import gist
from .integrations import patch, patch_status, patched, unpatch
from .losses import clip_loss, eqco, info_nce, mi_lower_bound, nce, siglip_loss
from .modules import (
    CACR,
    CCT,
    DCL,
    GIST,
    HCL,
    INTL,
    MNRL,
    NCE,
    WMSE,
    CACRViews,
    CLIPDistill,
    CLIPLoss,
    Debiased,
    EqCo,
    InfoNCE,
    NTXent,
    SigLIPLoss,
    SupCon,
)
from .ops import RowColumnStats, RowStats, row_softplus, row_stats
from .queue import FeatureQueue, MemoryBank
from .ranking import mnrl
from .self_similarity import dcl, debiased, hcl, nt_xent, sup_con
from .sources import FileNegatives, NegativeSource
from .transport import cacr, cacr_views, cct
from .whitening import whiten
from .whitening_flags import check_whitening
from .whitening_layer import Whitening
from .whitening_loss import intl, w_mse

__version__ = "0.1.0"

__all__ = [
    "CACR",
    "CCT",
    "DCL",
    "GIST",
    "HCL",
    "INTL",
    "MNRL",
    "NCE",
    "WMSE",
    "CACRViews",
    "CLIPDistill",
    "CLIPLoss",
    "Debiased",
    "EqCo",
    "FeatureQueue",
    "FileNegatives",
    "InfoNCE",
    "LossStats",
    "MemoryBank",
    "NTXent",
    "NegativeSource",
    "RowColumnStats",
    "RowStats",
    "SigLIPLoss",
    "SupCon",
    "Whitening",
    "backends",
    "cacr",
    "cacr_views",
    "cct",
    "check_whitening",
    "clip_distill",
    "clip_loss",
    "dcl",
    "debiased",
    "eqco",
    "gist",
    "hcl",
    "info_nce",
    "intl",
    "mi_lower_bound",
    "mnrl",
    "nce",
    "nt_xent",
    "patch",
    "patch_status",
    "patched",
    "row_softplus",
    "row_stats",
    "siglip_loss",
    "sup_con",
    "unpatch",
    "w_mse",
    "whiten",
]
