"""Statistics of the rows and columns: one sweep, the merge of its parts, and what underflowed."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from . import engine, folds, sweep
from .configs import Tile, bucket, processors
from .engine import COLUMNS, ROWS, SUM_EXPONENT, SUM_EXPONENT_WEIGHTED, Problem, cdiv
from .sweep import Outputs, Partial
from .tiles import Side

# What the sweeps are compiled for, with running maxima and without any.
SOFTMAX = {"PUSH": folds.softmax_push, "DONE": folds.softmax_done, "TOP": -math.inf}
SOFTPLUS = {"PUSH": folds.softplus_push, "DONE": folds.softplus_done, "TOP": 0.0}


def stats(
    problem: Problem, which: int, *, softplus: bool = False, mean: bool = False,
    threshold: Tensor | None = None, attend: bool = False,
) -> Outputs:  # fmt: skip
    """Statistics of every row (which = ROWS) or column, 2 N M D; with `attend` their gradient by
    the own vectors too, 4 N M D."""
    n = problem.size(which)
    out = Outputs(first=problem.empty(n), low=None if softplus else problem.empty(n))
    if mean:
        out = out._replace(second=problem.empty(n), second_low=problem.empty(n))
    if threshold is not None:
        threshold = threshold.contiguous()
        counts = {name: problem.empty(n) for name in ("rank", "total", "pairs")}
        out = out._replace(**counts)
    if attend:
        gradient = problem.empty(n, problem.dim, dtype=problem.inputs[which].dtype)
        out = out._replace(gradient=gradient, slope=problem.empty(n))
    if not attend:
        stats_of(problem, problem.side(which), problem.side(1 - which), softplus, threshold, out)
        return out
    for start, stop in problem.blocks(which):
        own = problem.part(problem.side(which), which, start, stop)
        here = Outputs(*(None if t is None else t[start:stop] for t in out))
        level = None if threshold is None else threshold[start:stop]
        stats_of(problem, own, problem.side(1 - which), softplus, level, here)
    return out


def stats_of(
    problem: Problem, own: Side, other: Side, softplus: bool, threshold: Tensor | None,
    out: Outputs,
) -> None:  # fmt: skip
    """The sweep, the merge of its parts, and the same again for rows that underflowed."""
    attend = out.gradient is not None
    chosen = problem.tile("attend" if attend else "stats")
    float16_scale = problem.float16_scale(1.0, other) if attend else None
    fixed = problem.bounded and not softplus and float16_scale is None
    fixed = fixed and own.size * other.size >= engine.FIXED_PAIRS
    parts, each = problem.parts(own.size, other.size, chosen, attend)
    partial = Partial()
    if parts > 1 or attend:
        partial = Partial(
            problem.empty(parts, 6, own.size),
            problem.empty(parts, own.size, problem.dim) if attend else None,
        )
    fold = SOFTPLUS if softplus else SOFTMAX
    fold = fold | {"SUM_EXPONENT": SUM_EXPONENT_WEIGHTED if attend else SUM_EXPONENT}
    shifted = fold | {"PUSH": folds.shifted_push} if fixed else fold
    arguments = (problem, own, other, float16_scale, threshold, out, partial, chosen)
    sweep_and_merge(*arguments, parts, each, shifted, fixed=fixed, repair=False)
    if fixed:
        each = cdiv(other.size, chosen.block_n)
        if partial.weighted is None:
            partial = Partial()
        arguments = (problem, own, other, float16_scale, threshold, out, partial, chosen)
        sweep_and_merge(*arguments, 1, each, fold, fixed=False, repair=True)


def sweep_and_merge(
    problem: Problem, own: Side, other: Side, float16_scale: Tensor | None,
    threshold: Tensor | None, out: Outputs, partial: Partial, chosen: Tile, parts: int, each: int,
    fold: dict[str, Any], *, fixed: bool, repair: bool,
) -> None:  # fmt: skip
    engine.launch(
        sweep.stats_kernel, (cdiv(own.size, chosen.block_m), parts), own, other,
        problem.scale, problem.largest_bias if fixed else None, float16_scale, threshold,
        out._replace(gradient=None, slope=None), partial, each, FIXED=fixed,
        REPAIR=repair, **fold, **problem.constants(chosen),
    )  # fmt: skip
    if partial.state is not None:
        merge(
            problem, own, other.size, float16_scale, out, partial, parts, fold["DONE"],
            fold["SUM_EXPONENT"], fixed=fixed, repair=repair, width=6,
        )  # fmt: skip


def merge(
    problem: Problem, own: Side, terms: int, float16_scale: Tensor | None, out: Outputs,
    partial: Partial, parts: int, done: Any, sum_exponent: float, *, fixed: bool, repair: bool,
    width: int,
) -> None:  # fmt: skip
    """Merges parts of sums over `terms` logits."""
    width_k = bucket(problem.dim) if out.gradient is not None else 1
    block = max(1, min(128, 2048 // width_k))
    engine.launch(
        sweep.merge_kernel, (cdiv(own.size, block),), own, terms, problem.scale,
        problem.largest_bias if fixed else None, float16_scale, out, partial, parts,
        DIM=problem.dim, DONE=done, FIXED=fixed, SUM_EXPONENT=sum_exponent, WIDTH=width,
        REPAIR=repair, BLOCK_M=block, BLOCK_K=width_k,
    )  # fmt: skip


def two_way(problem: Problem) -> tuple[Outputs, Outputs]:
    """lse of rows and of columns of unit vectors in one sweep, 2 N M D; N^2 D for x with itself."""
    chosen = problem.tile("two_way")
    own, other = problem.side(COLUMNS), problem.side(ROWS)
    other_tiles = cdiv(other.size, chosen.block_m)
    own_tiles = cdiv(own.size, chosen.block_n)
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
    engine.launch(
        sweep.two_way_kernel, grid, own, other, problem.scale, own_sums, other_sums, own_each,
        other_each, terms, HALF=problem.symmetric, SUM_EXPONENT=SUM_EXPONENT,
        **problem.constants(chosen),
    )  # fmt: skip
    if problem.symmetric:
        lse = two_way_lse(problem, ROWS, sums, terms)
        return lse, lse
    rows_lse = two_way_lse(problem, ROWS, other_sums, terms)
    return rows_lse, two_way_lse(problem, COLUMNS, own_sums, terms)


def two_way_lse(problem: Problem, which: int, sums: Tensor, terms: int) -> Outputs:
    """lse from the sums of `two_way_kernel`, (parts, size); rows that underflowed swept again."""
    chosen = problem.tile("stats")
    own, other = problem.side(which), problem.side(1 - which)
    out = Outputs(problem.empty(own.size), low=problem.empty(own.size))
    merge(
        problem, own, terms, None, out, Partial(sums), sums.shape[0], folds.softmax_done,
        SUM_EXPONENT, fixed=True, repair=False, width=1,
    )  # fmt: skip
    sweep_and_merge(
        problem, own, other, None, None, out, Partial(), chosen, 1,
        cdiv(other.size, chosen.block_n), SOFTMAX | {"SUM_EXPONENT": SUM_EXPONENT}, fixed=False,
        repair=True,
    )  # fmt: skip
    return out
