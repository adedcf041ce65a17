"""`sweep` and `softplus_sweep` against keys that come in chunks: one block for each, by hand.

Log-sum-exps merge, and what is a mean with the weights exp(z - lse) merges along: the mean of the
logits, and the weighted keys that are the gradient of the queries, so that value and gradient take
one pass over the source. Where an operator does not bring the gradient (of the mean, of a bias, of
`reference`), the backward takes a second pass with the statistics of whole rows. Sums over chunks
are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import Block, Gradients, Ids, merge, operand_dtype
from .reference import SoftplusSweep, Sweep
from .registration import can_attend, statistics_dtype
from .sources import NegativeSource

IdPair = tuple[Tensor, Tensor]
Columns = slice  # the place of a chunk among the keys


class Chunks(NamedTuple):
    """The source, and what does not change from chunk to chunk or from forward to backward.

    dtype: that of the keys, under autocast.
    attend: whether the gradient of the queries comes with the forward.
    """

    source: NegativeSource
    backend: str
    normalize: bool
    dtype: torch.dtype
    mean: bool = False
    attend: bool = False

    def blocks(
        self, x: Tensor, scale: Tensor, bias: Tensor | None, ids: Ids
    ) -> Iterator[tuple[Columns, Block]]:
        """The rows against each chunk."""
        if len(x) == 0:  # a rank without rows
            return
        total, dim = self.source.shape
        stop = 0
        for chunk in self.source:
            if chunk.dim() != 2 or chunk.shape[1] != dim or chunk.dtype != self.source.dtype:
                raise ValueError(
                    f"a chunk of negatives must have shape (m, {dim}) and be {self.source.dtype}, "
                    f"got {tuple(chunk.shape)} and {chunk.dtype}"
                )
            if chunk.requires_grad:
                raise ValueError("a chunk of negatives must not need a gradient: detach it")
            columns = slice(stop, stop + len(chunk))
            stop = columns.stop
            if stop > total:
                break
            if len(chunk) == 0:
                continue
            of_keys = bias
            if bias is not None:
                of_keys = bias[columns] if bias.dim() else bias.expand(len(chunk))
            exclude, keep = (None if t is None else t[columns] for t in ids[1::2])
            pairs = (ids[0], exclude, ids[2], keep)
            keys = chunk.to(x.device, self.dtype)
            yield columns, Block(self.backend, self.normalize, x, keys, scale, of_keys, pairs)
        if stop != total:
            more = "at least " if stop > total else ""
            raise ValueError(
                f"negatives must have the {total} rows of their shape, got {more}{stop}"
            )


def sweep(
    source: NegativeSource,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    exclude: IdPair | None,
    keep: IdPair | None,
    threshold: Tensor | None,
    normalize: bool,
    mean: bool,
    backend: str,
) -> Sweep:
    """`ops.sweep` with the keys of a source; x may have no rows."""
    x, chunks, ids = _operands(source, x, exclude, keep, normalize, backend)
    if not (mean or _needs_grad(bias) or backend == "reference"):
        keys = x.new_empty(0, dtype=chunks.dtype)
        attend = len(x) > 0 and _needs_grad(x, scale) and can_attend(backend, x, keys, frozen=True)
        chunks = chunks._replace(attend=attend)
    chunks = chunks._replace(mean=mean)
    lse, mean, *monitors = _apply(_Softmax, x, scale, bias, threshold, ids, chunks)
    return Sweep(lse, mean, None, None, *monitors)


def softplus_sweep(
    source: NegativeSource,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    exclude: IdPair | None,
    keep: IdPair | None,
    threshold: Tensor | None,
    normalize: bool,
    backend: str,
) -> SoftplusSweep:
    """`ops.softplus_sweep` likewise; `bias` is (M,) or, the same for all keys, 0-d."""
    x, chunks, ids = _operands(source, x, exclude, keep, normalize, backend)
    chunks = chunks._replace(attend=_needs_grad(x) and not _needs_grad(scale, bias))
    return SoftplusSweep(*_apply(_Softplus, x, scale, bias, threshold, ids, chunks))


def _operands(
    source: NegativeSource,
    x: Tensor,
    exclude: IdPair | None,
    keep: IdPair | None,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Chunks, Ids]:
    dtypes = [operand_dtype(backend, t, x.device) for t in (x, source)]
    ids = (*(exclude or (None, None)), *(keep or (None, None)))
    return x.to(dtypes[0]), Chunks(source, backend, normalize, dtypes[1]), ids


def _apply(function: type[torch.autograd.Function], x: Tensor, *inputs) -> tuple:
    apply = function.apply
    if torch.compiler.is_compiling():  # a graph cannot hold passes over a file
        apply = torch.compiler.disable(apply)
    with torch.autocast(x.device.type, enabled=False):
        return apply(x, *inputs)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, bias, threshold, ids: Ids, chunks: Chunks):
        monitors = [] if threshold is None else [_zeros(x, len(x)) for _ in range(3)]
        stats = None  # lse and what merges with its weights: the mean, or attended and slope
        for _, block in chunks.blocks(x, scale, bias, ids):
            out = block.softmax(threshold, chunks.mean, False, chunks.attend)
            for count, t in zip(monitors, out[4:7], strict=False):
                count += t
            made = [t.view(len(x), -1) for t in (*out[:2], *out[7:]) if t is not None and len(t)]
            part = torch.cat(made, 1).double()
            stats = part if stats is None else merge(stats, part)
        if stats is None:  # there are no rows
            stats = _zeros(x, 0, 1 + chunks.mean)
        stats = stats.to(statistics_dtype(x))
        lse, rest = stats[:, 0].clone(), stats[:, 1:]
        mean = rest[:, 0].clone() if chunks.mean else None
        attended = slope = None
        if chunks.attend:
            attended, slope = rest.tensor_split([x.shape[1]], 1)
            attended, slope = attended.contiguous(), slope.flatten().contiguous()
        monitors = [t.to(lse.dtype) for t in monitors]
        ctx.chunks = chunks
        ctx.save_for_backward(x, scale, bias, *ids, lse, mean, attended, slope)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*monitors)
        return lse, mean, *(monitors or 3 * (None,))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_lse, grad_mean, *_):
        x, scale, bias, *ids, lse, mean, attended, slope = ctx.saved_tensors
        if grad_lse is None and grad_mean is None:
            return 6 * (None,)
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
        if mean is not None and grad_mean is None:
            grad_mean = torch.zeros_like(mean)
        statistics = (lse, mean, None, None, attended, slope)
        grads = (grad_lse, grad_mean, None, None)

        def gradients(block: Block, needs: list[bool]) -> Gradients:
            return block.softmax_backward(statistics, grads, needs)

        if attended is None:
            return _second_pass(ctx, x, scale, bias, ids, gradients)
        # all that the operator still needs of the keys is in `attended`
        no_keys = Block(ctx.chunks.backend, ctx.chunks.normalize, x, None, scale, None, 4 * (None,))
        dx, _, dscale, _ = gradients(no_keys, _needs(ctx))
        return _results(ctx, x, dx, dscale, None)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, bias, threshold, ids: Ids, chunks: Chunks):
        sums = [_zeros(x, len(x)) for _ in range(1 if threshold is None else 4)]
        attended = _zeros(x, *x.shape) if chunks.attend else None
        ones = x.new_ones(len(x), dtype=statistics_dtype(x))
        for _, block in chunks.blocks(x, scale, bias, ids):
            for total, t in zip(sums, block.softplus(threshold), strict=False):
                total += t
            if attended is not None:  # a row's gradient from above will be a factor
                attended += block.softplus_backward(ones, [True, False, False, False])[0]
        value, *monitors = (t.to(ones.dtype) for t in sums)
        ctx.chunks = chunks
        ctx.save_for_backward(x, scale, bias, *ids, attended)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*monitors)
        return value, *(monitors or 3 * (None,))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, scale, bias, *ids, attended = ctx.saved_tensors
        if grad is None:
            return 6 * (None,)
        if attended is not None:
            return _results(ctx, x, grad.unsqueeze(1) * attended, None, None)

        def gradients(block: Block, needs: list[bool]) -> Gradients:
            return block.softplus_backward(grad, needs)

        return _second_pass(ctx, x, scale, bias, ids, gradients)


def _second_pass(
    ctx,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    ids: Ids,
    gradients: Callable[[Block, list[bool]], Gradients],
) -> Gradients:
    """The gradients of a Function's inputs, from those of all blocks."""
    needs = _needs(ctx)
    grad_x, grad_scale = _zeros(x, *x.shape), _zeros(x)
    grad_bias = _zeros(x, *bias.shape) if needs[3] else None
    for columns, block in ctx.chunks.blocks(x, scale, bias, ids):
        dx, _, dscale, dbias = gradients(block, needs)
        if needs[0]:
            grad_x += dx
        if needs[2]:
            grad_scale += dscale
        if needs[3] and bias.dim():
            grad_bias[columns] = dbias
        elif needs[3]:
            grad_bias += dbias.sum()
    return _results(ctx, x, grad_x, grad_scale, grad_bias)


def _needs(ctx) -> list[bool]:
    """Of x, y, scale and bias, as the operators take them."""
    x, scale, bias = ctx.needs_input_grad[:3]
    return [x, False, scale, bias]


def _results(ctx, x: Tensor, *gradients: Tensor | None) -> Gradients:
    """Gradients of (x, scale, bias) as those of a Function's inputs."""
    dtypes = (x.dtype, *2 * (statistics_dtype(x),))
    given = zip(gradients, ctx.needs_input_grad[:3], dtypes, strict=True)
    return *(g.to(dtype) if need else None for g, need, dtype in given), None, None, None


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """A sum over chunks to begin with."""
    return like.new_zeros(shape, dtype=torch.float64)
