"""What the registered operators take and give: their schemas, and results without numbers.

Arguments and results have the names of the schema. A result that was not asked for is an empty
tensor, since operators return a fixed number; or None of "cpu", where torch's dispatcher has no
part in the call.

`attend` asks the forward sweep for what the backward needs of the keys, so that it need not see
them again: attended (N, D), of "cpu" the weighted keys sum_j p_ij y_j, of "triton" the gradient
d lse_i / d x_i itself, and there slope (N,), d lse_i / d scale.

`together` makes the rows of x and then those of y one matrix with itself, of N + M rows with their
ids, as if they were concatenated. The backward's dx is then of all these rows, since results of an
operator may not share memory.

`aligned`: row i of x and of y belong together; the result `partner` is their logits, one for each
row, whether the pair is dropped or not.

lse_low, col_lse_low: what rounding took from lse and col_lse. It may be more than 1 where logits
are 1e7, and the backward, whose exp(z - lse) have to add up to 1, gets it back. mean_low,
col_mean_low: the same of the means, for the z - mean of the backward. That of `row_softplus`, low,
may stand for logits that are kept, and nothing is made of it.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor

from ..types import statistics_dtype

PAIRS = (
    "Tensor x, Tensor? y, Tensor scale, Tensor? bias, Tensor? exclude_rows, Tensor? exclude_cols, "
    "Tensor? keep_rows, Tensor? keep_cols"
)
GRADIENTS = "(Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)"
SCHEMAS = {
    "row_stats": (
        f"({PAIRS}, Tensor? threshold, bool mean, bool normalize, bool columns, bool attend, "
        "bool together, bool aligned) -> (Tensor lse, Tensor mean, Tensor col_lse, "
        "Tensor col_mean, Tensor rank, Tensor total, Tensor count, Tensor attended, Tensor slope, "
        "Tensor lse_low, Tensor col_lse_low, Tensor mean_low, Tensor col_mean_low, Tensor partner)"
    ),
    "row_stats_backward": (
        f"({PAIRS}, Tensor lse, Tensor? mean, Tensor? col_lse, Tensor? col_mean, "
        "Tensor? attended, Tensor? slope, Tensor lse_low, Tensor? col_lse_low, "
        "Tensor? grad_lse, Tensor? grad_mean, "
        "Tensor? grad_col_lse, Tensor? grad_col_mean, Tensor? grad_partner, bool normalize, "
        f"bool[4] needs, bool together) -> {GRADIENTS}"
    ),
    "row_softplus": (
        f"({PAIRS}, Tensor? threshold, bool normalize, bool[4] attend, bool aligned) -> "
        "(Tensor value, Tensor rank, Tensor total, Tensor count, "
        "Tensor dx, Tensor dy, Tensor dscale, Tensor dbias, Tensor partner, Tensor low)"
    ),
    "row_softplus_backward": (
        f"({PAIRS}, Tensor? low, Tensor grad, Tensor? grad_partner, bool normalize, "
        f"bool[4] needs) -> {GRADIENTS}"
    ),
    "row_dot": "(Tensor x, Tensor y, Tensor? ends, bool normalize) -> (Tensor dot)",
    "row_dot_backward": (
        "(Tensor x, Tensor y, Tensor? ends, Tensor grad, bool normalize, bool[2] needs) -> "
        "(Tensor dx, Tensor dy)"
    ),
}


def record(name: str, items: list) -> Any:
    """The arguments or results of a schema, by name."""
    return namedtuple(name, [item.name for item in items])


_parsed = {name: torch._C.parse_schema(name + schema) for name, schema in SCHEMAS.items()}
ARGUMENTS = {name: record(name, schema.arguments) for name, schema in _parsed.items()}
RESULTS = {name: record(name, schema.returns) for name, schema in _parsed.items()}


def empty_stats(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=statistics_dtype(x))


def empty_gradients(needs: list[bool], x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    inputs = (x, *(x if t is None else t for t in others))
    return tuple(
        t.new_empty(t.shape if need else (0,)) for need, t in zip(needs, inputs, strict=True)
    )


def fake_row_stats(backend: str, *inputs: Any) -> Any:
    given = ARGUMENTS["row_stats"](*inputs)
    x = given.x
    rows, keys = x.shape[0], (x if given.y is None else given.y).shape[-2]
    if given.together:
        rows = keys = rows + keys
    counts = empty_stats(x, rows * (given.threshold is not None))
    attended, slope = empty_stats(x, 0), empty_stats(x, 0)
    if given.attend and backend == "triton":
        attended = torch.empty_like(x, memory_format=torch.contiguous_format)
        slope = empty_stats(x, rows)
    elif given.attend:
        attended = empty_stats(x, rows, x.shape[1])
    return RESULTS["row_stats"](
        lse=empty_stats(x, rows),
        mean=empty_stats(x, rows * given.mean),
        col_lse=empty_stats(x, keys * given.columns),
        col_mean=empty_stats(x, keys * (given.columns and given.mean)),
        rank=counts,
        total=torch.empty_like(counts),
        count=torch.empty_like(counts),
        attended=attended,
        slope=slope,
        lse_low=empty_stats(x, rows),
        col_lse_low=empty_stats(x, keys * given.columns),
        mean_low=empty_stats(x, rows * given.mean),
        col_mean_low=empty_stats(x, keys * (given.columns and given.mean)),
        partner=empty_stats(x, min(rows, keys) * given.aligned),
    )


def fake_row_softplus(backend: str, *inputs: Any) -> Any:
    given = ARGUMENTS["row_softplus"](*inputs)
    x = given.x
    counts = (empty_stats(x, x.shape[0] * (given.threshold is not None)) for _ in range(3))
    value = empty_stats(x, 1 if any(given.attend) else x.shape[0])
    gradients = empty_gradients(given.attend, x, given.y, given.scale, given.bias)
    partner = empty_stats(x, min(x.shape[0], given.y.shape[0]) * given.aligned)
    low = empty_stats(x, x.shape[0] * (backend == "cpu"))
    return RESULTS["row_softplus"](value, *counts, *gradients, partner, low)


def fake_pairs_backward(name: str, *inputs: Any) -> tuple[Tensor, ...]:
    return pairs_gradients(ARGUMENTS[name](*inputs))


def pairs_gradients(given: Any) -> tuple[Tensor, ...]:
    """Those that a backward gives for its arguments, without numbers."""
    gradients = empty_gradients(given.needs, given.x, given.y, given.scale, given.bias)
    if not getattr(given, "together", False):
        return gradients
    rows = (given.x.shape[0] + given.y.shape[0]) * any(given.needs[:2])
    return (
        given.x.new_empty(rows, *given.x.shape[1:]) if rows else given.x.new_empty(0),
        given.x.new_empty(0),
        *gradients[2:],
    )


def fill(name: str, inputs: tuple, output: Any) -> Any:
    """Empty tensors for results that were not asked for."""
    if not isinstance(output, tuple) or all(t is not None for t in output):
        return output
    given = ARGUMENTS[name](*inputs)
    like = {"dx": given.x, "dy": given.y, "dscale": given.scale, "dbias": given.bias}

    def empty(field: str) -> Tensor:
        if field not in like:
            return empty_stats(given.x, 0)
        return (given.x if like[field] is None else like[field]).new_empty(0)

    fields = RESULTS[name]._fields
    return tuple(empty(f) if t is None else t for f, t in zip(fields, output, strict=True))
