"""The keys nearest to each query that are none of its positives."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .. import reference
from ..autograd import in_vmap, outside_graphs, without_tangent
from ..backends import resolve_backend
from ..checks import (
    check_choice,
    check_device,
    check_features,
    check_ids,
    check_keys,
    check_pair,
    finite,
)
from ..distributed import GroupCall, GroupLike, Shards, collective, join
from ..sources import NegativeSource, as_source, is_source
from ..types import HardNegatives, IdPair, statistics_dtype
from .top_k import top_k

PAIRS = 64  # whose scores are taken at a time, of their square


@outside_graphs  # ids are read on the host, and say how many pairs are scored
@collective
@torch.no_grad()
def hard_negatives(
    queries: Tensor,
    keys: Tensor | NegativeSource,
    positives: Tensor,
    *,
    num_negatives: int = 3,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    min_score: float | None = None,
    max_score: float | None = None,
    range_min: int = 0,
    range_max: int | None = None,
    sampling: str = "top",
    generator: torch.Generator | None = None,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    normalize: bool = True,
    group: GroupLike = None,
    backend: str = "auto",
) -> HardNegatives:
    """Hard negatives of each query, by one sweep over the keys that stores no similarities.

    With s_ij as in `top_k` and p_i the smallest score of a positive of query i, the candidates are
    the keys that are no positive of it and have min_score <= s_ij <= max_score,
    s_ij <= p_i - absolute_margin and s_ij <= p_i - relative_margin |p_i|; an s_ij that is NaN fails
    none of these. In their order, the nearest first, those from range_min on are taken.
    NV-Retriever (Moreira et al. 2024) finds relative_margin=0.05 best, its TopK-PercPos of 95 %.

    Args:
        queries: (N, D).
        keys: (M, D), or in chunks, as `top_k` takes them.
        positives: (N,) or (N, P), the numbers of the keys that are positives of a query, -1 for
            none. A query without positives has no margin to keep.
        num_negatives: how many of each query.
        absolute_margin: how far below p_i a negative has to be; None: anywhere.
        relative_margin: the same as a share of |p_i|.
        min_score, max_score: limits of s_ij.
        range_min: so many candidates, the nearest, are skipped.
        range_max: candidates are the range_max first of those that are among the range_max + P
            nearest of all keys; None: of all keys.
        sampling: "top", the nearest candidates; or "random", any of those in the range, which
            needs range_max.
        generator: for "random".
        exclude, keep: integer ids, as `top_k` takes them.
        normalize: cosine similarities; False: inner products.
        group: as `top_k` takes it: queries with their positives, and keys, are this rank's part of
            those of all, ids count the keys of all ranks, and each rank draws for its queries.
        backend: as `top_k` takes it.

    torch.compile breaks its graph here, once. Within torch.func.grad and forward mode what is mined
    is constant; vmap cannot run it.

    Returns:
        HardNegatives(ids (N, num_negatives), scores likewise, positive_scores of the shape of
        positives); -1 and -inf where there are fewer negatives, -inf for no positive. Nothing has a
        gradient.

    Raises:
        TypeError, ValueError: arguments that do not fit; the message names them.
        RuntimeError: the backend cannot run here, with the reason.
        NotImplementedError: within vmap.
    """
    if in_vmap():
        raise NotImplementedError(
            "hard_negatives cannot run within vmap, as how many pairs it scores depends on ids: "
            "call it for each problem, outside"
        )
    whole = group is None
    check_features("queries", queries, (2,), whole=whole)
    keys = as_source("keys", keys)
    check_keys("keys", keys, (2,), whole=whole)
    check_pair(queries, keys, "queries", "keys")
    positives = _check_positives(positives, queries, whole)
    for name, value in (
        ("absolute_margin", absolute_margin), ("relative_margin", relative_margin),
        ("min_score", min_score), ("max_score", max_score),
    ):  # fmt: skip
        if value is not None:
            finite(name, value)
    _check_range(num_negatives, range_min, range_max, sampling)
    name = resolve_backend(backend, queries.device)
    queries = without_tangent(queries)  # which no_grad leaves
    keys = keys if is_source(keys) else without_tangent(keys)

    if isinstance(group, GroupCall):  # one generator is as good as another
        group.arguments["generator"] = None
    batch, key_batch = join(group, len(queries), keys.shape[0])
    strange = ((positives < -1) | (positives >= key_batch.total)).sum()
    if bool(batch.total_of(strange) > 0):
        raise ValueError(f"positives must be ids of the {key_batch.total} keys, or -1")
    of_query = positives if positives.dim() == 2 else positives.unsqueeze(1)
    count = of_query.shape[1]
    if isinstance(batch, Shards):  # each rank has the scores of its keys
        start = cast(Shards, key_batch).own.start
        every = batch.gather(queries), keys, batch.gather(of_query) - start
        scores = batch.home(_scores(*every, normalize, name)).amax(0)
    else:
        scores = _scores(queries, keys, of_query, normalize, name)
    nearest = scores.masked_fill(of_query < 0, torch.inf).amin(1)
    limit = torch.full_like(nearest, torch.inf if max_score is None else max_score)
    if absolute_margin is not None:
        limit = torch.minimum(limit, nearest - absolute_margin)
    if relative_margin is not None:
        share = relative_margin * nearest.abs().masked_fill(nearest == torch.inf, 0.0)
        limit = torch.minimum(limit, nearest - share)

    last = range_min + num_negatives if range_max is None else range_max
    threshold = None
    if range_max is None:  # so that nothing beyond the limit takes a place
        threshold = torch.nextafter(limit, torch.full_like(limit, torch.inf))
    found, ids = top_k(
        queries, keys, last + count, exclude=exclude, keep=keep, threshold=threshold,
        normalize=normalize, group=group, backend=backend,
    )  # fmt: skip
    no_candidate = (ids[:, :, None] == of_query[:, None]).any(2)
    no_candidate |= ~((found <= limit[:, None]) | found.isnan())
    if min_score is not None:
        no_candidate |= found < min_score
    found = found.masked_fill(no_candidate, -torch.inf)
    ids = ids.masked_fill(found == -torch.inf, -1)
    found, ids = (t[:, range_min:] for t in reference.first(found, ids, last))
    if sampling == "random":
        places = _draw(found != -torch.inf, num_negatives, generator)
        found, ids = found.gather(1, places), ids.gather(1, places)
    return HardNegatives(
        ids[:, :num_negatives], found[:, :num_negatives], scores.view(positives.shape)
    )


def _check_positives(positives: Tensor, queries: Tensor, whole: bool) -> Tensor:
    shape = positives.shape if isinstance(positives, Tensor) else ()
    empty = 0 in (shape if whole else shape[1:])
    if len(shape) not in (1, 2) or shape[0] != len(queries) or empty:
        raise ValueError(
            f"positives must be ids of shape ({len(queries)},) or ({len(queries)}, P), got "
            f"{tuple(shape) if shape else type(positives).__name__}"
        )
    if positives.dtype == torch.bool:
        raise TypeError("positives must be numbers of keys, got a mask")
    positives = check_ids("positives", positives, shape).long()
    check_device("positives", positives, queries.device)
    return positives


def _check_range(num_negatives: int, first: int, last: int | None, sampling: str) -> None:
    check_choice("sampling", sampling, ("top", "random"))
    for name, value in (
        ("num_negatives", num_negatives), ("range_min", first),
        ("range_max", 0 if last is None else last),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
    if first < 0:
        raise ValueError(f"range_min must be at least 0, got {first}")
    if last is None and sampling == "random":
        raise ValueError('sampling="random" needs range_max: up to where it may draw')
    if last is not None and last - first < num_negatives:
        raise ValueError(
            f"range_max must be at least range_min + num_negatives = {first + num_negatives}, "
            f"got {last}"
        )


def _scores(
    queries: Tensor, keys: Tensor | NegativeSource, ids: Tensor, normalize: bool, backend: str
) -> Tensor:
    """s_ij of these keys (N, P), -inf for an id of -1: with the bits that they have among the
    nearest, for what is compared with them. So they come of `top_k` too, of few pairs at a time."""
    dtype = statistics_dtype(queries)
    scores = torch.full(ids.shape, -torch.inf, dtype=dtype, device=queries.device)
    start = 0
    for chunk in keys if is_source(keys) else (keys,):
        here = (ids >= start) & (ids < start + len(chunk))
        row, _ = here.nonzero(as_tuple=True)
        of_chunk = (ids[here] - start).to(chunk.device)
        found = []
        for part in range(0, len(row), PAIRS):
            x, y = queries[row[part : part + PAIRS]], chunk[of_chunk[part : part + PAIRS]]
            own = torch.arange(len(x), device=x.device)
            out = top_k(x, y.to(x.device), 1, keep=(own, own), normalize=normalize, backend=backend)
            found.append(out.values.flatten())
        if found:
            scores[here] = torch.cat(found)
        start += len(chunk)
    return scores


def _draw(there: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` places of each row (N, L), in rising order, as far as there are some where `there`;
    beyond, others."""
    drawn = torch.rand(there.shape, generator=generator, device=there.device)
    order = drawn.masked_fill(~there, -1.0).topk(count, dim=1).indices
    return order.sort(1).values
