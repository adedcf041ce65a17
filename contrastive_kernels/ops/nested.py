"""One sweep at several prefixes of the features: products are made once, block of features by
block, and every prefix has the statistics of its own norms. Where that is not to be had or does not
pay, and where a sweep is made in blocks, a loss makes one for each prefix.

Operators take `ends`, ascending, the last one D, and give a row of results for each. With
`softplus` lse is the row sum of softplus, and there are no columns. The rest is as in schemas.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..autograd import no_second_order, register_rules
from ..backends import CPU_ERROR, INTERPRETED, rounds_weights
from ..types import SoftplusSweep, Sweep
from .pairs import Pairs, operand_dtype, shared_arguments
from .registration import BACKENDS, NAMESPACE, mark, register_autocast
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

# Of half features on a GPU: pairs of which launches cost more than their logits, and features from
# which on the products of all prefixes cost more than reading the logits of each again.
FEW_PAIRS, WIDE = 2**24, 2048


def can_nest(backend: str, x: Tensor, ends: Sequence[int]) -> bool:
    """Whether a sweep over features x (N, D) and about as many keys, tensors of this process, is to
    be one of these prefixes. On a CPU one normalised feature has no gradient, which sums with
    rounded weights would miss by far; a GPU makes half products faster than it reads logits that
    were stored."""
    if backend == "triton":
        half = operand_dtype(backend, x.dtype, x.device).itemsize == 2
        return not half or x.shape[0] ** 2 <= FEW_PAIRS or x.shape[1] >= WIDE
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
    return _RESULTS["nested_stats"](*_CALLS["nested_stats", given.backend](*arguments))


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


def _differentiate(backend: str, ctx: Any, *grads: Tensor | None) -> Any:
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
    call = _CALLS["nested_stats_backward", backend]
    made = _RESULTS["nested_stats_backward"](*call(*arguments))
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


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_CALLS: dict[tuple[str, str], Callable] = {}


def _register(backend: str) -> None:
    kernels = None
    if backend == "cpu" and CPU_ERROR is None:
        kernels = import_module("..cpu.nested", __package__)
    # fake, backward, context
    rules: dict[str, tuple[Callable, Callable, Callable]] = {
        "nested_stats": (_fake, partial(_differentiate, backend), _setup),
        "nested_stats_backward": (_fake_backward, no_second_order, _setup_nothing),
    }
    for name, schema in _SCHEMAS.items():
        _library.define(f"{name}_{backend}{schema}")
        op = getattr(getattr(torch.ops, NAMESPACE), f"{name}_{backend}").default
        kernel = getattr(kernels, name, None)
        _CALLS[name, backend] = register_rules(_library, op, *rules[name], kernel, _fill)


def _register_triton() -> None:
    for name in _SCHEMAS:

        def implementation(*args: Any, name: str = name) -> Any:
            return getattr(import_module("..triton.nested", __package__), name)(*args)

        for device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            _library.impl(f"{name}_triton", implementation, device)
    register_autocast(_library, "nested_stats_triton")


for _backend in BACKENDS:
    _register(_backend)
_register_triton()
