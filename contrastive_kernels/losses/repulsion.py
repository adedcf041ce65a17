"""The repulsion of CACR, by the products of sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..distributed import Batch, Shards
from ..ops import Asked, Part, operands, sweeps
from ..sources import NegativeSource
from ..types import IdPair, Sweep, known, statistics_dtype
from .algebra import add_up, log_count, unit
from .distances import from_products, shortfall, times, total_bias
from .stats import tie_limit

# With L(t) = log sum_j exp(-t d_ij) the "rbf" cost of a row is L(t_neg + rbf_t) - L(t_neg), of two
# numbers as large as t. From t_neg = SHARP rbf_t on float32 keeps more digits by the integral of
# L', which is minus the weighted mean of d, and for Gauss's three nodes as good as a polynomial.
SHARP = 12
NODES = ((0.5 - math.sqrt(0.15), 5 / 18), (0.5, 4 / 9), (0.5 + math.sqrt(0.15), 5 / 18))


class Options(NamedTuple):
    """How a repulsion is computed."""

    t_neg: float
    cost: str
    rbf_t: float
    detach: bool
    normalize: bool
    backend: str


def plain(given: Tensor | Part) -> Tensor:
    return given.features if isinstance(given, Part) else given


def repulsion(
    query: Tensor | Part,
    keys: Tensor | Part | NegativeSource,
    ids: IdPair | None,
    options: Options,
    limit: Tensor | None,
    batch: Batch,
    key_batch: Batch | None,
) -> tuple[list[Asked], Callable[[list[Sweep]], tuple[Tensor, Sweep]]]:
    """(sweeps, what makes of their results the repulsion, (N,) or 0-d for "rbf", and the sweep
    that counts above `limit` if given).

    With logits z = t (2 <q, k> + bias), d = shift - z / t.
    """
    t_neg, normalize = options.t_neg, options.normalize
    shift, bias, query, keys = from_products(
        query, keys, normalize, options.backend, shared=isinstance(key_batch, Shards)
    )
    integral = t_neg >= SHARP * options.rbf_t and statistics_dtype(plain(query)) == torch.float32

    def at(t: float, **asked: Any) -> Asked:
        pairs = operands(
            query, keys, scale=2 * t, bias=times(t, bias), exclude=ids, normalize=normalize,
            backend=options.backend, batch=key_batch,
        )  # fmt: skip
        return Asked(pairs, **asked)

    def counted(out: Sweep) -> Sweep:
        """The counts of 2 t_neg <q, k> alone, where they are used for its mean."""
        if out.counts is None or bias is None or not normalize:
            return out
        every, dropped = total_bias(bias, cast(Tensor, keys), ids)
        every, dropped = (t.to(out.counts.total.device) for t in (every, dropped))
        every = every if key_batch is None else key_batch.total_of(every)
        total = out.counts.total - t_neg * (every - dropped)
        counts = out.counts._replace(total=total)
        return out._replace(counts=counts)

    if options.cost == "euclidean":

        def mean(found: list[Sweep]) -> tuple[Tensor, Sweep]:
            out = found[0]
            value = known(out.mean)
            value = with_gradient(value, out.lse) if options.detach else value
            return value / t_neg - shift, counted(out)

        return [at(t_neg, mean=True, threshold=limit)], mean

    t = t_neg + options.rbf_t
    near = [at(t)] if options.detach or not integral else []
    far = [at(t_neg, threshold=limit)]
    nodes = [t_neg + node * options.rbf_t for node, _ in NODES]

    def log_mean(found: list[Sweep]) -> tuple[Tensor, Sweep]:
        # log sum_j exp(-(t_neg + rbf_t) d_ij)
        of_near = found[0].lse - t * shift if near else None
        if integral:
            log_cost = add_up(
                (weight * options.rbf_t) * (known(each.mean) / s - shift)
                for s, (_, weight), each in zip(nodes, NODES, found[len(near) :], strict=True)
            )
            with torch.no_grad():
                out = sweeps(far)[0] if limit is not None else Sweep(log_cost)
        else:
            out = found[-1]
            log_cost = known(of_near) - (out.lse - t_neg * shift)
        if options.detach:
            log_cost = with_gradient(log_cost, (options.rbf_t / t) * known(of_near))
        value = batch.logsumexp(log_cost) - log_count(batch.total, log_cost.dtype)
        return value, counted(out)

    return [*near, *([at(s, mean=True) for s in nodes] if integral else far)], log_mean


def tie_limit_of(query: Tensor, positive: Tensor, distance: Tensor, options: Options) -> Tensor:
    """`tie_limit` of the logits of `repulsion`, for positives (N, D) at a distance (N,)."""
    t, normalize, backend = options.t_neg, options.normalize, options.backend
    if normalize:
        short = shortfall(query)
        shift = 2.0 if short is None else 2.0 - short
        return tie_limit(t * (shift - distance), query, positive, 2 * t, normalize, backend)
    of_query, of_positive = (unit(x, False).square().sum(-1) for x in (query, positive))
    size = t * (of_query.sqrt() + of_positive.sqrt()).square()
    logit = t * (of_query - distance)
    return tie_limit(logit, query, positive, 2 * t, normalize, backend, size.detach())


def with_gradient(value: Tensor, source: Tensor) -> Tensor:
    """`value` with the gradient of `source`: that of a weighted mean with constant weights."""
    return value.detach() + (source - source.detach())
