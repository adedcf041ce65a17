"""Multiple negatives ranking: queries against documents, several directions in one softmax."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import resolve_backend
from ..checks import (
    check_features,
    check_mask,
    check_pair,
    check_positive,
    check_range,
    check_reduction,
    check_views,
    scalar,
)
from ..distributed import Batch, Shards, join
from ..ops import Asked, Part, operands, positives, sweeps, swept_positives
from ..types import Counts, Group, IdPair, Loss, Sweep, known
from .algebra import add_up, cleared, log_add, masked_logsumexp, softplus
from .base import ContrastiveLoss, loss
from .nested import nested, weigh
from .stats import mi_lower_bound, pair_stats, tie_limit

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITIONS = ("joint", "per_direction")
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")


def _fuses(given: dict[str, Any]) -> bool:
    """Whether all logits come from sweeps alone."""
    return given.get("negatives_mask") is None and not given.get("hardness_strength")


@loss
@nested("query", "documents", fuses=_fuses)
def mnrl(
    query: Tensor,
    documents: Tensor | Sequence[Tensor],
    *,
    negatives_mask: Tensor | None = None,
    scale: float | Tensor = 20.0,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
    return_stats: bool = False,
) -> Loss:
    """Multiple negatives ranking, the loss of text retrieval (Henderson et al. 2017, sec. 4.4).

    loss_i = log sum_c exp(z_ic) - z_i+,   z = scale <., .>,   z_i+ for query i and its positive,

    over the candidates c of the directions, (a) "query_to_doc": query i and all documents;
    (b) "query_to_query": query i and the other queries; (c) "doc_to_query": positive i and all
    queries; (d) "doc_to_doc": positive i and the documents of other queries. (a) alone is InfoNCE,
    (a) and (c) per direction are symmetric InfoNCE, all of them jointly the loss of GTE (Li et al.
    2023). Where (a) and (c) are joint, the positive is a candidate twice.

    Args:
        query: (N, D).
        documents: (N (1 + K), D): the positive of every query, then a first hard negative of every
            query, and so on; or these 1 + K blocks (N, D) as a sequence. With a `group` the hard
            negatives of all ranks are candidates.
        negatives_mask: (N, K), bool: True where the hard negative k of query i is one. The others,
            padding of any value, are candidates of no query and have gradient 0; the documents are
            copied for them on a GPU, and where their values are NaN, infinite or huge.
        scale: 1 / temperature: number or tensor of one element (may be learned).
        directions: which of the four; "query_to_doc" has to be among them.
        partition_mode: "joint": one sum over all directions; "per_direction": the mean of one loss
            for each, which only (a) and (c) allow.
        hardness_mode: (a) only: which negatives get a logit larger by hardness_strength times
            their similarity, a constant to the gradient: "in_batch_negatives", documents of other
            queries (Lan et al. 2025, eq. 5); "hard_negatives", those of the query itself
            (EmbeddingGemma, 2025); "all_negatives".
        hardness_strength: >= 0.

    Returns:
        0-d, or (N,) with reduction="none"; with return_stats=True also LossStats: rank, accuracy
        and similarities of (a), the bound for (a) alone without hardness.
    """
    documents = _check_documents(query, documents, whole=group is None)
    if negatives_mask is not None:
        negatives_mask = _check_mask(query, documents, negatives_mask)
    check_reduction(reduction)
    _check_modes(directions, partition_mode, hardness_mode)
    check_range("hardness_strength", hardness_strength, 0.0)
    if isinstance(scale, Tensor):
        scale = scalar("scale", scale)
    else:
        check_positive("scale", scale)
    in_batch = hardness_strength if hardness_mode in ("in_batch_negatives", "all_negatives") else 0
    own_negatives = hardness_strength if hardness_mode in ("hard_negatives", "all_negatives") else 0

    n, m = query.shape[0], documents.shape[0]
    backend = resolve_backend(backend, query.device)
    batch, of_documents = join(
        group, n, m, exchange=exchange, documents=documents, directions=sorted(directions)
    )
    blocks = _count_blocks(batch, of_documents)
    keep = None
    if negatives_mask is not None:
        counted = torch.cat((torch.ones_like(negatives_mask[:, :1]), negatives_mask), 1)
        dropped = (~counted).T.flatten()
        documents = cleared(documents, dropped)
        ids = dropped.int()
        keep = (ids[:n], ids)
    pairs = blocks == 1
    if pairs:
        of_documents = batch
    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    # a sweep that gives the positives takes hard negatives as it takes all others
    aligned = False
    if negatives_mask is None and not (in_batch or own_negatives):
        aligned, dots, query, documents = swept_positives(
            query, documents, batch, dots=return_stats, prefixes=dims is not None, **options
        )
    else:
        dots, query, documents = positives(query, documents, **options)
    apart = not (aligned or pairs)  # own hard negatives are not in the sweep
    ids = batch.own_ids(query.device)
    same_query = dropped_ids = (ids, ids)
    if apart or (not pairs and "doc_to_doc" in directions):
        document_ids = of_documents.own_ids(query.device, repeat=blocks)
        same_query = dropped_ids = (document_ids[:n], document_ids)
    if aligned and not pairs:
        dropped_ids = (ids, torch.cat((ids, ids.new_full((m - n,), -1))))
    positive = documents if pairs else Part(documents, slice(n))
    if dots is not None:
        dots = dots.reshape(n, 1 if aligned else blocks)
        dot, pos = dots[:, 0], scale * dots[:, 0]
    backward = "doc_to_query" in directions
    sharp, share = _harder(scale, in_batch)
    limit = None
    if return_stats:
        limit = tie_limit(sharp * dot, query, documents[:n], sharp, **options)

    def asked(
        x: Tensor | Part, y: Tensor | None, exclude: IdPair, batch: Batch, **more: Any
    ) -> Asked:
        z = {"scale": scale, "exclude": exclude, "batch": batch, "ends": dims} | options
        return Asked(operands(x, y, **(z | more)))

    # the columns of the first sweep are a direction too, unless its logits are not those of it
    sweep = asked(
        query, documents, dropped_ids, of_documents, scale=sharp, keep=keep, aligned=aligned
    )
    every = {"query_to_doc": sweep._replace(columns=backward and not in_batch, threshold=limit)}
    if backward and in_batch:
        every["doc_to_query"] = asked(positive, query, (ids, ids), batch)
    if "query_to_query" in directions:
        every["query_to_query"] = asked(query, None, (ids, ids), batch)
    if "doc_to_doc" in directions:
        others = None if pairs else documents
        every["doc_to_doc"] = asked(positive, others, same_query, of_documents, keep=keep)
    made = dict(zip(every, sweeps(list(every.values())), strict=True))
    out = made["query_to_doc"] = _of_share(made["query_to_doc"], share)
    if aligned:
        pos = known(out.partner)
    logits = {name: [found.lse] for name, found in made.items()}
    if apart:
        own = known(dots)[:, 1:]
        hard = scale * own + own_negatives * own.detach()
        logits["query_to_doc"].append(masked_logsumexp(hard, negatives_mask))
    if backward and not in_batch:
        logits["doc_to_query"] = [known(out.col_lse)[..., :n]]

    if partition_mode == "joint":
        rows = _excess(chain(*logits.values()), pos, 2 if backward else 1)
    else:
        rows = add_up(_excess(part, pos) for part in logits.values()) / len(logits)
    value = batch.reduce_rows(weigh(rows, weights), reduction)
    if not return_stats:
        return value
    counts: list[Counts | None] = [out.counts]
    if apart:
        hard = (sharp * own).detach()
        kept = torch.ones_like(hard).bool() if negatives_mask is None else negatives_mask
        counts.append(reference.threshold_stats(hard, kept, limit))
    stats = pair_stats(dot, counts, sharp, batch, lse=rows + pos)
    if len(logits) == 1 and not (in_batch or own_negatives):
        count: int | Tensor = blocks * batch.total - 1
        if negatives_mask is not None:
            count = count - batch.total_of((~negatives_mask).sum())
        if isinstance(count, Tensor) or count > 0:
            bound = mi_lower_bound(batch.mean(rows), count)
            stats = stats._replace(mi_lower_bound=bound)
    return value, stats


class MNRL(ContrastiveLoss):
    function = staticmethod(mnrl)


def _check_documents(query: Tensor, documents: Tensor | Sequence[Tensor], whole: bool) -> Tensor:
    """Documents (N (1 + K), D), or raise. `whole=False`: N may be 0."""
    if not isinstance(documents, Tensor):
        documents = list(documents)
        if not documents:
            raise ValueError("documents must have at least one tensor, got an empty sequence")
        for index, block in enumerate(documents):
            check_views("query", query, f"documents[{index}]", block, whole=whole)
        return torch.cat(documents)
    check_features("query", query, (2,), whole=whole)
    check_features("documents", documents, (2,), whole=whole)
    check_pair(query, documents, "query", "documents")
    n, m = query.shape[0], documents.shape[0]
    if m % n if n else m:
        raise ValueError(f"documents must have a multiple of the {n} rows of query, got {m}")
    return documents


def _check_mask(query: Tensor, documents: Tensor, mask: Any) -> Tensor:
    """The mask (N, K) of the K hard negatives of every query, or raise."""
    n = query.shape[0]
    # a rank without rows learns from others how many there are
    count = documents.shape[0] // n - 1 if n else getattr(mask, "shape", (0, 0))[-1]
    if n and count == 0:
        raise ValueError(
            "negatives_mask needs documents with hard negatives, (N (1 + K), D), got "
            f"{tuple(documents.shape)} for {n} rows of query"
        )
    return check_mask("negatives_mask", mask, (n, count), query.device)


def _count_blocks(batch: Batch, of_documents: Batch) -> int:
    """1 + K, the number of documents of each query; a rank without rows learns it from others."""
    blocks = of_documents.total // batch.total
    if isinstance(batch, Shards) and isinstance(of_documents, Shards):
        if of_documents.sizes != batch.times(blocks).sizes:
            raise ValueError(
                "documents must be as many for each query on every rank of group, got "
                f"{of_documents.sizes} for {batch.sizes} rows of query"
            )
    return blocks


def _check_modes(directions: Sequence[str], partition_mode: str, hardness_mode: str | None) -> None:
    if isinstance(directions, str) or not set(directions) <= set(DIRECTIONS):
        raise ValueError(f"directions must be some of {', '.join(DIRECTIONS)}, got {directions!r}")
    if "query_to_doc" not in directions:
        raise ValueError(f"directions must have query_to_doc among them, got {directions!r}")
    if partition_mode not in PARTITIONS:
        raise ValueError(
            f"partition_mode must be one of {', '.join(PARTITIONS)}, got {partition_mode!r}"
        )
    if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
        raise ValueError(
            "partition_mode must be 'joint' with query_to_query or doc_to_doc, which have no "
            "positive, got 'per_direction'"
        )
    if hardness_mode is not None and hardness_mode not in HARDNESS:
        raise ValueError(
            f"hardness_mode must be one of {', '.join(HARDNESS)} or None, got {hardness_mode!r}"
        )


def _harder(scale: float | Tensor, strength: float) -> tuple[float | Tensor, float | Tensor | None]:
    """(the scale of scale <x, y> + strength * stop_grad(<x, y>), the share of it that has a
    gradient, None for all)"""
    if not strength:
        return scale, None
    share = scale / (scale + strength)
    share = share.detach() if isinstance(share, Tensor) else share
    return scale / share, share


def _of_share(out: Sweep, share: float | Tensor | None) -> Sweep:
    """A sweep over the logits of `_harder`."""
    if share is None:
        return out
    # d sharp <x, y> = d(scale <x, y>) / share, in the features and in the scale
    return out._replace(lse=share * out.lse + (1 - share) * out.lse.detach())


def _excess(logits: Iterable[Tensor], pos: Tensor, positives: int = 1) -> Tensor:
    """log(positives exp(pos) + sum exp(logits)) - pos; also where all logits are -inf."""
    first, *others = (z - pos for z in logits)
    if positives > 1:
        own = math.log(positives)
        return log_add(own + softplus(first - own), *others)
    return log_add(softplus(first), *others)
