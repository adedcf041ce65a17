"""The table of cases: one row each, used for speed, memory and correctness alike.

Features are float32 or bfloat16, D = 128, not normalised unless frozen; the loss normalises them,
and so does every peer, with the gradient through the normalisation.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import contrastive_kernels as ck

from . import chunked, dense, gpu_peers, keops_peers, oracle, peers, whitening
from .case import Case, Rival
from .inputs import (
    Groups,
    Inputs,
    Samples,
    Sizes,
    groups_and_upstream,
    image_text,
    image_text_bias,
    labelled,
    pairs,
    positives,
    positives_and_negatives,
    queue,
    related_views,
    views_and_permutations,
)
from .peers import Loss, Peer
from .swap_cases import SWAPS

TEMPERATURE = {"temperature": 0.1}
MEMORY_LIMIT_MB = 64
BFLOAT16_AT_MOST = 1.0


def two_sided(sizes: Sizes, passes: str = "both") -> float:
    """Similarities twice and two products with their gradient: 2 NMD forward and 6 backward."""
    units = {"forward": 2.0, "backward": 6.0, "both": 8.0}[passes]
    return units * sizes.n * sizes.m * sizes.d


def frozen_keys(sizes: Sizes, passes: str = "both") -> float:
    """Similarities (2 NMD), and with a gradient that of the query in the same sweep (4)."""
    units = {"forward": 2.0, "backward": 0.0, "both": 4.0}[passes]
    return units * sizes.n * sizes.m * sizes.d


def half_tiles(sizes: Sizes, passes: str = "both") -> float:
    """A symmetric matrix of m x m, half of it computed: 1 forward and 3 backward, in m^2 D."""
    return {"forward": 1.0, "backward": 3.0, "both": 4.0}[passes] * sizes.m * sizes.m * sizes.d


def on_request(loss: Loss, *others: Peer) -> tuple[Rival, ...]:
    """What takes long: torch.compile of the dense baseline, and others."""
    return tuple(Rival(peer, None, on_request=True) for peer in (peers.compiled(loss), *others))


LARGE = (
    Case(
        "info_nce",
        "large",
        ck.info_nce,
        Sizes(8192, 8192),
        pairs("query", "key"),
        oracle.by_rows(oracle.info_nce),
        TEMPERATURE,
        (
            Rival(peers.dense(dense.info_nce), 0.28),
            Rival(peers.LINEAR_CROSS_ENTROPY, 0.70),
            Rival(peers.LINEAR_CROSS_ENTROPY_512, 0.70),
            *on_request(
                dense.info_nce,
                peers.chunked(chunked.info_nce),
                peers.INFO_NCE_PYTORCH,
                peers.SENTENCE_TRANSFORMERS,
                keops_peers.KEOPS_INFO_NCE,
                gpu_peers.FLEX_INFO_NCE,
                gpu_peers.INF_CL_INFO_NCE,
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
            Rival(peers.OPEN_CLIP_SYMMETRIC, 0.20),
            Rival(peers.dense(dense.info_nce), None),
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
            Rival(peers.OPEN_CLIP, 0.20),
            Rival(peers.dense(dense.clip_loss), None),
            *on_request(
                dense.clip_loss,
                peers.chunked(chunked.clip_loss),
                keops_peers.KEOPS_CLIP,
                gpu_peers.INF_CL_CLIP,
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
            Rival(peers.dense(dense.nt_xent), 0.20),
            Rival(peers.LIGHTLY, 0.12),
            *on_request(dense.nt_xent, peers.chunked(chunked.nt_xent), gpu_peers.FLEX_NT_XENT),
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
            Rival(peers.dense(dense.info_nce), 0.30),
            *on_request(
                dense.info_nce,
                peers.chunked(chunked.info_nce),
                keops_peers.KEOPS_INFO_NCE,
                gpu_peers.FLEX_INFO_NCE,
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
        (Rival(peers.dense(dense.cacr), 0.25), *on_request(dense.cacr)),
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
            Rival(peers.PYTORCH_METRIC_LEARNING, 0.05),
            Rival(peers.dense(dense.sup_con), None),
            *on_request(dense.sup_con),
        ),
        half_tiles,
    ),
)


def small(
    name: str,
    loss: Loss,
    baseline: Loss,
    inputs: Inputs,
    options: dict | None = None,
    *,
    k: int = 1,
    sizes: type[Sizes] = Sizes,
    frozen: tuple[str, ...] = (),
    flops: Callable[[Sizes, str], float] | None = None,
    others: tuple[Peer, ...] = (),
) -> Case:
    """A loss at N = 256, D = 128, where it may not be slower than dense eager torch."""
    return Case(
        f"{name}_small",
        "small",
        loss,
        sizes(256, 256, k=k),
        inputs,
        oracle.whole(baseline),
        options or {},
        (Rival(peers.dense(baseline), 1.0), *on_request(baseline, *others)),
        flops,
        frozen=frozen,
    )


DEBIASED = {"temperature": 0.5, "tau_plus": 0.1}

SMALL = (
    small(
        "info_nce",
        ck.info_nce,
        dense.info_nce,
        pairs("query", "key"),
        TEMPERATURE,
        flops=two_sided,
    ),
    small(
        "info_nce_symmetric",
        ck.info_nce,
        dense.info_nce,
        pairs("query", "key"),
        TEMPERATURE | {"symmetric": True},
        flops=two_sided,
    ),
    small(
        "info_nce_frozen",
        ck.info_nce,
        dense.info_nce,
        queue,
        TEMPERATURE,
        frozen=("negatives",),
        flops=frozen_keys,
    ),
    small(
        "eqco",
        ck.eqco,
        dense.eqco,
        pairs("query", "key"),
        {"alpha": 65536.0, "temperature": 0.2},
        flops=two_sided,
    ),
    small("nt_xent", ck.nt_xent, dense.nt_xent, pairs("z1", "z2"), TEMPERATURE),
    small("clip_loss", ck.clip_loss, dense.clip_loss, image_text, flops=two_sided),
    small(
        "siglip_loss",
        ck.siglip_loss,
        dense.siglip_loss,
        image_text_bias,
        others=(peers.chunked(chunked.siglip_loss), gpu_peers.SIGLIP_KERNEL),
    ),
    small("sup_con", ck.sup_con, dense.sup_con, labelled, TEMPERATURE, flops=half_tiles),
    small("dcl", ck.dcl, dense.dcl, pairs("z1", "z2"), TEMPERATURE),
    small("dclw", ck.dcl, dense.dcl, pairs("z1", "z2"), TEMPERATURE | {"sigma": 0.5}),
    small("debiased", ck.debiased, dense.debiased, pairs("z1", "z2"), DEBIASED),
    small("hcl", ck.hcl, dense.hcl, pairs("z1", "z2"), DEBIASED | {"beta": 1.0}),
    small(
        "nce",
        ck.nce,
        dense.nce,
        queue,
        {"temperature": 0.07, "num_data": 50_000, "Z": 1.1e5},
        frozen=("negatives",),
    ),
    small("cacr", ck.cacr, dense.cacr, positives, k=4),
    small("cacr_views", ck.cacr_views, dense.cacr_views, related_views, k=3),
    small("cct", ck.cct, dense.cacr, positives),
    small(
        "w_mse",
        ck.w_mse,
        dense.w_mse,
        views_and_permutations(1),
        {"group_size": 256},
        k=2,
        sizes=Samples,
    ),
)


def whiten_flops(sizes: Sizes, passes: str = "both") -> float:
    """n groups of m x d: products with triangular or symmetric halves left out, two forward and
    four backward, and the inverse of a Cholesky factor forward."""
    units = {"forward": 2.0, "backward": 4.0, "both": 6.0}[passes]
    inverse = 0 if passes == "backward" else sizes.d**3
    return sizes.n * (units * sizes.m * sizes.d**2 + inverse)


def w_mse_flops(sizes: Sizes, passes: str = "both") -> float:
    """Four iterations of whitening k views, n / m groups each."""
    return 4 * sizes.k * whiten_flops(Groups(sizes.n // sizes.m, sizes.m, sizes.d), passes)


def whiten(count: int, rows: int, dim: int, at_most: float) -> Case:
    """So many groups, forward and backward."""
    return Case(
        f"whiten_{dim}",
        "whitening",
        whitening.projected(ck.whiten),
        Groups(count, rows, dim),
        groups_and_upstream,
        oracle.whole(whitening.projected(whitening.whiten_batched)),
        {},
        (
            Rival(peers.published(whitening.projected(whitening.whiten_loop)), at_most),
            Rival(peers.batched(whitening.projected(whitening.whiten_batched)), 0.5),
        ),
        whiten_flops,
        frozen=("upstream",),
    )


WHITENING = (
    whiten(64, 128, 64, 0.25),
    whiten(32, 256, 128, 0.35),
    whiten(16, 512, 256, 0.45),
    Case(
        "w_mse",
        "whitening",
        ck.w_mse,
        Samples(1024, 256, k=4),
        views_and_permutations(4),
        oracle.whole(whitening.w_mse_loop),
        {"group_size": 256},
        (Rival(peers.published(whitening.w_mse_loop), 0.3),),
        w_mse_flops,
    ),
)

_FROZEN = next(case for case in LARGE if case.name == "info_nce_frozen")

SCALING = tuple(
    replace(_FROZEN, name=f"info_nce_frozen_{m}", group="scaling", sizes=Sizes(1024, m), rivals=())
    for m in (8_000, 40_000, 200_000, 1_000_000)
)

MILLION = SCALING[-1]
MILLION_FORWARD = replace(MILLION, name="info_nce_forward_1000000", passes="forward")


def with_memory(cases: Iterable[Case]) -> Iterator[Case]:
    return (replace(case, memory=True) for case in cases)


CASES = {
    case.name: case
    for case in (
        *with_memory(replace(case, bfloat16_at_most=BFLOAT16_AT_MOST) for case in LARGE),
        *with_memory(SWAPS),
        *SMALL,
        *WHITENING,
        *SCALING[:-1],
        *with_memory((MILLION, MILLION_FORWARD)),
    )
}
