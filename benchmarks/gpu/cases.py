"""The table of cases on a GPU: losses in bfloat16, forward and backward; whitening in float32."""

from collections.abc import Callable
from dataclasses import replace

import torch

import contrastive_kernels as ck

from ..baselines import chunked, dense, gpu_kernels, packages, whitening
from ..baselines.baseline import (
    Baseline,
    Loss,
    batched,
    compiled,
    eager,
    in_chunks,
    published,
)
from ..cases import oracle, table
from ..cases.case import Case
from ..cases.inputs import Groups, Sizes, groups
from ..cases.operations import half_tiles, kept_tiles, two_sided

GRAPH_AT_MOST = 0.5
MILLION = 2**20
SAMPLED_ROWS = 256


def memory_limit_mb(sizes: Sizes) -> int:
    """Largest peak beyond inputs and gradients; wide features pass through stored chunks."""
    return 64 if sizes.d <= 256 else 600


def against(loss: Loss, chunks: Loss, *others: Baseline) -> tuple[Baseline, ...]:
    """Dense, compiled, chunked and others, to compare with: large cases have bounds in ms."""
    return (eager(loss), compiled(loss), in_chunks(chunks), *others)


INFO_NCE = replace(
    table.CASES["info_nce"],
    sizes=Sizes(65536, 65536),
    baselines=against(
        dense.info_nce,
        chunked.info_nce,
        packages.LINEAR_CROSS_ENTROPY,
        gpu_kernels.FLEX_INFO_NCE,
        gpu_kernels.INF_CL_INFO_NCE,
    ),
    at_most_ms=9.0,
)

CLIP_512 = replace(
    table.CASES["clip_loss"],
    name="clip_loss_512",
    sizes=Sizes(65536, 65536, 512),
    baselines=against(dense.clip_loss, chunked.clip_loss, gpu_kernels.INF_CL_CLIP),
    at_most_ms=30.0,
)

LARGE = (
    INFO_NCE,
    CLIP_512,
    replace(CLIP_512, name="clip_loss_768", sizes=Sizes(65536, 65536, 768), at_most_ms=42.0),
    replace(
        table.CASES["siglip_loss_small"],
        name="siglip_loss",
        group="large",
        sizes=Sizes(65536, 65536, 768),
        oracle=oracle.by_rows(oracle.siglip_loss),
        baselines=against(dense.siglip_loss, chunked.siglip_loss, gpu_kernels.SIGLIP_KERNEL),
        flops=kept_tiles,
        at_most_ms=36.0,
    ),
    replace(
        table.CASES["nt_xent"],
        sizes=Sizes(32768, 65536),
        baselines=against(dense.nt_xent, chunked.nt_xent, gpu_kernels.FLEX_NT_XENT),
        at_most_ms=6.0,
    ),
    replace(
        table.CASES["info_nce_frozen"],
        sizes=Sizes(1024, MILLION),
        baselines=against(dense.info_nce, chunked.info_nce, gpu_kernels.FLEX_INFO_NCE),
        frozen=("key", "negatives"),
        at_most_ms=1.1,
    ),
    replace(
        INFO_NCE,
        name="info_nce_million",
        sizes=Sizes(MILLION, MILLION),
        oracle=oracle.sampled_query(SAMPLED_ROWS),
        baselines=(),
        at_most_ms=None,
    ),
)


def small(name: str, sizes: Sizes, flops: Callable[[Sizes], float]) -> Case:
    """A loss at N = 1024: no slower than dense eager torch, and half its time as a CUDA graph."""
    case = table.CASES[f"{name}_small"]
    dense_baseline = case.baselines[0]
    return replace(
        case,
        sizes=sizes,
        flops=flops,
        baselines=(dense_baseline, compiled(dense_baseline.load())),
        graph_at_most=GRAPH_AT_MOST,
    )


SMALL = (
    small("info_nce", Sizes(1024, 1024), two_sided),
    small("clip_loss", Sizes(1024, 1024), two_sided),
    small("siglip_loss", Sizes(1024, 1024), kept_tiles),
    small("nt_xent", Sizes(1024, 2048), half_tiles),
    small("sup_con", Sizes(1024, 1024), half_tiles),
    small("cacr", Sizes(1024, 4096, k=4), two_sided),
)


def whiten_baselines(form: Callable[[whitening.Whiten], Loss]) -> tuple[Baseline, ...]:
    return (
        batched(form(whitening.whiten_batched)).bounded(0.1),
        published(form(whitening.whiten_loop)).bounded(0.01),
    )


def whiten(count: int, rows: int, dim: int, at_most_ms: float) -> tuple[Case, Case]:
    """So many groups: forward alone, which at_most_ms bounds, and with the backward."""
    both = replace(
        table.CASES[f"whiten_{dim}"],
        sizes=Groups(count, rows, dim),
        baselines=whiten_baselines(whitening.projected),
    )
    forward = replace(
        both,
        name=f"whiten_{dim}_forward",
        loss=ck.whiten,
        inputs=groups,
        oracle=oracle.result(whitening.whiten_batched),
        baselines=whiten_baselines(lambda whiten: whiten),
        frozen=(),
        passes="forward",
        graph_at_most_ms=at_most_ms,
    )
    return forward, both


WHITENING = (*whiten(512, 128, 64, 0.040), *whiten(64, 256, 128, 0.050))

IN_BFLOAT16 = tuple(replace(case, dtype=torch.bfloat16) for case in (*LARGE, *SMALL))
CASES = {case.name: case for case in (*IN_BFLOAT16, *WHITENING)}
