"""The table of cases on a GPU: losses in bfloat16, forward and backward; whitening in float32."""

from collections.abc import Callable
from dataclasses import replace

import torch

import contrastive_kernels as ck

from . import chunked, dense, gpu_peers, oracle, peers, whitening
from .case import Case, Rival
from .cases import CASES, half_tiles, two_sided
from .inputs import Groups, Sizes, groups
from .peers import Loss, Peer

GRAPH_AT_MOST = 0.5
MILLION = 2**20
SAMPLED_ROWS = 256


def memory_limit_mb(sizes: Sizes) -> int:
    """Largest peak beyond inputs and gradients; wide features pass through stored chunks."""
    return 64 if sizes.d <= 256 else 600


def kept_tiles(sizes: Sizes, passes: str = "both") -> float:
    """Similarities once, and both gradients from them: 2 NMD and 4."""
    units = {"forward": 2.0, "backward": 4.0, "both": 6.0}[passes]
    return units * sizes.n * sizes.m * sizes.d


def against(loss: Loss, in_chunks: Loss, *others: Peer) -> tuple[Rival, ...]:
    """Dense, compiled, chunked and other peers, to compare with: large cases have bounds in ms."""
    chosen = (peers.dense(loss), peers.compiled(loss), peers.chunked(in_chunks), *others)
    return tuple(Rival(peer, None) for peer in chosen)


INFO_NCE = replace(
    CASES["info_nce"],
    sizes=Sizes(65536, 65536),
    rivals=against(
        dense.info_nce,
        chunked.info_nce,
        peers.LINEAR_CROSS_ENTROPY,
        gpu_peers.FLEX_INFO_NCE,
        gpu_peers.INF_CL_INFO_NCE,
    ),
    at_most_ms=9.0,
)

CLIP_512 = replace(
    CASES["clip_loss"],
    name="clip_loss_512",
    sizes=Sizes(65536, 65536, 512),
    rivals=against(dense.clip_loss, chunked.clip_loss, gpu_peers.INF_CL_CLIP),
    at_most_ms=30.0,
)

LARGE = (
    INFO_NCE,
    CLIP_512,
    replace(CLIP_512, name="clip_loss_768", sizes=Sizes(65536, 65536, 768), at_most_ms=42.0),
    replace(
        CASES["siglip_loss_small"],
        name="siglip_loss",
        group="large",
        sizes=Sizes(65536, 65536, 768),
        oracle=oracle.by_rows(oracle.siglip_loss),
        rivals=against(dense.siglip_loss, chunked.siglip_loss, gpu_peers.SIGLIP_KERNEL),
        flops=kept_tiles,
        at_most_ms=36.0,
    ),
    replace(
        CASES["nt_xent"],
        sizes=Sizes(32768, 65536),
        rivals=against(dense.nt_xent, chunked.nt_xent, gpu_peers.FLEX_NT_XENT),
        at_most_ms=6.0,
    ),
    replace(
        CASES["info_nce_frozen"],
        sizes=Sizes(1024, MILLION),
        rivals=against(dense.info_nce, chunked.info_nce, gpu_peers.FLEX_INFO_NCE),
        frozen=("key", "negatives"),
        at_most_ms=1.1,
    ),
    replace(
        INFO_NCE,
        name="info_nce_million",
        sizes=Sizes(MILLION, MILLION),
        oracle=oracle.sampled_query(SAMPLED_ROWS),
        rivals=(),
        at_most_ms=None,
    ),
)


def small(name: str, sizes: Sizes, flops: Callable[[Sizes], float]) -> Case:
    """A loss at N = 1024: no slower than dense eager torch, and half its time as a CUDA graph."""
    case = CASES[f"{name}_small"]
    loss = case.rivals[0].peer.load()
    return replace(
        case,
        sizes=sizes,
        flops=flops,
        rivals=(case.rivals[0], Rival(peers.compiled(loss), None)),
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


def whiten_rivals(form: Callable[[whitening.Whiten], Loss]) -> tuple[Rival, ...]:
    return (
        Rival(peers.batched(form(whitening.whiten_batched)), 0.1),
        Rival(peers.published(form(whitening.whiten_loop)), 0.01),
    )


def whiten(count: int, rows: int, dim: int, at_most_ms: float) -> tuple[Case, Case]:
    """So many groups: forward alone, which at_most_ms bounds, and with the backward."""
    both = replace(
        CASES[f"whiten_{dim}"],
        sizes=Groups(count, rows, dim),
        rivals=whiten_rivals(whitening.projected),
    )
    forward = replace(
        both,
        name=f"whiten_{dim}_forward",
        loss=ck.whiten,
        inputs=groups,
        oracle=oracle.result(whitening.whiten_batched),
        rivals=whiten_rivals(lambda whiten: whiten),
        frozen=(),
        passes="forward",
        graph_at_most_ms=at_most_ms,
    )
    return forward, both


WHITENING = (*whiten(512, 128, 64, 0.040), *whiten(64, 256, 128, 0.050))

IN_BFLOAT16 = tuple(replace(case, dtype=torch.bfloat16) for case in (*LARGE, *SMALL))
GPU_CASES = {case.name: case for case in (*IN_BFLOAT16, *WHITENING)}
