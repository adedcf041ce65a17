"""One sweep at several prefixes of the features: products are made once, block of features by
block, and every prefix has the statistics of its own norms. Only "cpu" has kernels of it; with
other backends, and where a sweep is made in blocks, a loss makes one for each prefix.

Operators take `ends`, ascending, the last one D, and give a row of results for each. With
`softplus` lse is the row sum of softplus, and there are no columns. The rest is as in schemas.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..autograd import no_second_order, register_rules
from ..backends import CPU_ERROR, rounds_weights
from ..types import SoftplusSweep, Sweep
from .pairs import Pairs, shared_arguments
from .registration import NAMESPACE, mark
from .schemas import GRADIENTS, PAIRS, empty_stats, pairs_gradients, record

_SCHEMAS = {
    "nested_stats": (
        f"({PAIRS}, int[] ends, bool softplus, bool normalize, bool columns, bool together, "
        "bool aligned) -> (Tensor lse, Tensor col_lse, Tensor partner, Tensor lse_low, "
        "Tensor col_lse_low)"
    ),
    "nested_stats_backward": (
        f"({PAIRS}, Tensor lse, Tensor? col_lse, Tensor lse_low, Tensor? col_lse_low, "
        "Tensor? grad_lse, Tensor? grad_col_lse, Tensor? grad_partner, int[] ends, bool softplus, "
        f"bool normalize, bool[4] needs, bool together) -> {GRADIENTS}"
    ),
}
_PARSED = {name: torch._C.parse_schema(name + schema) for name, schema in _SCHEMAS.items()}
_ARGUMENTS = {name: record(name, schema.arguments) for name, schema in _PARSED.items()}
_RESULTS = {name: record(name, schema.returns) for name, schema in _PARSED.items()}
_SAVED = ("lse", "col_lse", "lse_low", "col_lse_low")
_OPTIONS = ("ends", "softplus", "normalize", "together")

_KERNELS: Any = None if CPU_ERROR is not None else import_module("..cpu.nested", __package__)


def can_nest(backend: str, x: Tensor, ends: Sequence[int]) -> bool:
    """Whether a sweep over features x and tensors of this process may be of these prefixes. One
    normalised feature has no gradient, which sums with rounded weights would miss by far."""
    alone = ends[0] == 1 and rounds_weights(backend, x.dtype, x.dtype)
    return backend == "cpu" and not alone


def softmax(given: Pairs, ends: tuple[int, ...], *, columns: bool) -> Sweep:
    """lse (K, N) of K prefixes and, on request, col_lse (K, M) and partner (K, N)."""
    if columns and given.y is None:
        given = given._replace(y=given.x)
    out = _call(given, ends, softplus=False, columns=columns)
    return Sweep(
        out.lse,
        col_lse=out.col_lse if columns else None,
        partner=out.partner if given.aligned else None,
    )


def softplus(given: Pairs, ends: tuple[int, ...]) -> SoftplusSweep:
    """Row sums (K, N) of softplus and, on request, partner (K, N)."""
    out = _call(given._replace(y=given.keys), ends, softplus=True, columns=False)
    return SoftplusSweep(out.lse, partner=out.partner if given.aligned else None)


def _call(given: Pairs, ends: tuple[int, ...], *, softplus: bool, columns: bool) -> Any:
    arguments = _ARGUMENTS["nested_stats"](
        **shared_arguments(given), ends=list(ends), softplus=softplus, normalize=given.normalize,
        columns=columns, together=given.together, aligned=given.aligned,
    )  # fmt: skip
    return _RESULTS["nested_stats"](*_CALLS["nested_stats"](*arguments))


def _fake(*inputs: Any) -> Any:
    given = _ARGUMENTS["nested_stats"](*inputs)
    count, rows = len(given.ends), given.x.shape[0]
    keys = rows if given.y is None else given.y.shape[0]
    if given.together:
        rows = keys = rows + keys
    lse, col_lse = empty_stats(given.x, count, rows), empty_stats(given.x, count, keys)
    none = empty_stats(given.x, 0)
    return _RESULTS["nested_stats"](
        lse=lse,
        col_lse=col_lse if given.columns else none,
        partner=torch.empty_like(lse) if given.aligned else none.clone(),
        lse_low=torch.empty_like(lse),
        col_lse_low=torch.empty_like(col_lse) if given.columns else none.clone(),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    given, out = _ARGUMENTS["nested_stats"](*inputs), _RESULTS["nested_stats"](*output)
    ctx.options = {name: getattr(given, name) for name in _OPTIONS}
    ctx.save_for_backward(*inputs[:8], *(getattr(out, name) for name in _SAVED))
    mark(ctx, out, lse=True, col_lse=given.columns, partner=given.aligned)


def _differentiate(ctx: Any, *grads: Tensor | None) -> Any:
    above = _RESULTS["nested_stats"](*grads)
    none = _ARGUMENTS["nested_stats"](*(None for _ in _ARGUMENTS["nested_stats"]._fields))
    if all(g is None for g in (above.lse, above.col_lse, above.partner)):
        return none
    needs = _ARGUMENTS["nested_stats"](*ctx.needs_input_grad)
    names = _ARGUMENTS["nested_stats_backward"]._fields[: 8 + len(_SAVED)]
    saved = dict(zip(names, ctx.saved_tensors, strict=True))
    arguments = _ARGUMENTS["nested_stats_backward"](
        **saved, **ctx.options, grad_lse=above.lse, grad_col_lse=above.col_lse,
        grad_partner=above.partner, needs=[needs.x, needs.y, needs.scale, needs.bias],
    )  # fmt: skip
    made = _RESULTS["nested_stats_backward"](*_CALLS["nested_stats_backward"](*arguments))
    dx, dy = made.dx, made.dy
    if arguments.together and dx.shape[0] > 0:  # of the rows of both
        dx, dy = dx.split([saved["x"].shape[0], saved["y"].shape[0]])
    return none._replace(
        x=dx if needs.x else None,
        y=dy if needs.y else None,
        scale=made.dscale if needs.scale else None,
        bias=made.dbias if needs.bias else None,
    )


def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    return pairs_gradients(_ARGUMENTS["nested_stats_backward"](*inputs))


def _setup_nothing(_ctx: Any, _inputs: tuple, _output: Any) -> None:
    pass


def _fill(inputs: tuple, output: tuple) -> Any:
    """Empty tensors for results of the forward that were not asked for."""
    return tuple(empty_stats(inputs[0], 0) if t is None else t for t in output)


# fake, backward, context
_RULES: dict[str, tuple[Callable, Callable, Callable]] = {
    "nested_stats": (_fake, _differentiate, _setup),
    "nested_stats_backward": (_fake_backward, no_second_order, _setup_nothing),
}
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_CALLS: dict[str, Callable] = {}


def _register() -> None:
    for name, schema in _SCHEMAS.items():
        _library.define(f"{name}_cpu{schema}")
        op = getattr(getattr(torch.ops, NAMESPACE), f"{name}_cpu").default
        kernel = getattr(_KERNELS, name, None)
        _CALLS[name] = register_rules(_library, op, *_RULES[name], kernel, _fill)


_register()
