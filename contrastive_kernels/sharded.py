"""`sweep` and `softplus_sweep` of the rows of each rank against the keys of all ranks.

Each rank computes the blocks of the matrix that `exchange.py` plans for it with the registered
operators. Rows merge as they go; what a block gives for its keys (statistics of columns forward,
gradients backward) goes home to the rank of the keys and is merged there. The backward operators
take the statistics of whole rows and columns, so that exp(z - lse) is right block by block.

Gradients travel in the type of the statistics: rounded to bfloat16 on each rank they would lose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import Block, Ids, merge, operand_dtype
from .distributed import Shards
from .exchange import Cargo, Exchange, choose
from .reference import SoftplusSweep, Sweep
from .registration import statistics_dtype

IdPair = tuple[Tensor, Tensor]


class Options(NamedTuple):
    """What does not change from forward to backward."""

    backend: str
    normalize: bool
    mean: bool
    columns: bool
    symmetric: bool
    exchange: Exchange


def sweep(
    shards: Shards,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    exclude: IdPair | None,
    keep: IdPair | None,
    threshold: Tensor | None,
    normalize: bool,
    mean: bool,
    columns: bool,
    backend: str,
) -> Sweep:
    """`ops.sweep` with the keys y (n_r, D), bias and column ids of this rank, of `shards.sizes`."""
    same_ids = all(pair is None or pair[0] is pair[1] for pair in (exclude, keep))
    # counts above a threshold are of rows only: they take the whole matrix
    symmetric = y is None and bias is None and not columns and same_ids and threshold is None
    x, y = _autocast(backend, x, x if y is None else y)
    exchange = choose(shards, y, x.shape[0], symmetric)
    options = Options(backend, normalize, mean, columns, symmetric, exchange)
    ids = (*(exclude or (None, None)), *(keep or (None, None)))
    return Sweep(*_Softmax.apply(x, y, scale, bias, threshold, ids, options))


def softplus_sweep(
    shards: Shards,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    exclude: IdPair | None,
    keep: IdPair | None,
    threshold: Tensor | None,
    normalize: bool,
    backend: str,
) -> SoftplusSweep:
    """`ops.softplus_sweep` likewise; `bias` is (n_r,) or, the same for all keys, 0-d."""
    x, y = _autocast(backend, x, y)
    exchange = choose(shards, y, x.shape[0], False)
    options = Options(backend, normalize, False, False, False, exchange)
    ids = (*(exclude or (None, None)), *(keep or (None, None)))
    return SoftplusSweep(*_Softplus.apply(x, y, scale, bias, threshold, ids, options))


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, bias, threshold, ids: Ids, options: Options):
        exchange, mean = options.exchange, options.mean
        lse = x.new_full(x.shape[:1], -torch.inf, dtype=statistics_dtype(x))
        stats = torch.stack((lse, torch.zeros_like(lse)) if mean else (lse,), 1)
        monitors = [] if threshold is None else [torch.zeros_like(lse) for _ in range(3)]

        def visit(rows: slice, own: bool, cargo: Cargo) -> Tensor | None:
            block = _block(options, x[rows], cargo, own, scale, bias, ids, rows)
            if block is None:
                return None
            columns = options.columns or (options.symmetric and not own)
            out = block.softmax(None if threshold is None else threshold[rows], mean, columns)
            stats[rows] = merge(stats[rows], torch.stack(out[: 1 + mean], 1))
            for count, t in zip(monitors, out[4 : 4 + len(monitors)], strict=True):
                count[rows] += t
            return torch.stack(out[2 : 3 + mean], 1) if columns else None

        loaded = _load(exchange, y, ids)
        to_send = bias if bias is not None and bias.dim() else None
        neutral = None
        if options.columns or options.symmetric:
            neutral = stats.new_tensor([-torch.inf, 0.0][: 1 + mean])
        cargo = [loaded[0], exchange.load(to_send), None, *loaded[1:]]
        column_stats = exchange.run(cargo, visit, neutral, merge)
        if options.symmetric:
            stats, column_stats = merge(stats, column_stats), None
        ctx.options = options
        ctx.save_for_backward(x, scale, bias, stats, column_stats, *ids[::2], *loaded)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*monitors)
        return (
            *_columns(stats, mean), *_columns(column_stats, mean), *(monitors or 3 * (None,))
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        options, mean = ctx.options, ctx.options.mean
        x, scale, bias, stats, column_stats, row_exclude, row_keep, *loaded = ctx.saved_tensors
        both = _stack_grads(stats, grads[:2])
        of_keys = None  # statistics of the columns, and their gradients
        if options.columns:
            of_keys = torch.cat((column_stats, _stack_grads(column_stats, grads[2:4])), 1)
        elif options.symmetric:
            of_keys = torch.cat((stats, both), 1)

        def gradients(block: Block, rows: slice, key_stats: Tensor | None, needs: list[bool]):
            statistics = [*_columns(stats[rows], mean), *4 * (None,)]
            given = [*_columns(both[rows], mean), None, None]
            if key_stats is not None and block.y is not None:
                statistics[2:4] = _columns(key_stats[:, : 1 + mean], mean)
                given[2:] = _columns(key_stats[:, 1 + mean :], mean)
            return block.softmax_backward(statistics, given, needs)

        ids = (row_exclude, None, row_keep, None)
        return _backward(ctx, x, scale, bias, ids, loaded, of_keys, gradients)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, bias, threshold, ids: Ids, options: Options):
        exchange = options.exchange
        value = x.new_zeros(x.shape[:1], dtype=statistics_dtype(x))
        sums = [value] if threshold is None else [value, *(value.clone() for _ in range(3))]

        def visit(rows: slice, own: bool, cargo: Cargo) -> None:
            block = _block(options, x[rows], cargo, own, scale, bias, ids, rows)
            if block is not None:
                for total, t in zip(sums, block.softplus(threshold)[: len(sums)], strict=True):
                    total += t

        loaded = _load(exchange, y, ids)
        to_send = bias if bias is not None and bias.dim() else None
        exchange.run([loaded[0], exchange.load(to_send), None, *loaded[1:]], visit, None, merge)
        ctx.options = options
        ctx.save_for_backward(x, scale, bias, *ids[::2], *loaded)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*sums[1:])
        return (*sums, *(4 - len(sums)) * (None,))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, scale, bias, row_exclude, row_keep, *loaded = ctx.saved_tensors
        grad = grads[0]
        if grad is None:
            grad = x.new_zeros(x.shape[:1], dtype=statistics_dtype(x))

        def gradients(block: Block, rows: slice, _: None, needs: list[bool]):
            return block.softplus_backward(grad[rows], needs)

        ids = (row_exclude, None, row_keep, None)
        return _backward(ctx, x, scale, bias, ids, loaded, None, gradients)


def _backward(ctx, x, scale, bias, ids: Ids, loaded, of_keys: Tensor | None, gradients):
    """The gradients of a Function's inputs over all blocks; `gradients` does one of them."""
    options: Options = ctx.options
    exchange = options.exchange
    need_x, need_y, need_scale, need_bias = ctx.needs_input_grad[:4]
    by_key = bias is not None and bias.dim() == 1
    dtype, dim = statistics_dtype(x), x.shape[1]
    grad_x = x.new_zeros(x.shape, dtype=dtype)
    grad_scale, grad_bias = x.new_zeros(2, dtype=dtype)
    width = dim * need_y + (need_bias and by_key)

    def visit(rows: slice, own: bool, cargo: Cargo) -> Tensor | None:
        block = _block(options, x[rows], cargo, own, scale, bias, ids, rows)
        if block is None:
            return None
        needs = [need_x, need_y and not own, need_scale, need_bias]
        dx, dy, dscale, dbias = gradients(block, rows, cargo[2], needs)
        if need_x:
            grad_x[rows] += dx
        if need_scale:
            grad_scale.add_(dscale)
        if need_bias and not by_key:
            grad_bias.add_(dbias.sum())
        results = [dy.to(dtype)] if needs[1] else []
        if need_bias and by_key:
            results.append(dbias.unsqueeze(1))
        return torch.cat(results, 1) if len(results) > 1 else next(iter(results), None)

    to_send = exchange.load(bias) if by_key else None
    cargo = [loaded[0], to_send, exchange.load(of_keys), *loaded[1:]]
    neutral = x.new_zeros(width, dtype=dtype) if width else None
    results = exchange.run(cargo, visit, neutral, torch.Tensor.add_)
    grad_y = results[:, :dim] if need_y else None
    if options.symmetric:  # one tensor is both sides
        grad_x, grad_y = grad_x + grad_y, None
    if need_bias and by_key:
        grad_bias = results[:, -1]
    return (
        grad_x.to(x.dtype) if need_x else None,
        None if grad_y is None else grad_y.to(loaded[0].dtype),
        grad_scale if need_scale else None,
        grad_bias if need_bias else None,
        None, None, None,
    )  # fmt: skip


def _block(
    options: Options, x: Tensor, cargo: Cargo, own: bool, scale, bias, ids: Ids, rows: slice
) -> Block | None:
    """Rows x against the keys that came, with their bias and ids; None if there is no pair."""
    keys, key_bias, _, exclude, keep = cargo
    if not (len(x) and len(keys)):
        return None
    if bias is not None and bias.dim() == 0:
        key_bias = bias.expand(len(keys))
    row_exclude, row_keep = (None if t is None else t[rows] for t in ids[::2])
    if own:
        keys = exclude = keep = None
    pairs = (row_exclude, exclude, row_keep, keep)
    return Block(options.backend, options.normalize, x, keys, scale, key_bias, pairs)


def _load(exchange: Exchange, y: Tensor, ids: Ids) -> list[Tensor | None]:
    return [exchange.load(y), exchange.load_ids(ids[1]), exchange.load_ids(ids[3])]


def _columns(stats: Tensor | None, mean: bool) -> list[Tensor | None]:
    """[lse, mean] of merged statistics, None for what is not there."""
    if stats is None:
        return [None, None]
    return [stats[:, 0].clone(), stats[:, 1].clone() if mean else None]


def _stack_grads(stats: Tensor, grads: tuple[Tensor | None, ...]) -> Tensor:
    """Gradients as `stats` (K, 1 or 2); what nobody asked for is 0, so that all ranks agree."""
    columns = zip(stats.unbind(1), grads, strict=False)
    return torch.stack([torch.zeros_like(s) if g is None else g for s, g in columns], 1)


def _autocast(backend: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What the operators of Triton do under autocast, but before the keys travel."""
    return tuple(t.to(operand_dtype(backend, t, t.device)) for t in (x, y))
