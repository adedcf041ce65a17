"""Statistics of the rows and columns: one sweep, the merge of its parts, and what underflowed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from . import engine, folds, hopper, stored, sweep
from .configs import Tile, bucket, processors
from .engine import COLUMNS, ROWS, SUM_EXPONENT, SUM_EXPONENT_WEIGHTED, Problem, cdiv
from .sweep import Outputs, Partial
from .tiles import Side

# What the sweeps are compiled for, with running maxima and without any.
SOFTMAX = {"PUSH": folds.softmax_push, "DONE": folds.softmax_done, "TOP": -math.inf}
SOFTPLUS = {"PUSH": folds.softplus_push, "DONE": folds.softplus_done, "TOP": 0.0}


class Work(NamedTuple):
    """What a sweep has to do for one side: own vectors, the others in `parts` of `each` tiles, and
    where results go."""

    own: Side
    other: Side
    out: Outputs
    partial: Partial
    parts: int
    each: int


def outputs(
    problem: Problem, which: int, mean: bool, threshold: Tensor | None = None, low: bool = True
) -> Outputs:
    """Those of one side, to be written."""
    n = problem.size(which)
    out = Outputs(first=problem.empty(n), low=problem.empty(n) if low else None)
    if mean:
        out = out._replace(second=problem.empty(n), second_low=problem.empty(n))
    if threshold is not None:
        counts = {name: problem.empty(n) for name in ("rank", "total", "pairs")}
        out = out._replace(**counts)
    return out


def stats(
    problem: Problem, which: int, *, softplus: bool = False, mean: bool = False,
    threshold: Tensor | None = None, attend: bool = False,
) -> Outputs:  # fmt: skip
    """Statistics of every row (which = ROWS) or column, 2 N M D; with `attend` their gradient by
    the own vectors too, 4 N M D."""
    n = problem.size(which)
    threshold = None if threshold is None else threshold.contiguous()
    out = outputs(problem, which, mean, threshold, low=not softplus)
    if not attend:
        stats_of(problem, problem.side(which), problem.side(1 - which), softplus, threshold, out)
        return out
    gradient = problem.empty(n, problem.length, dtype=problem.inputs[which].dtype)
    out = out._replace(gradient=gradient, slope=problem.empty(n))
    for start, stop in problem.blocks(which):
        own = problem.part(problem.side(which), which, start, stop)
        here = Outputs(*(None if t is None else t[start:stop] for t in out))
        level = None if threshold is None else threshold[start:stop]
        stats_of(problem, own, problem.side(1 - which), softplus, level, here)
    return out


def stats_both(problem: Problem, mean: bool, threshold: Tensor | None) -> tuple[Outputs, Outputs]:
    """Statistics of rows and of columns, 4 N M D, by as few launches as those of rows."""
    chosen = problem.tile("stats")
    threshold = None if threshold is None else threshold.contiguous()
    found = []
    for which in (ROWS, COLUMNS):
        own, other = problem.side(which), problem.side(1 - which)
        parts, each = problem.parts(own.size, other.size, chosen, False)
        out = outputs(problem, which, mean, threshold if which == ROWS else None)
        found.append(Work(own, other, out, Partial(), parts, each))
    if any(work.parts > 1 for work in found):
        found = [
            work._replace(partial=Partial(problem.empty(work.parts, 6, work.own.size)))
            for work in found
        ]
    fold = SOFTMAX | {"SUM_EXPONENT": SUM_EXPONENT}
    sweep_and_merge(problem, found, None, threshold, chosen, fold, fixed=False, repair=False)
    return found[ROWS].out, found[COLUMNS].out


def stats_of(
    problem: Problem, own: Side, other: Side, softplus: bool, threshold: Tensor | None,
    out: Outputs,
) -> None:  # fmt: skip
    """The sweep, the merge of its parts, and the same again for rows that underflowed."""
    attend = out.gradient is not None
    chosen = problem.tile("attend" if attend else "stats")
    float16_scale = problem.float16_scale(1.0, other) if attend else None
    fixed = problem.bounded and not softplus and float16_scale is None
    fixed = fixed and own.size * other.size >= engine.FIXED_PAIRS and not problem.few
    weighs = attend and out.second is None and out.rank is None
    on_hopper = hopper.tile(problem, own, other) if weighs else None
    parts, each = problem.parts(own.size, other.size, on_hopper or chosen, attend)
    partial = Partial()
    if parts > 1 or attend:
        partial = Partial(
            problem.empty(parts, 6, own.size),
            problem.empty(parts, own.size, problem.dim) if attend else None,
        )
    fold = SOFTPLUS if softplus else SOFTMAX
    fold = fold | {"SUM_EXPONENT": SUM_EXPONENT_WEIGHTED if attend else SUM_EXPONENT}
    shifted = fold | {"PUSH": folds.shifted_push} if fixed else fold
    work = Work(own, other, out, partial, parts, each)
    given = (float16_scale, threshold, chosen)
    if on_hopper:
        hopper.attend(
            problem, own, other, float16_scale, partial, on_hopper, parts, each, shifted, fixed
        )
        merge_parts(problem, [work], float16_scale, shifted, fixed=fixed)
    else:
        sweep_and_merge(problem, [work], *given, shifted, fixed=fixed, repair=False)
    if fixed:
        each = cdiv(other.size, chosen.block_n)
        partial = Partial() if partial.weighted is None else partial
        again = work._replace(partial=partial, parts=1, each=each)
        sweep_and_merge(problem, [again], *given, fold, fixed=False, repair=True)


def sweep_and_merge(
    problem: Problem, works: list[Work], float16_scale: Tensor | None, threshold: Tensor | None,
    chosen: Tile, fold: dict[str, Any], *, fixed: bool, repair: bool,
) -> None:  # fmt: skip
    """Of one side, or of both."""
    own, other, out, partial, _, each = works[0]
    blocks = [cdiv(work.own.size, chosen.block_m) for work in works]
    programs = [count * work.parts for count, work in zip(blocks, works, strict=True)]
    grid = (sum(programs),) if len(works) > 1 else (blocks[0], works[0].parts)
    second = (works[1].out, works[1].partial, works[1].each) if len(works) > 1 else (None, None, 0)
    engine.launch(
        sweep.stats_kernel, grid, own, other, problem.scale,
        problem.largest_bias if fixed else None, float16_scale, threshold,
        out._replace(gradient=None, slope=None), partial, each, programs[0], *second,
        BOTH=len(works) > 1, FIXED=fixed, REPAIR=repair, CONTINUED=False, **fold,
        **problem.constants(chosen),
    )  # fmt: skip
    if partial.state is not None:
        merge_parts(problem, works, float16_scale, fold, fixed=fixed, repair=repair)


def merge_parts(
    problem: Problem, works: list[Work], float16_scale: Tensor | None, fold: dict[str, Any], *,
    fixed: bool, repair: bool = False,
) -> None:  # fmt: skip
    """`merge` of what sweeps of `stats_kernel`'s kind have left."""
    merge(
        problem, works, [work.other.size for work in works], float16_scale, fold["DONE"],
        fold["SUM_EXPONENT"], fixed=fixed, repair=repair, width=6,
    )  # fmt: skip


def merge(
    problem: Problem, works: list[Work], terms: list[int], float16_scale: Tensor | None, done: Any,
    sum_exponent: float, *, fixed: bool, repair: bool, width: int,
) -> None:  # fmt: skip
    """Merges parts of sums over so many `terms`, of one side, or of both."""
    own, other, out, partial, parts, _ = works[0]
    width_k = bucket(problem.dim) if out.gradient is not None else 1
    block = max(1, min(128, 2048 // width_k))
    programs = [cdiv(work.own.size, block) for work in works]
    second: tuple[Any, ...] = (None, None, 0, 0)
    if len(works) > 1:
        second = (works[1].out, works[1].partial, terms[1], works[1].parts)
    engine.launch(
        sweep.merge_kernel, (sum(programs),), own, other, problem.scale,
        problem.largest_bias if fixed else None, float16_scale, out, partial, terms[0], parts,
        programs[0], *second, BOTH=len(works) > 1, DIM=problem.dim, LENGTH=problem.length,
        DONE=done, FIXED=fixed, SUM_EXPONENT=sum_exponent, WIDTH=width, REPAIR=repair,
        BLOCK_M=block, BLOCK_K=width_k,
    )  # fmt: skip


def two_way(problem: Problem) -> tuple[Outputs, Outputs]:
    """lse of rows and of columns of unit vectors in one sweep, 2 N M D; N^2 D for x with itself."""
    own, other = problem.side(COLUMNS), problem.side(ROWS)
    piece = None if problem.symmetric else stored.shape(problem)
    chosen = problem.tile("two_way") if piece is None else stored.TILE
    buffer = None if piece is None else problem.empty(math.prod(piece))
    height, width = piece or (other.size, own.size)
    other_tiles = cdiv(min(height, other.size), chosen.block_m)
    own_tiles = cdiv(min(width, own.size), chosen.block_n)
    programs = engine.WAVES * processors(problem.device)
    if problem.symmetric:
        own_each = cdiv(own_tiles, min(own_tiles, math.isqrt(2 * programs)))
        other_each = own_each * chosen.block_n // chosen.block_m
        groups = cdiv(own_tiles, own_each)
        grid: tuple[int, ...] = (groups * (groups + 1) // 2,)
        sums = problem.zeros(2 * groups, own.size)
        own_sums, other_sums = sums[:groups], sums[groups:]
    else:
        own_each = cdiv(own_tiles, min(own_tiles, math.isqrt(programs)))
        own_groups = cdiv(own_tiles, own_each)
        other_each = cdiv(other_tiles, min(other_tiles, cdiv(programs, own_groups)))
        grid = (own_groups, cdiv(other_tiles, other_each))
        own_sums, other_sums = problem.zeros(grid[1], own.size), problem.zeros(grid[0], other.size)
    terms = max(own.size, other.size)
    whole = slice(0, other.size), slice(0, own.size)
    for rows, columns in stored.pieces(piece, *whole):
        here = problem.part(other, ROWS, rows.start, rows.stop)
        across = problem.part(own, COLUMNS, columns.start, columns.stop)
        if buffer is not None:
            here, across = stored.products(here, across, buffer)
        engine.launch(
            sweep.two_way_kernel, grid, across, here, problem.scale, own_sums[:, columns.start :],
            other_sums[:, rows.start :], own.size, other.size, own_each, other_each, terms,
            HALF=problem.symmetric, SUM_EXPONENT=SUM_EXPONENT,
            **problem.constants(chosen) | {"DIM": 0 if piece else problem.dim},
        )  # fmt: skip
    if problem.symmetric:
        (lse,) = two_way_lse(problem, [sums], terms)
        return lse, lse
    rows_lse, columns_lse = two_way_lse(problem, [other_sums, own_sums], terms)
    return rows_lse, columns_lse


def two_way_lse(problem: Problem, sums: list[Tensor], terms: int) -> list[Outputs]:
    """lse from the sums of `two_way_kernel`, (parts, size), of the rows, or of rows and columns;
    what underflowed is swept again."""
    chosen = problem.tile("stats")
    works = []
    for which, of_side in enumerate(sums):
        own, other = problem.side(which), problem.side(1 - which)
        out = outputs(problem, which, False)
        works.append(Work(own, other, out, Partial(of_side), of_side.shape[0], 0))
    merge(
        problem, works, [terms] * len(works), None, folds.softmax_done, SUM_EXPONENT, fixed=True,
        repair=False, width=1,
    )  # fmt: skip
    fold = SOFTMAX | {"SUM_EXPONENT": SUM_EXPONENT}
    for work in works:
        each = cdiv(work.other.size, chosen.block_n)
        again = work._replace(partial=Partial(), parts=1, each=each)
        sweep_and_merge(problem, [again], None, None, chosen, fold, fixed=False, repair=True)
    return [work.out for work in works]
