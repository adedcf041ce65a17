"""The engine for Hopper: which sweeps it takes, and how they are started.

`engines` says on which GPUs. What it does not take, and rows that have to be swept again with a
running maximum, are the other engine's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton.language as tl
from torch import Tensor

from .. import engines
from ..types import known
from . import configs, engine
from .configs import Tile
from .sweep import Partial
from .tiles import Side

if TYPE_CHECKING:
    from .engine import Problem

ARCHITECTURE = 90
# By the number of features. Two warpgroups of 64 own vectors; `warps` are those of the first.
TILES = {
    64: Tile(128, 128, 64, 4, 4),
    128: Tile(128, 128, 128, 4, 4),
    256: Tile(128, 64, 256, 4, 4),
}


def tile(problem: Problem, own: Side, other: Side) -> Tile | None:
    """The tile of a sweep with weighted sums; None where the other engine has to run it."""
    if configs.properties(problem.device).architecture != ARCHITECTURE:
        return None
    if engines.without_hopper(problem.device) is not None:
        return None
    if problem.arithmetic.kind != "half" or not (aligned(own.features) and aligned(other.features)):
        return None
    beside = (own.exclude, own.keep, own.bias, other.bias)
    if sum(one is not None for one in beside) > 1:  # more than registers hold
        return None
    if own.mean is not None or other.mean is not None:
        return None
    return TILES.get(problem.dim)


def aligned(features: Tensor) -> bool:
    """Whether TMA can read it."""
    step = 16 // features.element_size()
    inner = features.stride(1) == 1 and features.stride(0) % step == 0
    return inner and features.data_ptr() % 16 == 0


def attend(
    problem: Problem, own: Side, other: Side, float16_scale: Tensor | None, partial: Partial,
    chosen: Tile, parts: int, each: int, fold: dict[str, Any], fixed: bool,
) -> None:  # fmt: skip
    """Starts the sweep whose parts `merge` puts together."""
    from .hopper_sweep import attend_kernel

    other = in_range(problem, other)
    engine.launch(
        attend_kernel, (engine.cdiv(own.size, chosen.block_m), parts),
        *vectors(problem, own, other, chosen), numbers(other.inverse, chosen), own, other,
        problem.scale, problem.largest_bias if fixed else None, float16_scale, partial, each,
        PUSH=fold["PUSH"], TOP=fold["TOP"], FIXED=fixed, SUM_EXPONENT=fold["SUM_EXPONENT"],
        DIM=problem.dim, BLOCK_N=chosen.block_n, STAGES=chosen.stages, tile=chosen,
    )  # fmt: skip


def gradient(
    problem: Problem, own: Side, other: Side, float16_scale: Tensor | None, partial: Partial,
    chosen: Tile, parts: int, each: int, coefficient: Any,
) -> None:  # fmt: skip
    """Starts the sweep of a block of one side's vectors whose parts `finish` adds up."""
    from .hopper_sweep import gradient_sweep_kernel

    other = in_range(problem, other)
    weighed = own.grad_lse is None and partial.state is None
    if weighed:  # the factors of weights once for each vector, where no sum is without them
        other = other._replace(grad_lse=weighed_gradients(other, float16_scale))
    engine.launch(
        gradient_sweep_kernel, (engine.cdiv(own.size, chosen.block_m), parts),
        *vectors(problem, own, other, chosen), numbers(other.inverse, chosen),
        numbers(other.lse, chosen), numbers(other.grad_lse, chosen), own, other, problem.scale,
        float16_scale, partial, each, COEFFICIENT=coefficient, WEIGHED=weighed,
        DIM=problem.dim, BLOCK_N=chosen.block_n, STAGES=chosen.stages, tile=chosen,
    )  # fmt: skip


def in_range(problem: Problem, side: Side) -> Side:
    """With 1 / norm that weights can be multiplied by as well as logits."""
    if side.inverse is None:
        return side
    return side._replace(inverse=problem.in_range(side.inverse))


def weighed_gradients(side: Side, float16_scale: Tensor | None) -> Tensor:
    """As `gradient.weigh` does it with dL/dz."""
    grad = known(side.grad_lse)
    if side.inverse is not None:
        grad = grad * side.inverse
    return grad if float16_scale is None else grad * float16_scale


# Gluon comes with Triton, but it is only imported where it is wanted.


def vectors(problem: Problem, own: Side, other: Side, chosen: Tile) -> tuple[Any, Any]:
    """The features of both sides, as TMA reads them."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper_sweep import GROUPS

    operand = gl.bfloat16 if problem.arithmetic.operand == tl.bfloat16 else gl.float16

    def tiles(side: Side, rows: int) -> Any:
        block = [rows, problem.dim]
        layout = gl.NVMMASharedLayout.get_default_for(block, operand)
        return TensorDescriptor.from_tensor(side.features, block, layout)

    return tiles(own, chosen.block_m // GROUPS.value), tiles(other, chosen.block_n)


def numbers(packed: Tensor | None, chosen: Tile) -> Any:
    """What is packed for the vectors of the other side."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    if packed is None:
        return None
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor.from_tensor(packed, [chosen.block_n], layout)
