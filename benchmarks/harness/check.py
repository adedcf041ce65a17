"""Whether an implementation computes what the oracle says; none is timed before."""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from ..baselines.loading import Unavailable
from ..cases.case import Case
from ..cases.oracle import Tensors, Truth
from ..cases.step import Step

# Largest relative error of the value, and in the Frobenius norm of each gradient, or of a result
# that is a tensor.
Tolerance = tuple[float, float]

# For bfloat16 the oracle sees the same rounded inputs, and each entry of a gradient is rounded to
# 8 bits.
TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float64: (1e-12, 1e-10),
    torch.float32: (2e-6, 2e-5),
    torch.bfloat16: (1e-3, 2e-2),
    torch.float16: (1e-3, 5e-3),
}
# Most baselines round logits, probabilities and the loss itself to 8 bits: what it costs them.
# float16 has 11 bits, but not the small probabilities.
BASELINE_HALF: Tolerance = (2e-2, 1e-1)
# What a baseline on a CPU is let in with, where ours is held to TOLERANCE.
BASELINE_ON_CPU: dict[torch.dtype, Tolerance] = {
    torch.float64: (1e-5, 1e-3),
    torch.float32: (1e-5, 1e-3),
    torch.bfloat16: BASELINE_HALF,
    torch.float16: BASELINE_HALF,
}
# On a GPU float32 convolutions round their operands to 11 bits, unless told not to.
BASELINE_ON_GPU: dict[torch.dtype, Tolerance] = BASELINE_ON_CPU | {
    torch.float32: (1e-3, 3e-3),
}


def error(step: Callable[[], Tensor], truth: Truth, tolerance: Tolerance) -> str | None:
    """Why value or gradients of a step differ from the oracle, or None.

    `step` has a method gradients(), as Step.
    """
    value_limit, gradient_limit = tolerance
    returned, gradients = step(), step.gradients()
    if isinstance(truth.value, Tensor):
        return _difference("result", returned, truth.value, gradient_limit)
    value = returned.item()
    if truth.rows is not None:
        gradients = {name: gradients[name][truth.rows] for name in truth.gradients}
    if truth.rows is not None and math.isnan(truth.value):
        if not math.isfinite(value):
            return f"value {value!r}, expected a finite one"
    # written so that NaN fails
    elif not abs(value - truth.value) <= value_limit * max(1.0, abs(truth.value)):
        return f"value {value!r}, expected {truth.value!r}"
    if gradients.keys() != truth.gradients.keys():
        return f"gradients of {sorted(gradients)}, expected {sorted(truth.gradients)}"
    for name, expected in truth.gradients.items():
        wrong = _difference(f"gradient of {name}", gradients[name], expected, gradient_limit)
        if wrong:
            return wrong
    return None


def _difference(what: str, actual: Tensor, expected: Tensor, at_most: float) -> str | None:
    relative = ((actual.double() - expected).norm() / expected.norm()).item()
    return None if relative <= at_most else f"{what} off by {relative:.1e}, at most {at_most:.0e}"


def reason(step: Callable[[], Tensor], truth: Truth, tolerance: Tolerance) -> str | None:
    """Why a step cannot be timed, or None: it is wrong or it fails, in whatever way."""
    try:
        wrong = error(step, truth, tolerance)
    except torch.OutOfMemoryError as failure:
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(failure))
        return "out of memory" + (f": asked for {asked[1]}" if asked else "")
    except Exception as failure:
        return first_line(failure)
    return f"differs from float64: {wrong}" if wrong else None


def first_line(failure: Exception) -> str:
    """Type and first line of an exception: compilers add pages."""
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"


def checked_baselines(
    case: Case,
    tensors: Tensors,
    truth: Truth,
    tolerance: Tolerance,
    progress: Callable[[str], None],
    *,
    may_compile: bool = True,
) -> tuple[list[dict], dict[str, Step]]:
    """The records of all baselines of a case, and the steps of those that can be timed.

    Args:
        may_compile: False leaves out the baselines that compile for long.
    """
    records, steps = [], {}
    for baseline in case.baselines:
        progress(f"checking {baseline.name}")
        record = {"name": baseline.name, "at_most": baseline.at_most if case.bounded else None}
        records.append(record)
        if baseline.compiles and not may_compile:
            record["reason"] = "left out: no time to compile"
            continue
        try:
            loss = baseline.load()
        except Unavailable as unavailable:
            record["reason"] = str(unavailable)
            continue
        except Exception as failure:
            record["reason"] = first_line(failure)
            continue
        record["version"] = baseline.version()
        step = case.step(loss, tensors)
        why_not = reason(step, truth, tolerance)
        if why_not:
            record["reason"] = why_not
        else:
            steps[baseline.name] = step
    return records, steps
