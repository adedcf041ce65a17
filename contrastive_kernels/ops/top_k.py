"""The nearest keys of each query, without the matrix of their similarities."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import reference
from ..autograd import (
    in_forward_mode,
    in_transform,
    no_forward_mode,
    no_transform,
    once_differentiable,
    precise,
)
from ..backends import resolve_backend
from ..checks import (
    check_device,
    check_features,
    check_id_pair,
    check_keys,
    check_pair,
    check_vector,
)
from ..distributed import GroupLike, collective, join
from ..distributed.shards import Shards
from ..sources import NegativeSource, as_source, is_source
from ..types import IdPair, TopK, known, statistics_dtype
from . import top_k_operators
from .chunked import Chunks, Ids
from .pairs import FORWARD_PAIRS, Pairs, operand_dtype


@collective
def top_k(
    queries: Tensor,
    keys: Tensor | NegativeSource,
    k: int,
    *,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    threshold: Tensor | None = None,
    largest: bool = True,
    normalize: bool = True,
    group: GroupLike = None,
    backend: str = "auto",
) -> TopK:
    """The k nearest keys of each query, and how near they are.

    s_ij = <q_i, y_j>, of features divided by their L2 norms (at least 1e-12) with `normalize`;
    values_i are the k largest s_ij over the pairs that are kept, the largest first, and ids_i the
    numbers j of their keys. The matrix is never stored: memory grows with N k, beside a workspace
    of each thread.

    Of equal products the key with the smaller id comes first, on every backend, for any number of
    threads and of ranks. A product that is NaN comes before all others, whatever the threshold.
    Where fewer than k keys are left the rest is -inf (+inf for the smallest) with id -1, and a
    product of that value counts as no key. values are differentiable once in queries and in keys
    that are tensors; the backward reads the winners only, and adds in one order. With
    backend="reference" any number of times.

    Args:
        queries: (N, D); float32, float64, bfloat16 or float16, any strides.
        keys: (M, D); or in chunks: a `NegativeSource`, an array or a list of tensors, without
            gradient.
        k: how many, at least 1; may be more than M.
        exclude: integer ids (query_ids (N,), key_ids (M,)); pairs with equal ids are left out.
        keep: integer ids likewise; only pairs with equal ids are kept.
        threshold: (N,), without gradient; only keys with s_ij < threshold_i, which NaN lets none
            be: for negatives that are to be farther than a positive. With `largest=False`
            only those with s_ij > threshold_i.
        largest: False: the k smallest, the smallest first.
        normalize: cosine similarities; False: inner products.
        group: a torch.distributed process group, a DeviceMesh of one dimension, or "world".
            Queries and keys, with their ids, are then this rank's part of those of all, where a
            rank may have none, and j counts the keys of all ranks in their order. Queries travel,
            keys do not.
        backend: "auto", "reference", "cpu" or "triton"; an explicit name never falls back.

    Returns:
        TopK(values (N, k), ids (N, k)): float32, or float64 for float64 features; int64.

    Raises:
        TypeError, ValueError: operands that do not fit; the message names the argument.
        RuntimeError: the backend cannot run here, with the reason.
        NotImplementedError: as the losses do, for second derivatives and forward mode.
    """
    whole = group is None
    check_features("queries", queries, (2,), whole=whole)
    keys = as_source("keys", keys)
    check_keys("keys", keys, (2,), whole=whole)
    check_pair(queries, keys, "queries", "keys")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k}")
    rows, device = queries.shape[0], queries.device
    if exclude is not None:
        exclude = check_id_pair("exclude", exclude, rows, keys.shape[0], device)
    if keep is not None:
        keep = check_id_pair("keep", keep, rows, keys.shape[0], device)
    if threshold is not None:
        check_vector("threshold", threshold, rows)
        check_device("threshold", threshold, device)
        threshold = threshold.detach().to(statistics_dtype(queries))
    if not whole and hasattr(keys, "part"):
        raise ValueError(
            "keys with a group are this rank's part of those of all: of one file that all ranks "
            "have, pass keys.part(start, stop)"
        )
    backend = resolve_backend(backend, device)
    batch, key_batch = join(group, rows, keys.shape[0])
    if key_batch.total == 0:
        raise ValueError("a rank of group must have keys, got none on any")
    if not largest:
        queries, threshold = -queries, None if threshold is None else -threshold
    scale = torch.ones((), dtype=statistics_dtype(queries), device=device)
    given = Pairs(queries, keys, scale, None, exclude, keep, normalize, backend)
    if isinstance(batch, Shards):
        found = _sharded(given, k, threshold, batch, cast(Shards, key_batch))
    else:
        found = _local(given, k, threshold)
    return found if largest else TopK(-found.values, found.ids)


def _local(given: Pairs, k: int, threshold: Tensor | None) -> TopK:
    """Of all queries and keys at hand."""
    if not is_source(given.y):
        return _of_tensors(given, k, threshold)
    if in_transform():
        no_transform("keys in chunks")
    apply = _Chunked.apply
    if torch.compiler.is_compiling():  # a graph cannot hold passes over a file
        apply = torch.compiler.disable(apply)
    of_rows, of_keys = (
        operand_dtype(given.backend, t.dtype, given.x.device) for t in (given.x, given.y)
    )
    chunks = Chunks(given.y, given.backend, given.normalize, of_keys)
    with torch.autocast(given.x.device.type, enabled=False):
        ids = Ids(given.exclude, given.keep)
        return TopK(*apply(given.x.to(of_rows), given.scale, threshold, ids, chunks, k))


def _of_tensors(
    given: Pairs, k: int, threshold: Tensor | None, floor: Tensor | None = None
) -> TopK:
    """`floor` (N,): only products above it need count."""
    x, y = given.x, cast(Tensor, given.y)
    if given.backend == "reference":
        return _dense(given, k, threshold)
    exclude, keep = given.exclude or (None, None), given.keep or (None, None)
    return top_k_operators.top_k(
        given.backend, x=x, y=y, exclude_rows=exclude[0], exclude_cols=exclude[1],
        keep_rows=keep[0], keep_cols=keep[1], threshold=threshold, floor=floor, k=k,
        normalize=given.normalize,
    )  # fmt: skip


def _dense(given: Pairs, k: int, threshold: Tensor | None) -> TopK:
    """In forward mode in blocks of rows of a bounded number of pairs."""
    x, y = given.x, cast(Tensor, given.y)
    rows = max(1, FORWARD_PAIRS // len(y)) if in_forward_mode() else len(x)

    def of(ids: IdPair | None, block: slice) -> IdPair | None:
        return None if ids is None else (ids[0][block], ids[1])

    parts = [
        precise(reference.top_k)(
            x[block], y, k, exclude=of(given.exclude, block), keep=of(given.keep, block),
            threshold=None if threshold is None else threshold[block], normalize=given.normalize,
        )
        for block in (slice(i, i + rows) for i in range(0, len(x), rows))
    ]  # fmt: skip
    if len(parts) == 1:
        return parts[0]
    return TopK(*(torch.cat(each) for each in zip(*parts, strict=True)))


class _Chunked(torch.autograd.Function):
    """A chunk need only show what is above the k-th of those before; the backward takes a second
    pass, for the winners."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, threshold: Tensor | None, ids: Ids, chunks: Chunks,
        k: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        best: TopK | None = None
        floor = None
        for columns, block in chunks.blocks(x, scale, None, ids):
            found = _of_tensors(block, k, threshold, floor)
            best = reference.merged(best, found, columns.start, k)
            floor = best.values[:, -1]
            floor = torch.where(floor.isnan(), torch.inf, floor)
        values, which = known(best)
        ctx.chunks, ctx.ids = chunks, ids
        ctx.save_for_backward(x, scale, which)
        ctx.mark_non_differentiable(which)
        return values, which

    jvp = staticmethod(no_forward_mode)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, scale, which = ctx.saved_tensors
        chunks = ctx.chunks
        total = torch.zeros_like(x, dtype=grad.dtype)
        for columns, block in chunks.blocks(x, scale, None, ctx.ids):
            here = (which >= columns.start) & (which < columns.stop)
            rows = here.any(1).nonzero().flatten()
            ids = torch.where(here, which - columns.start, -1)[rows]
            found = top_k_operators.gradients(
                chunks.backend, x[rows], cast(Tensor, block.y), ids, grad[rows], chunks.normalize,
                (True, False),
            )  # fmt: skip
            total[rows] += known(found[0])
        return total.to(x.dtype), *5 * (None,)


def _sharded(
    given: Pairs, k: int, threshold: Tensor | None, batch: Shards, key_batch: Shards
) -> TopK:
    """The queries of all ranks against this rank's keys; what it finds goes to their ranks."""
    y = cast(Tensor, given.y)
    x = batch.gather_keys(given.x)
    exclude, keep = (
        None if ids is None else (batch.all_ids(ids[0]), ids[1])
        for ids in (given.exclude, given.keep)
    )
    threshold = None if threshold is None else batch.gather(threshold)
    if y.shape[0] > 0:
        given = given._replace(x=x, exclude=exclude, keep=keep)
        values, ids = _local(given, k, threshold)
    else:  # the graph of the other ranks, with no keys
        empty = (x[:, :1] @ y[:, :1].T).sum(1, keepdim=True, dtype=statistics_dtype(x))
        values = empty.expand(-1, k) - torch.inf
        ids = torch.full(values.shape, -1, device=x.device)
    ids = torch.where(ids < 0, ids, ids + key_batch.starts[key_batch.rank])
    values, ids = (batch.to_owners(t).transpose(0, 1).flatten(1) for t in (values, ids))
    return reference.first(values, ids, k)
