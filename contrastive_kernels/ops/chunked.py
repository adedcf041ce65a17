"""Sweeps against keys that come in chunks: one block for each, by hand.

Log-sum-exps merge, and what is a mean with the weights exp(z - lse) merges along: the mean of the
logits, and the weighted keys that are the gradient of the queries, so that value and gradient take
one pass over the source. Where an operator does not bring the gradient (of the mean, of a bias, of
`reference`), the backward takes a second pass with the statistics of whole rows. Sums over chunks
are float64.

Where each rank has a part of the keys (`RankSource.shared`) its chunks meet the rows of all ranks,
and what they give for a row goes home to the row's rank, where it merges as that of chunks does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import in_transform, no_forward_mode, no_transform, once_differentiable
from ..backends import can_attend, rounds_weights
from ..distributed.rank_source import RankSource
from ..distributed.shards import Shards
from ..sources import NegativeSource, checked
from ..types import Counts, IdPair, SoftplusSweep, Sweep, known, statistics_dtype
from . import pairs
from .pairs import Gradients, KeyBias, Needs, Pairs, exact, merge, operand_dtype, rounded
from .rowwise import BLOCK_ELEMENTS

Columns = slice  # the place of a chunk among the keys


class Chunks(NamedTuple):
    """The source, and what does not change from chunk to chunk or from forward to backward.

    dtype: that of the keys, under autocast.
    bias: makes that of a chunk, if it is not a tensor of all.
    attend: whether the gradient of the queries comes with the forward.
    """

    source: NegativeSource
    backend: str
    normalize: bool
    dtype: torch.dtype
    bias: KeyBias | None = None
    mean: bool = False
    attend: bool = False

    def blocks(
        self, x: Tensor, scale: Tensor, bias: Tensor | None, ids: Ids
    ) -> Iterator[tuple[Columns, Pairs]]:
        """The rows against each chunk."""
        source = self.source
        if len(x) == 0:  # a rank without rows
            if isinstance(source, RankSource):
                source.end()
            return
        stop = 0
        for chunk in source if isinstance(source, RankSource) else checked(source):
            columns = slice(stop, stop + len(chunk))
            stop = columns.stop
            if len(chunk) == 0:
                continue
            keys = chunk.to(x.device, self.dtype)
            of_keys = bias
            if self.bias is not None:
                of_keys = self.bias(keys)
            elif bias is not None:
                of_keys = bias[columns] if bias.dim() else bias.expand(len(chunk))
            yield columns, Pairs(
                x, keys, scale, of_keys, _part(ids.exclude, columns), _part(ids.keep, columns),
                self.normalize, self.backend,
            )  # fmt: skip

    @property
    def ranks(self) -> Shards | None:
        """Whose rows meet the chunks, if not only this rank's."""
        source = self.source
        return source.batch if isinstance(source, RankSource) and source.shared else None

    def gathered(self, t: Tensor) -> Tensor:
        """What belongs to the rows, of all rows that meet the chunks."""
        return t if self.ranks is None else self.ranks.gather(t)

    def gathered_ids(self, ids: Ids) -> Ids:
        """`ids` with those of all rows that meet the chunks."""
        return Ids(*(None if pair is None else (self.gathered(pair[0]), pair[1]) for pair in ids))


class Ids(NamedTuple):
    """Of the rows and of all keys."""

    exclude: IdPair | None
    keep: IdPair | None


def _part(ids: IdPair | None, columns: slice) -> IdPair | None:
    return None if ids is None else (ids[0], ids[1][columns])


def softmax(given: Pairs, *, mean: bool, threshold: Tensor | None) -> Sweep:
    """`primitives.sweep` with the keys of a source; x may have no rows."""
    x, chunks = _operands(given)
    if not mean and not _needs_grad(given.bias) and _needs_grad(x, given.scale):
        attend = can_attend(given.backend, x, chunks.dtype, frozen=True)
        if _needs_grad(given.scale) and rounds_weights(given.backend, x.dtype, chunks.dtype):
            attend = False  # its gradient would be that of rounded weights
        chunks = chunks._replace(attend=attend)
    lse, row_mean, rank, total, count = _apply(
        _Softmax, x, given, threshold, chunks._replace(mean=mean)
    )
    counts = None if threshold is None else Counts(rank, total, count)
    return Sweep(lse, row_mean, counts=counts)


def softplus(given: Pairs, *, threshold: Tensor | None) -> SoftplusSweep:
    """`primitives.softplus_sweep` likewise; `bias` is (M,) or, the same for all keys, 0-d."""
    x, chunks = _operands(given)
    assert chunks.ranks is None, "no loss of this sweep takes sharded negatives"
    attend = _needs_grad(x) and not _needs_grad(given.scale, given.bias)
    chunks = chunks._replace(attend=attend)
    value, *counts = _apply(_Softplus, x, given, threshold, chunks)
    return SoftplusSweep(value, None if threshold is None else Counts(*counts))


def _operands(given: Pairs) -> tuple[Tensor, Chunks]:
    x, source = given.x, cast(NegativeSource, given.y)
    of_rows, of_keys = (operand_dtype(given.backend, t.dtype, x.device) for t in (x, source))
    chunks = Chunks(source, given.backend, given.normalize, of_keys, given.chunk_bias)
    return x.to(of_rows), chunks


def _apply(
    function: type[torch.autograd.Function],
    x: Tensor,
    given: Pairs,
    threshold: Tensor | None,
    chunks: Chunks,
) -> tuple[Any, ...]:
    apply = function.apply
    if in_transform():
        no_transform("negatives in chunks")
    if torch.compiler.is_compiling():  # a graph cannot hold passes over a file
        apply = torch.compiler.disable(apply)
    with torch.autocast(x.device.type, enabled=False):
        return apply(x, given.scale, given.bias, threshold, Ids(given.exclude, given.keep), chunks)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bias: Tensor | None, threshold: Tensor | None,
        ids: Ids, chunks: Chunks,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        rows, row_ids = chunks.gathered(x), chunks.gathered_ids(ids)
        level = None if threshold is None else chunks.gathered(threshold)
        counts = [] if threshold is None else [_zeros(x, len(rows)) for _ in range(3)]
        stats = None  # lse and what merges with its weights: the mean, or attended and slope
        for _, block in chunks.blocks(rows, scale, bias, row_ids):
            out = pairs.softmax(block, mean=chunks.mean, threshold=level, attend=chunks.attend)
            for sums, t in zip(counts, out.counts or (), strict=True):
                sums += t
            mean = None if out.mean is None else exact(out.mean, out.mean_low)
            found = (exact(out.lse, out.lse_low), mean, out.attended, out.slope)
            made = [t.view(len(rows), -1) for t in found if t is not None and len(t)]
            part = torch.cat(made, 1)  # in the type of lse
            stats = part if stats is None else _merge_into(stats, part)
        width = 1 + chunks.mean + chunks.attend * (x.shape[1] + 1)
        if stats is None:  # there are no rows, or no keys
            stats = _zeros(x, len(rows), width)
            stats[:, 0] = -torch.inf
        # not every backend brings, or reads, the slope
        stats = F.pad(stats, (0, width - stats.shape[1]))
        if chunks.ranks is not None:
            both = chunks.ranks.home(torch.cat((stats, *(t.unsqueeze(1) for t in counts)), 1))
            stats = reduce(merge, both[..., : stats.shape[1]].unbind())
            counts = list(both[..., stats.shape[1] :].sum(0).unbind(1))
        lse, low = rounded(stats[:, 0], statistics_dtype(x))
        mean = mean_low = attended = slope = None
        if chunks.mean:
            mean, mean_low = rounded(stats[:, 1], lse.dtype)
        if chunks.attend:
            attended, slope = stats[:, 1:].to(lse.dtype).tensor_split([x.shape[1]], 1)
            attended, slope = attended.contiguous(), slope.flatten().contiguous()
        counts = [t.to(lse.dtype) for t in counts]
        ctx.chunks = chunks
        _save(ctx, x, scale, bias, ids, lse, low, mean, mean_low, attended, slope)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*counts)
        return lse, mean, *(counts or 3 * (None,))

    jvp = staticmethod(no_forward_mode)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_lse: Tensor | None, grad_mean: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        x, scale, bias, ids, (lse, low, mean, mean_low, attended, slope) = _saved(ctx)
        if grad_lse is None and grad_mean is None:
            return 6 * (None,)
        chunks: Chunks = ctx.chunks
        grad_lse = torch.zeros_like(known(lse)) if grad_lse is None else grad_lse
        if mean is not None and grad_mean is None:
            grad_mean = torch.zeros_like(mean)
        if attended is None:
            of_rows = (lse, low, mean, mean_low, grad_lse, grad_mean)
            lse, low, mean, mean_low, grad_lse, grad_mean = (
                None if t is None else chunks.gathered(t) for t in of_rows
            )
        stats = Sweep(
            known(lse), mean, attended=attended, slope=slope, lse_low=low, mean_low=mean_low
        )
        grads = Sweep(known(grad_lse), grad_mean)

        def gradients(block: Pairs, needs: Needs) -> Gradients:
            return pairs.softmax_backward(block, stats, grads, needs)

        if attended is None:
            return _second_pass(ctx, x, scale, bias, ids, gradients)
        if len(x) == 0:
            return _results(ctx, x, torch.zeros_like(x), torch.zeros_like(scale), None)
        # all that the operator still needs of the keys is in `attended`
        no_keys = Pairs(x, None, scale, normalize=chunks.normalize, backend=chunks.backend)
        made = gradients(no_keys, _needs(ctx))
        return _results(ctx, x, made.x, made.scale, None)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bias: Tensor | None, threshold: Tensor | None,
        ids: Ids, chunks: Chunks,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        sums = [_zeros(x, len(x)) for _ in range(1 if threshold is None else 4)]
        attended = _zeros(x, *x.shape) if chunks.attend else None
        ones = x.new_ones(len(x), dtype=statistics_dtype(x))
        for _, block in chunks.blocks(x, scale, bias, ids):
            out = pairs.softplus(block, threshold=threshold)
            for total, t in zip(sums, (out.value, *(out.counts or ())), strict=True):
                total += t
            if attended is not None:  # a row's gradient from above will be a factor
                needs = Needs(x=True, y=False, scale=False, bias=False)
                attended += known(pairs.softplus_backward(block, ones, needs).x)
        value, *counts = (t.to(ones.dtype) for t in sums)
        ctx.chunks = chunks
        _save(ctx, x, scale, bias, ids, attended)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*counts)
        return value, *(counts or 3 * (None,))

    jvp = staticmethod(no_forward_mode)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, scale, bias, ids, (attended,) = _saved(ctx)
        if grad is None:
            return 6 * (None,)
        if attended is not None:
            return _results(ctx, x, grad.unsqueeze(1) * attended, None, None)

        def gradients(block: Pairs, needs: Needs) -> Gradients:
            return pairs.softplus_backward(block, grad, needs)

        return _second_pass(ctx, x, scale, bias, ids, gradients)


def _save(
    ctx: Any, x: Tensor, scale: Tensor, bias: Tensor | None, ids: Ids, *more: Tensor | None
) -> None:
    exclude, keep = ids.exclude or (None, None), ids.keep or (None, None)
    ctx.save_for_backward(x, scale, bias, *exclude, *keep, *more)


def _saved(ctx: Any) -> tuple[Tensor, Tensor, Tensor | None, Ids, list[Tensor | None]]:
    x, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, *more = ctx.saved_tensors
    exclude = None if exclude_rows is None else (exclude_rows, exclude_cols)
    keep = None if keep_rows is None else (keep_rows, keep_cols)
    return x, scale, bias, Ids(exclude, keep), more


def _merge_into(stats: Tensor, part: Tensor) -> Tensor:
    """`merge` in the memory of the first, which holds as much as the features."""
    size = max(1, BLOCK_ELEMENTS // stats.shape[1])
    for rows in (slice(i, i + size) for i in range(0, len(stats), size)):
        stats[rows] = merge(stats[rows], part[rows])
    return stats


def _second_pass(
    ctx: Any,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    ids: Ids,
    gradients: Callable[[Pairs, Needs], Gradients],
) -> tuple[Tensor | None, ...]:
    """The gradients of a Function's inputs, from those of all blocks."""
    chunks, needs = ctx.chunks, _needs(ctx)
    rows = chunks.gathered(x)
    grad_x, grad_scale = _zeros(x, *rows.shape), _zeros(x)
    grad_bias = None if bias is None or not needs.bias else _zeros(x, *bias.shape)
    for columns, block in chunks.blocks(rows, scale, bias, chunks.gathered_ids(ids)):
        made = gradients(block, needs)
        if needs.x:
            grad_x += known(made.x)
        if needs.scale:
            grad_scale += known(made.scale)
        if grad_bias is not None and grad_bias.dim():
            grad_bias[columns] = known(made.bias)
        elif grad_bias is not None:
            grad_bias += known(made.bias).sum()
    if chunks.ranks is not None and needs.x:
        grad_x = chunks.ranks.home(grad_x).sum(0)
    return _results(ctx, x, grad_x, grad_scale, grad_bias)


def _needs(ctx: Any) -> Needs:
    x, scale, bias = ctx.needs_input_grad[:3]
    return Needs(x=x, y=False, scale=scale, bias=bias)


def _results(ctx: Any, x: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of (x, scale, bias) as those of a Function's inputs."""
    dtypes = (x.dtype, *2 * (statistics_dtype(x),))
    given = zip(gradients, ctx.needs_input_grad[:3], dtypes, strict=True)
    return *(known(g).to(dtype) if need else None for g, need, dtype in given), None, None, None


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """A sum over chunks to begin with."""
    return like.new_zeros(shape, dtype=torch.float64)
