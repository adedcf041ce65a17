"""The main table: losses at the sizes of a training, with bounds and every baseline.

Features are float32, D = 128, not normalised unless frozen; the loss normalises them, and so does
every baseline, with the gradient through the normalisation.
"""

from dataclasses import replace

import contrastive_kernels as ck

from ..baselines import chunked, dense, gpu_kernels, keops, packages
from ..baselines.baseline import eager, in_chunks, on_request
from . import oracle
from .case import Case
from .inputs import Sizes, image_text, labelled, pairs, positives_and_negatives, queue
from .operations import frozen_keys, half_tiles, two_sided

TEMPERATURE = {"temperature": 0.1}
BFLOAT16_AT_MOST = 1.0

_ROWS = (
    Case(
        "info_nce",
        "large",
        ck.info_nce,
        Sizes(8192, 8192),
        pairs("query", "key"),
        oracle.by_rows(oracle.info_nce),
        TEMPERATURE,
        (
            eager(dense.info_nce).bounded(0.28),
            packages.LINEAR_CROSS_ENTROPY.bounded(0.70),
            packages.LINEAR_CROSS_ENTROPY_512.bounded(0.70),
            *on_request(
                dense.info_nce,
                in_chunks(chunked.info_nce),
                packages.INFO_NCE_PYTORCH,
                packages.SENTENCE_TRANSFORMERS,
                keops.KEOPS_INFO_NCE,
                gpu_kernels.FLEX_INFO_NCE,
                gpu_kernels.INF_CL_INFO_NCE,
            ),
        ),
        two_sided,
    ),
    Case(
        "info_nce_symmetric",
        "large",
        ck.info_nce,
        Sizes(8192, 8192),
        pairs("query", "key"),
        oracle.by_rows(oracle.info_nce),
        TEMPERATURE | {"symmetric": True},
        (
            packages.OPEN_CLIP_SYMMETRIC.bounded(0.20),
            eager(dense.info_nce),
            *on_request(dense.info_nce),
        ),
        two_sided,
    ),
    Case(
        "clip_loss",
        "large",
        ck.clip_loss,
        Sizes(8192, 8192),
        image_text,
        oracle.by_rows(oracle.clip_loss),
        {},
        (
            packages.OPEN_CLIP.bounded(0.20),
            eager(dense.clip_loss),
            *on_request(
                dense.clip_loss,
                in_chunks(chunked.clip_loss),
                keops.KEOPS_CLIP,
                gpu_kernels.INF_CL_CLIP,
            ),
        ),
        two_sided,
    ),
    Case(
        "nt_xent",
        "large",
        ck.nt_xent,
        Sizes(8192, 16384),
        pairs("z1", "z2"),
        oracle.by_rows(oracle.nt_xent),
        TEMPERATURE,
        (
            eager(dense.nt_xent).bounded(0.20),
            packages.LIGHTLY.bounded(0.12),
            *on_request(dense.nt_xent, in_chunks(chunked.nt_xent), gpu_kernels.FLEX_NT_XENT),
        ),
        half_tiles,
    ),
    Case(
        "info_nce_frozen",
        "large",
        ck.info_nce,
        Sizes(1024, 65536),
        queue,
        oracle.by_rows(oracle.info_nce),
        TEMPERATURE,
        (
            eager(dense.info_nce).bounded(0.30),
            *on_request(
                dense.info_nce,
                in_chunks(chunked.info_nce),
                keops.KEOPS_INFO_NCE,
                gpu_kernels.FLEX_INFO_NCE,
            ),
        ),
        frozen_keys,
        frozen=("negatives",),
    ),
    Case(
        "cacr",
        "large",
        ck.cacr,
        Sizes(4096, 65536, k=4),
        positives_and_negatives,
        oracle.by_rows(oracle.cacr),
        {},
        (eager(dense.cacr).bounded(0.25), *on_request(dense.cacr)),
        two_sided,
    ),
    Case(
        "sup_con",
        "large",
        ck.sup_con,
        Sizes(8192, 8192),
        labelled,
        oracle.by_rows(oracle.sup_con),
        TEMPERATURE,
        (
            packages.PYTORCH_METRIC_LEARNING.bounded(0.05),
            eager(dense.sup_con),
            *on_request(dense.sup_con),
        ),
        half_tiles,
    ),
)

CASES = tuple(replace(case, memory=True, bfloat16_at_most=BFLOAT16_AT_MOST) for case in _ROWS)
