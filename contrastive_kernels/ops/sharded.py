"""Sweeps of the rows of each rank against the keys of all ranks.

Each rank computes the blocks of the matrix that `distributed/exchange.py` plans for it. Rows merge
as they go; what a block gives for its keys (statistics of columns forward, gradients backward) goes
home to the rank of the keys and is merged there. The backward operators take the statistics of
whole rows and columns, so that exp(z - lse) is right block by block.

Gradients travel in the type of the statistics: rounded to bfloat16 on each rank they would lose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..autograd import once_differentiable
from ..distributed.exchange import Exchange, KeyShard, choose
from ..distributed.shards import Shards
from ..types import Counts, IdPair, SoftplusSweep, Sweep, known, statistics_dtype
from . import pairs
from .pairs import Gradients, Needs, Pairs, exact, merge, operand_dtype, rounded


class Options(NamedTuple):
    """What does not change from forward to backward."""

    backend: str
    normalize: bool
    exchange: Exchange
    mean: bool = False
    columns: bool = False
    symmetric: bool = False


class RowIds(NamedTuple):
    """The ids of this rank's rows."""

    exclude: Tensor | None
    keep: Tensor | None


def softmax(given: Pairs, *, mean: bool, columns: bool, threshold: Tensor | None) -> Sweep:
    """`primitives.sweep` with the keys y (n_r, D), bias and column ids of this rank."""
    # counts above a threshold are of rows only: they take the whole matrix
    symmetric = given.y is None and not columns and threshold is None
    out = _apply(_Softmax, given, threshold, mean=mean, columns=columns, symmetric=symmetric)
    lse, row_mean, col_lse, col_mean, rank, total, count = out
    counts = None if threshold is None else Counts(rank, total, count)
    return Sweep(lse, row_mean, col_lse, col_mean, counts)


def softplus(given: Pairs, *, threshold: Tensor | None) -> SoftplusSweep:
    """`primitives.softplus_sweep` likewise; `bias` is (n_r,) or, the same for all keys, 0-d."""
    value, *counts = _apply(_Softplus, given, threshold)
    return SoftplusSweep(value, None if threshold is None else Counts(*counts))


def _apply(
    function: type[torch.autograd.Function],
    given: Pairs,
    threshold: Tensor | None,
    *,
    symmetric: bool = False,
    **asked: bool,
) -> tuple[Any, ...]:
    # what the operators of Triton do under autocast, but before the keys travel
    x, y = (
        t.to(operand_dtype(given.backend, t.dtype, t.device))
        for t in (given.x, cast(Tensor, given.keys))
    )
    exchange = choose(cast(Shards, given.batch), y, x.shape[0], symmetric)
    options = Options(given.backend, given.normalize, exchange, symmetric=symmetric, **asked)
    exclude, keep = given.exclude or (None, None), given.keep or (None, None)
    rows, shard = RowIds(exclude[0], keep[0]), KeyShard(exclude=exclude[1], keep=keep[1])
    return function.apply(x, y, given.scale, given.bias, threshold, rows, shard, options)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None,
        threshold: Tensor | None, row_ids: RowIds, shard: KeyShard, options: Options,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        exchange, mean = options.exchange, options.mean
        dtype = statistics_dtype(x)
        lse = x.new_full(x.shape[:1], -torch.inf, dtype=torch.float64)  # as exact as its parts
        stats = torch.stack((lse, torch.zeros_like(lse)) if mean else (lse,), 1)
        counts = [] if threshold is None else [torch.zeros_like(lse, dtype=dtype) for _ in range(3)]

        def visit(rows: slice, own: bool, keys: KeyShard) -> Tensor | None:
            block = _block(options, x, scale, bias, row_ids, rows, own, keys)
            if block is None:
                return None
            columns = options.columns or (options.symmetric and not own)
            level = None if threshold is None else threshold[rows]
            out = pairs.softmax(block, mean=mean, columns=columns, threshold=level)
            found = _stacked(out.lse, out.lse_low, out.mean, out.mean_low)
            stats[rows] = merge(stats[rows], found)
            for total, t in zip(counts, out.counts or (), strict=True):
                total[rows] += t
            if not columns:
                return None
            return _stacked(known(out.col_lse), out.col_lse_low, out.col_mean, out.col_mean_low)

        loaded = exchange.load(shard._replace(keys=y))
        neutral = None
        if options.columns or options.symmetric:
            neutral = stats.new_tensor([-torch.inf, 0.0][: 1 + mean])
        column_stats = exchange.run(_with_bias(loaded, exchange, bias), visit, neutral, merge)
        if options.symmetric:
            stats, column_stats = merge(stats, known(column_stats)), None
        ctx.options = options
        ctx.save_for_backward(
            x, scale, bias, stats, column_stats, *row_ids, loaded.keys, loaded.exclude, loaded.keep
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*counts)
        of_columns = (None, None) if column_stats is None else _columns(column_stats, mean, dtype)
        return *_columns(stats, mean, dtype), *of_columns, *(counts or 3 * (None,))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        options, mean = ctx.options, ctx.options.mean
        x, scale, bias, stats, column_stats, *ids = ctx.saved_tensors
        dtype = statistics_dtype(x)
        row_ids, loaded = RowIds(*ids[:2]), KeyShard(ids[2], exclude=ids[3], keep=ids[4])
        lse, row_mean, col_lse, col_mean, *_ = grads
        row_grads = _gradients_like(stats, lse, row_mean)
        of_keys = None  # statistics of the columns, and their gradients
        if options.columns:
            column_grads = _gradients_like(column_stats, col_lse, col_mean)
            of_keys = torch.cat((column_stats, column_grads), 1)
        elif options.symmetric:
            of_keys = torch.cat((stats, row_grads), 1)

        def gradients(
            block: Pairs, rows: slice, key_stats: Tensor | None, needs: Needs
        ) -> Gradients:
            whole = _whole(stats[rows], mean, dtype)
            upstream = Sweep(*_columns(row_grads[rows], mean, dtype))
            if key_stats is not None and block.y is not None:
                found = _whole(key_stats[:, : 1 + mean], mean, dtype)
                whole = whole._replace(
                    col_lse=found.lse, col_mean=found.mean, col_lse_low=found.lse_low,
                    col_mean_low=found.mean_low,
                )  # fmt: skip
                columns = _columns(key_stats[:, 1 + mean :], mean, dtype)
                upstream = upstream._replace(col_lse=columns[0], col_mean=columns[1])
            return pairs.softmax_backward(block, whole, upstream, needs)

        return _backward(ctx, x, scale, bias, row_ids, loaded, of_keys, gradients)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None,
        threshold: Tensor | None, row_ids: RowIds, shard: KeyShard, options: Options,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        exchange = options.exchange
        value = x.new_zeros(x.shape[:1], dtype=statistics_dtype(x))
        sums = [value] if threshold is None else [value, *(value.clone() for _ in range(3))]

        def visit(rows: slice, own: bool, keys: KeyShard) -> None:
            block = _block(options, x, scale, bias, row_ids, rows, own, keys)
            if block is not None:
                level = None if threshold is None else threshold[rows]
                out = pairs.softplus(block, threshold=level)
                for total, t in zip(sums, (out.value, *(out.counts or ())), strict=True):
                    total += t

        loaded = exchange.load(shard._replace(keys=y))
        exchange.run(_with_bias(loaded, exchange, bias), visit, None, merge)
        ctx.options = options
        ctx.save_for_backward(x, scale, bias, *row_ids, loaded.keys, loaded.exclude, loaded.keep)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*sums[1:])
        return (*sums, *(4 - len(sums)) * (None,))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale, bias, *ids = ctx.saved_tensors
        row_ids, loaded = RowIds(*ids[:2]), KeyShard(ids[2], exclude=ids[3], keep=ids[4])
        grad = grads[0]
        if grad is None:
            grad = x.new_zeros(x.shape[:1], dtype=statistics_dtype(x))

        def gradients(block: Pairs, rows: slice, _: Tensor | None, needs: Needs) -> Gradients:
            return pairs.softplus_backward(block, grad[rows], needs)

        return _backward(ctx, x, scale, bias, row_ids, loaded, None, gradients)


def _backward(
    ctx: Any,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: RowIds,
    loaded: KeyShard,
    of_keys: Tensor | None,
    gradients: Callable[[Pairs, slice, Tensor | None, Needs], Gradients],
) -> tuple[Tensor | None, ...]:
    """The gradients of a Function's inputs over all blocks; `gradients` does one of them."""
    options: Options = ctx.options
    exchange = options.exchange
    need = Needs(*ctx.needs_input_grad[:4])
    by_key = bias is not None and bias.dim() == 1
    dtype, dim = statistics_dtype(x), x.shape[1]
    grad_x = x.new_zeros(x.shape, dtype=dtype)
    grad_scale, grad_bias = x.new_zeros(2, dtype=dtype)
    width = dim * need.y + (need.bias and by_key)

    def visit(rows: slice, own: bool, keys: KeyShard) -> Tensor | None:
        block = _block(options, x, scale, bias, row_ids, rows, own, keys)
        if block is None:
            return None
        needs = need._replace(y=need.y and not own)
        made = gradients(block, rows, keys.stats, needs)
        if need.x:
            grad_x[rows] += known(made.x)
        if need.scale:
            grad_scale.add_(known(made.scale))
        if need.bias and not by_key:
            grad_bias.add_(known(made.bias).sum())
        results = [known(made.y).to(dtype)] if needs.y else []
        if need.bias and by_key:
            results.append(known(made.bias).unsqueeze(1))
        return torch.cat(results, 1) if len(results) > 1 else next(iter(results), None)

    loaded = _with_bias(loaded, exchange, bias)
    loaded = loaded._replace(stats=exchange.load(KeyShard(stats=of_keys)).stats)
    neutral = x.new_zeros(width, dtype=dtype) if width else None
    results = exchange.run(loaded, visit, neutral, torch.Tensor.add_)
    grad_y = known(results)[:, :dim] if need.y else None
    if options.symmetric:  # one tensor is both sides
        grad_x, grad_y = grad_x + known(grad_y), None
    if need.bias and by_key:
        grad_bias = known(results)[:, -1]
    return (
        grad_x.to(x.dtype) if need.x else None,
        None if grad_y is None else grad_y.to(known(loaded.keys).dtype),
        grad_scale if need.scale else None,
        grad_bias if need.bias else None,
        None, None, None, None,
    )  # fmt: skip


def _with_bias(loaded: KeyShard, exchange: Exchange, bias: Tensor | None) -> KeyShard:
    """A bias of the keys travels with them; one for all is on every rank."""
    if bias is None or bias.dim() == 0:
        return loaded
    return loaded._replace(bias=exchange.load(KeyShard(bias=bias)).bias)


def _block(
    options: Options,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: RowIds,
    rows: slice,
    own: bool,
    shard: KeyShard,
) -> Pairs | None:
    """Rows x against the keys that came, or themselves; None if there is no pair."""
    x, keys = x[rows], known(shard.keys)
    if not (len(x) and len(keys)):
        return None
    key_bias = bias.expand(len(keys)) if bias is not None and bias.dim() == 0 else shard.bias

    def ids(of_rows: Tensor | None, of_keys: Tensor | None) -> IdPair | None:
        if of_rows is None:
            return None
        mine = of_rows[rows]
        return (mine, mine if own else known(of_keys))

    return Pairs(
        x, None if own else keys, scale, key_bias, ids(row_ids.exclude, shard.exclude),
        ids(row_ids.keep, shard.keep), options.normalize, options.backend,
    )  # fmt: skip


def _columns(stats: Tensor, mean: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(lse, mean) of merged statistics, None for a mean that is not there."""
    lse, *means = (column.clone().to(dtype) for column in stats.unbind(1))
    return lse, means[0] if mean else None


def _whole(stats: Tensor, mean: bool, dtype: torch.dtype) -> Sweep:
    """Merged statistics as those of rows."""
    lse, low = rounded(stats[:, 0], dtype)
    row_mean, mean_low = rounded(stats[:, 1], dtype) if mean else (None, None)
    return Sweep(lse, row_mean, lse_low=low, mean_low=mean_low)


def _stacked(
    lse: Tensor, low: Tensor | None, mean: Tensor | None, mean_low: Tensor | None
) -> Tensor:
    """Statistics (K, 1 or 2) in float64, as `merge` takes them."""
    means = () if mean is None else (exact(mean, mean_low),)
    return torch.stack((exact(lse, low), *means), 1)


def _gradients_like(stats: Tensor, lse: Tensor | None, mean: Tensor | None) -> Tensor:
    """Gradients as `stats` (K, 1 or 2); what nobody asked for is 0, so that all ranks agree."""
    columns = zip(stats.unbind(1), (lse, mean), strict=False)
    return torch.stack([torch.zeros_like(s) if g is None else g for s, g in columns], 1)
