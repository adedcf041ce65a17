"""What a loss at nested prefixes should take on an H200, by the counting of predict.py: one sweep
at all prefixes, and a call for each.

Needs no GPU: python -m benchmarks.gpu.predict_nested, or with --check.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from contrastive_kernels.ops import can_nest
from contrastive_kernels.triton import nested
from contrastive_kernels.triton.compile import L2, Compiled, compiling
from contrastive_kernels.triton.machine_code import Count, loops

from ..harness.markdown import table
from . import predict, resources
from .model import H200, arithmetic_cycles
from .predict import ARCHITECTURE, ITEMSIZE, LOGIT, RATE, ROWS, Inputs, Workload

NAME = "predict-nested"
# Rows and as many keys, features, ends of prefixes: of usual models, and of a large one.
SHORT, LONG = [64, 128, 256, 512, 768], [128, 256, 512, 1024, 2048]
CASES = ((2048, SHORT), (32768, SHORT), (32768, LONG))
HEAD = (
    "case", "a call for each prefix", "all at once", "library products", "their logits forward",
    "backward", "all features alone", "what runs",
)  # fmt: skip


class Parts(NamedTuple):
    """Milliseconds of a step at all prefixes: a library's products, what folds their logits, and
    what makes coefficients of them."""

    products: float
    forward: float
    backward: float


def mnrl(at: Inputs) -> None:
    at.forward(at.y)
    at.backward(at.y, "xy", columns=False)


def alone(n: int, dim: int) -> float:
    """Milliseconds of one loss."""
    case = Workload("info_nce", n, n, dim, 0.0, ROWS, predict.info_nce)
    if dim > 256:
        sweeps = {"stats": 1.0, "coefficient": 1.0}
        case = case._replace(sweeps=sweeps, run=mnrl, library=2)
    found = predict.predictions(case, False).values()
    return sum(one.milliseconds for one in found) + predict.beside(case)


def sweeps(n: int, ends: list[int]) -> None:
    """What a loss of rows launches, forward and backward."""
    at, count = Inputs(n, n, ends[-1]), len(ends)
    stats = at.empty(count, n)
    pairs: tuple[Any, ...] = (at.x, at.y, at.scale, None, at.ids, at.ids, None, None)
    nested.nested_stats(*pairs, ends, False, True, False, False, True)
    nested.nested_stats_backward(
        *pairs, stats, at.none, stats, at.none, stats, None, stats, ends, False, True,
        [True, True, False, False], False,
    )  # fmt: skip


def issued(kernel: str, ends: list[int]) -> float:
    """Cycles of a multiprocessor for each pair."""
    seen: list[tuple[Compiled, Count]] = []

    def look(made: Compiled, found: Any) -> None:
        inner, outer = loops(found.asm["cubin"])
        seen.append((made, inner if inner.all else outer))

    with compiling(ARCHITECTURE, kernel, look, l2=L2) as made:
        sweeps(4096, ends)
    if made[0].error:
        raise RuntimeError(f"{kernel}: {made[0].error}")
    one, count = seen[0]
    block_m, block_n, _, warps, _ = one.tile or (0, 0, 0, 0, 0)
    plain, special = 32 * warps * (count.all - count.special), 32 * warps * count.special
    return arithmetic_cycles(H200, plain, special) / (block_m * block_n)


def at_once(n: int, ends: list[int]) -> Parts:
    """Beside its arithmetic each kernel waits for what it reads and writes: forward from L2, where
    a piece stays, backward from memory."""
    pairs, count = n * n, len(ends)
    widths = [b - a for a, b in pairwise([0, *ends])]

    def arithmetic(kernel: str) -> float:
        return pairs * issued(kernel, ends) / (H200.processors * H200.clock)

    def products(rate: float, first: int, others: int) -> float:
        moved = [first] + [others] * (count - 1)
        return sum(
            max(2 * pairs * width / RATE, pairs * size / rate)
            for width, size in zip(widths, moved, strict=True)
        )

    logits = products(H200.l2, LOGIT, 2 * LOGIT) + products(H200.memory, LOGIT, 2 * LOGIT)
    gradients = 2 * products(H200.memory, ITEMSIZE, ITEMSIZE)
    folded = count * max(arithmetic("stats_kernel"), pairs * LOGIT / H200.l2)
    moved = count * pairs * (LOGIT + ITEMSIZE) / H200.memory
    made = max(arithmetic("nested_coefficient_kernel"), moved)
    return Parts(*(1e3 * seconds for seconds in (logits + gradients, folded, made)))


def row(n: int, ends: list[int]) -> list[str]:
    each = [alone(n, end) for end in ends]
    parts = at_once(n, ends)
    x = torch.empty((), dtype=torch.bfloat16).expand(n, ends[-1])
    numbers = [sum(each), sum(parts), *parts, each[-1]]
    runs = "all at once" if can_nest("triton", x) else "a call for each"
    title = f"{' + '.join(map(str, ends))} features, N={n:,}"
    return [title, *(f"{number:.3g} ms" for number in numbers), runs]


def lines() -> list[str]:
    return table(HEAD, [row(n, ends) for n, ends in CASES])


if __name__ == "__main__":
    sys.exit(resources.main(NAME, lines, command="predict_nested"))
