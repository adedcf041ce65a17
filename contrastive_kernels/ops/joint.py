"""Several sweeps over the same features as one node of the graph.

Autograd would hold the gradient that each of them has for the features, and then add them. Here
every sweep of the backward pass adds its own to those of the ones before, in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..autograd import once_differentiable
from ..distributed.shards import Shards
from ..types import Counts, Sweep, known
from . import pairs
from .pairs import Gradients, Needs, Pairs, Part
from .primitives import attends, sweep
from .rowwise import can_tie

_STATISTICS = ("lse", "mean", "col_lse", "col_mean", "partner")  # that have a derivative
_LEFT = ("attended", "slope", "lse_low", "col_lse_low", "mean_low", "col_mean_low")


class Asked(NamedTuple):
    """A sweep, as `primitives.sweep` takes it."""

    pairs: Pairs
    mean: bool = False
    columns: bool = False
    threshold: Tensor | None = None

    def made(self) -> Sweep:
        return sweep(self.pairs, mean=self.mean, columns=self.columns, threshold=self.threshold)


def sweeps(asked: Sequence[Asked]) -> list[Sweep]:
    """The results of `primitives.sweep` for each."""
    joined = [one for one in asked if _joins(one.pairs)]
    if len(joined) < 2 and not any(part for one in joined for _, part in _sides(one.pairs)):
        return [one.made() for one in asked]
    features: dict[int, Tensor] = {}
    jobs, operands = [], []
    for one in joined:
        given = one.pairs
        places = [_place(features, t, p) for t, p in _sides(given)]
        attend = attends(given, one.mean, one.columns)
        jobs.append(Job(one, places, attend))
        operands += [given.scale, given.bias]
    flat = iter(_Sweeps.apply(jobs, len(features), *features.values(), *operands))
    found = {}
    for job in jobs:
        made = [next(flat) for _ in range(len(_STATISTICS) + len(Counts._fields))]
        counts = None if job.asked.threshold is None else Counts(*made[len(_STATISTICS) :])
        statistics = dict(zip(_STATISTICS, made, strict=False))
        found[id(job.asked)] = Sweep(**statistics, counts=counts)
    return [found[id(one)] if id(one) in found else one.made() for one in asked]


class Job(NamedTuple):
    """A sweep of the node. places: of x and y among its features; None: y is x."""

    asked: Asked
    places: list[int | None]
    attend: bool


def _joins(given: Pairs) -> bool:
    if given.ends is not None:
        return False
    if isinstance(given.batch, Shards) or not (given.y is None or isinstance(given.y, Tensor)):
        return False
    learned = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (given.x, given.y)
    )
    seen = pairs.operand_dtype(given.backend, given.x.dtype, given.x.device)
    # else the gradient of a part has zeros for the rest
    smallest = None if given.x_part is given.y_part is None else 0
    return learned and seen == given.x.dtype and can_tie(given.backend, given.x, smallest)


def _sides(given: Pairs) -> list[tuple[Tensor | None, Part | None]]:
    return [(given.x, given.x_part), (given.tensor, given.y_part)]


def _place(features: dict[int, Tensor], t: Tensor | None, part: Part | None) -> int | None:
    if t is None:
        return None
    whole = t if part is None else part.of
    features.setdefault(id(whole), whole)
    return list(features).index(id(whole))


class _Sweeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, jobs: list[Job], count: int, *tensors: Tensor | None) -> Any:
        results: list[Tensor | None] = []
        kept: list[Tensor | None] = []
        for job in jobs:
            one = job.asked
            # a Function turns the mode off; kernels ask it whether a backward may follow
            with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
                out = pairs.softmax(
                    one.pairs, mean=one.mean, columns=one.columns, threshold=one.threshold,
                    attend=job.attend,
                )  # fmt: skip
            statistics = [getattr(out, name) for name in _STATISTICS]
            counts = list(out.counts or len(Counts._fields) * (None,))
            ctx.mark_non_differentiable(*(t for t in counts if t is not None))
            results += [*statistics, *counts]
            ids = [*(one.pairs.exclude or (None, None)), *(one.pairs.keep or (None, None))]
            kept += [*ids, *statistics[:-1], *(getattr(out, name) for name in _LEFT)]
        ctx.jobs = [_without_tensors(job) for job in jobs]
        ctx.count = count
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count, jobs = ctx.count, ctx.jobs
        saved = iter(ctx.saved_tensors)
        features = [known(next(saved)) for _ in range(count)]
        operands = [(next(saved), next(saved)) for _ in jobs]
        totals = Totals(features, ctx.needs_input_grad[2 : 2 + count])
        needs = iter(ctx.needs_input_grad[2 + count :])
        others: list[Tensor | None] = []
        step = len(_STATISTICS) + len(Counts._fields)
        for i, (job, (scale, bias)) in enumerate(zip(jobs, operands, strict=True)):
            exclude, keep = ((next(saved), next(saved)) for _ in range(2))
            left: dict[str, Any] = {name: next(saved) for name in (*_STATISTICS[:-1], *_LEFT)}
            stats = Sweep(**left)
            above: dict[str, Any] = dict(zip(_STATISTICS, grads[i * step :], strict=False))
            of_scale, of_bias = next(needs), next(needs)
            if all(t is None for t in above.values()):
                others += [None, None]
                continue
            given = job.asked.pairs._replace(
                scale=scale, bias=bias, exclude=None if exclude[0] is None else exclude,
                keep=None if keep[0] is None else keep,
            )  # fmt: skip
            made = totals.add(job, given, stats, Sweep(**above), of_scale, of_bias)
            others += [made.scale if of_scale else None, made.bias if of_bias else None]
        return None, None, *totals.gradients(), *others


class Totals:
    """The gradients of features, from sweep to sweep."""

    def __init__(self, features: list[Tensor], needs: Sequence[bool]) -> None:
        self.features, self.needs = features, needs
        self.found: dict[int, Tensor] = {}
        self.halves: Tensor | None = None  # of two tensors that are one matrix

    def add(
        self, job: Job, given: Pairs, stats: Sweep, grads: Sweep, scale: bool, bias: bool
    ) -> Gradients:
        """Those of a sweep; returns those of its other operands."""
        places, parts = job.places, (given.x_part, given.y_part)
        x, y = (
            None if place is None else _of(self.features[place], part)
            for place, part in zip(places, parts, strict=True)
        )
        x_needed, y_needed = (place is not None and self.needs[place] for place in places)
        given = given._replace(x=known(x), y=y)
        if job.attend and not (y_needed or bias):
            # all that the kernel needs of the keys is in `attended`; they may change
            given = Pairs(given.x, None, given.scale, normalize=given.normalize,
                          backend=given.backend)  # fmt: skip
        needs = Needs(x=x_needed, y=y_needed, scale=scale, bias=bias)
        if any(t is not None and not torch._C._has_storage(t) for t in _above(grads)):
            made = pairs.softmax_backward(given, stats, grads, needs)
            for place, part, needed, gradient in zip(
                places, parts, needs[:2], (made.x, made.y), strict=True
            ):
                if needed:
                    self._add_batch(known(place), part, known(gradient))
            return made
        if given.together:
            into: list[Tensor | None] = [self.halves, None]
        else:
            into = [
                self._there(place, part, places) if needed else None
                for place, part, needed in zip(places, parts, needs[:2], strict=True)
            ]
        made = pairs.softmax_backward(given, stats, grads, needs, (into[0], into[1]))
        if given.together:
            if self.halves is None:
                self.halves = known(made.x)._base
            self.found |= {known(places[0]): known(made.x), known(places[1]): known(made.y)}
        else:
            for place, needed, there, gradient in zip(
                places, needs[:2], into, (made.x, made.y), strict=True
            ):
                if needed and there is None:
                    self.found[known(place)] = known(gradient)
        return made

    def _there(
        self, place: int | None, part: Part | None, places: list[int | None]
    ) -> Tensor | None:
        """Where to add; None: this sweep makes the first gradient, of all rows."""
        place = known(place)
        if place not in self.found:
            if part is None and places[0] != places[1]:
                return None
            self.found[place] = torch.zeros_like(
                self.features[place], memory_format=torch.contiguous_format
            )
        return _of(self.found[place], part)

    def _add_batch(self, place: int, part: Part | None, gradient: Tensor) -> None:
        """Of several gradients from above at once: nothing is added in place."""
        if part is not None:
            rest = torch.zeros_like(self.features[place])
            rows = (
                part.where if isinstance(part.where, slice) else slice(part.where, part.where + 1)
            )
            start, stop, _ = rows.indices(len(rest))
            gradient = gradient.view(stop - start, *rest.shape[1:])
            gradient = torch.cat((rest[:start], gradient, rest[stop:]))
        before = self.found.get(place)
        self.found[place] = gradient if before is None else before + gradient

    def gradients(self) -> list[Tensor | None]:
        return [self.found.get(i) for i in range(len(self.features))]


def _above(grads: Sweep) -> Iterator[Tensor | None]:
    return (getattr(grads, name) for name in _STATISTICS)


def _of(whole: Tensor, part: Part | None) -> Tensor:
    return whole if part is None else whole[part.where]


def _without_tensors(job: Job) -> Job:
    """What is not kept by autograd."""
    given = job.asked.pairs
    empty = cast(Tensor, None)
    x_part, y_part = (
        None if part is None else Part(empty, part.where) for part in (given.x_part, given.y_part)
    )
    given = given._replace(
        x=empty, y=None, scale=empty, bias=None, exclude=None, keep=None, batch=None,
        x_part=x_part, y_part=y_part,
    )  # fmt: skip
    return job._replace(asked=job.asked._replace(pairs=given, threshold=None))
