"""Registered operators: one schema and one fake (schemas.py) and one derivative for each primitive,
bound to every backend that has kernels. Those of "triton" are imported when they are first called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..autograd import no_second_order, reaches_kernel, register_rules
from ..backends import CPU_ERROR, INTERPRETED
from .schemas import (
    ARGUMENTS,
    RESULTS,
    SCHEMAS,
    empty_gradients,
    empty_stats,
    fake_pairs_backward,
    fake_row_softplus,
    fake_row_stats,
    fill,
)

NAMESPACE = "contrastive_kernels"
BACKENDS = ("cpu", "triton")

# the gradients of an operator's arguments, to be replaced by name
_NO_GRADIENTS = {name: cls(*(None for _ in cls._fields)) for name, cls in ARGUMENTS.items()}
_PAIR_NAMES = ARGUMENTS["row_stats"]._fields[:8]


def call(name: str, backend: str, **arguments: Any) -> Any:
    """The results of the operator `<name>_<backend>`, by name."""
    return RESULTS[name](*_CALLS[name, backend](*ARGUMENTS[name](**arguments)))


def row_stats_backward(
    backend: str,
    *,
    mean_low: Tensor | None,
    col_mean_low: Tensor | None,
    into: Any = (None, None),
    **arguments: Any,
) -> Any:
    """(dx, dy, dscale, dbias) by name; what is not needed is empty. `into`: gradients of x and y,
    one of both with `together`, to which those are added in place."""
    for side, low in (("", mean_low), ("col_", col_mean_low)):
        grads = arguments[f"grad_{side}lse"], arguments[f"grad_{side}mean"]
        arguments[f"grad_{side}lse"] = exact_mean(*grads, low)
    given = ARGUMENTS["row_stats_backward"](**arguments)
    added = any(t is not None for t in into)
    if not added or not reaches_kernel(given, gpu=backend == "triton"):
        out = RESULTS["row_stats_backward"](*_CALLS["row_stats_backward", backend](*given))
        for total, made in zip(into, (out.dx, out.dy), strict=True):
            if total is not None:
                total += made
    else:
        kernels = import_module(f"..{backend}", __package__)
        out = RESULTS["row_stats_backward"](*kernels.row_stats_backward(*given, into))
    if not arguments["together"]:
        return out
    if out.dx.shape[0] == 0:  # len() would fix the number of rows in a compiled graph
        return out._replace(dy=out.dx)
    rows, keys = (arguments[side].shape[0] for side in ("x", "y"))
    dx, dy = out.dx.split([rows, keys])
    return out._replace(dx=dx, dy=dy)


def exact_mean(
    grad_lse: Tensor | None, grad_mean: Tensor | None, mean_low: Tensor | None
) -> Tensor | None:
    """The gradient of lse for a backward that has the rounded mean: z - mean comes with a factor
    grad_mean, beside grad_lse."""
    if grad_mean is None or mean_low is None:
        return grad_lse
    low = grad_mean * mean_low
    return -low if grad_lse is None else grad_lse - low


def row_dot(
    backend: str, x: Tensor, y: Tensor, normalize: bool, ends: Tensor | None = None
) -> Tensor:
    """<x_i, y_ik> of x (N, D) and y (N, K, D): (N, K); or (T,), of y (T, D) where row i has the
    keys up to ends_i (N,), int64, which those of row i - 1 end before."""
    return _CALLS["row_dot", backend](x, y, ends, normalize)


def _save(ctx: Any, **tensors: Tensor | None) -> None:
    ctx.names = tuple(tensors)
    ctx.save_for_backward(*tensors.values())


def _saved(ctx: Any) -> dict[str, Tensor | None]:
    return dict(zip(ctx.names, ctx.saved_tensors, strict=True))


def _setup_row_stats(ctx: Any, inputs: tuple, output: tuple) -> None:
    given, out = ARGUMENTS["row_stats"](*inputs), RESULTS["row_stats"](*output)
    needs = ARGUMENTS["row_stats"](*ctx.needs_input_grad)
    pairs = dict(zip(_PAIR_NAMES, inputs, strict=False))
    if given.attend and not (needs.y or needs.bias):
        # the backward pass has what it needs of the keys: they may change, as a queue's do
        pairs = dict.fromkeys(_PAIR_NAMES) | {"x": given.x, "scale": given.scale}
    ctx.normalize, ctx.together = given.normalize, given.together
    _save(
        ctx, **pairs, lse=out.lse, mean=out.mean, col_lse=out.col_lse, col_mean=out.col_mean,
        attended=out.attended, slope=out.slope, lse_low=out.lse_low, col_lse_low=out.col_lse_low,
        mean_low=out.mean_low, col_mean_low=out.col_mean_low,
    )  # fmt: skip
    mark(
        ctx, out, lse=True, mean=given.mean, col_lse=given.columns,
        col_mean=given.columns and given.mean, partner=given.aligned,
    )  # fmt: skip


def _setup_row_softplus(ctx: Any, inputs: tuple, output: tuple) -> None:
    given, out = ARGUMENTS["row_softplus"](*inputs), RESULTS["row_softplus"](*output)
    ctx.normalize, ctx.summed = given.normalize, any(given.attend)
    if ctx.summed:  # the value is the sum over rows, and its gradients are there already
        _save(ctx, x=out.dx, y=out.dy, scale=out.dscale, bias=out.dbias)
    else:
        _save(ctx, **dict(zip(_PAIR_NAMES, inputs, strict=False)), low=out.low)
    mark(ctx, out, value=True, partner=given.aligned)


def mark(ctx: Any, out: Any, **differentiable: bool) -> None:
    """Which of the results, by name, have a gradient."""
    named = zip(out._fields, out, strict=True)
    others = (t for field, t in named if t is not None and not differentiable.get(field))
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _setup_row_dot(ctx: Any, inputs: tuple, _output: Tensor) -> None:
    given = ARGUMENTS["row_dot"](*inputs)
    ctx.normalize = given.normalize
    ctx.save_for_backward(given.x, given.y, given.ends)


def _setup_nothing(_ctx: Any, _inputs: tuple, _output: Any) -> None:
    pass


def _register(backend: str) -> None:
    def differentiate_row_stats(ctx: Any, *grads: Tensor | None) -> Any:
        grad = RESULTS["row_stats"](*grads)
        gradients = _NO_GRADIENTS["row_stats"]
        given = (grad.lse, grad.mean, grad.col_lse, grad.col_mean, grad.partner)
        if all(g is None for g in given):
            return gradients
        needs = ARGUMENTS["row_stats"](*ctx.needs_input_grad)
        out = row_stats_backward(
            backend, **_saved(ctx), grad_lse=grad.lse, grad_mean=grad.mean,
            grad_col_lse=grad.col_lse, grad_col_mean=grad.col_mean, grad_partner=grad.partner,
            normalize=ctx.normalize, needs=[needs.x, needs.y, needs.scale, needs.bias],
            together=ctx.together,
        )  # fmt: skip
        return _replace_needed(gradients, needs, out)

    def differentiate_row_softplus(ctx: Any, *grads: Any) -> Any:
        result = RESULTS["row_softplus"](*grads)
        grad, grad_partner = result.value, result.partner
        gradients = _NO_GRADIENTS["row_softplus"]
        if grad is None and grad_partner is None:
            return gradients
        needs = ARGUMENTS["row_softplus"](*ctx.needs_input_grad)
        if ctx.summed:
            factor = grad.reshape(())  # 0-d, so that it leaves the types alone
            made = {name: t * factor for name, t in _saved(ctx).items()}
            return gradients._replace(**{k: t for k, t in made.items() if getattr(needs, k)})
        if grad is None:
            grad = torch.zeros_like(ctx.saved_tensors[0][:, 0], dtype=grad_partner.dtype)
        out = call(
            "row_softplus_backward", backend, **_saved(ctx), grad=grad, grad_partner=grad_partner,
            normalize=ctx.normalize, needs=[needs.x, needs.y, needs.scale, needs.bias],
        )  # fmt: skip
        return _replace_needed(gradients, needs, out)

    def differentiate_row_dot(ctx: Any, grad: Tensor) -> Any:
        x, y, ends = ctx.saved_tensors
        needs = ARGUMENTS["row_dot"](*ctx.needs_input_grad)
        out = call(
            "row_dot_backward", backend, x=x, y=y, ends=ends, grad=grad, normalize=ctx.normalize,
            needs=[needs.x, needs.y],
        )  # fmt: skip
        return _NO_GRADIENTS["row_dot"]._replace(
            x=out.dx if needs.x else None, y=out.dy if needs.y else None
        )

    rules: dict[str, tuple[Callable, Callable, Callable]] = {
        "row_stats": (partial(fake_row_stats, backend), differentiate_row_stats, _setup_row_stats),
        "row_softplus": (
            partial(fake_row_softplus, backend), differentiate_row_softplus, _setup_row_softplus,
        ),
        "row_dot": (
            lambda x, y, ends, normalize: empty_stats(x, *y.shape[:-1]), differentiate_row_dot,
            _setup_row_dot,
        ),
        "row_dot_backward": (
            lambda x, y, ends, grad, normalize, needs: empty_gradients(needs, x, y),
            no_second_order, _setup_nothing,
        ),
    }  # fmt: skip
    for name in ("row_stats_backward", "row_softplus_backward"):
        rules[name] = (partial(fake_pairs_backward, name), no_second_order, _setup_nothing)
    for name, (fake, backward, setup_context) in rules.items():
        op = getattr(getattr(torch.ops, NAMESPACE), f"{name}_{backend}").default
        kernel = _KERNELS.get(f"{name}_{backend}")
        OPERATORS[name, backend] = op
        _CALLS[name, backend] = register_rules(
            _library, op, fake, backward, setup_context, kernel, partial(fill, name)
        )


def _replace_needed(gradients: Any, needs: Any, made: Any) -> Any:
    return gradients._replace(
        x=made.dx if needs.x else None,
        y=made.dy if needs.y else None,
        scale=made.dscale if needs.scale else None,
        bias=made.dbias if needs.bias else None,
    )


def _cpu_kernels() -> dict[str, Callable]:
    """Those in C++."""
    if CPU_ERROR is not None:
        return {}
    cpu = import_module("..cpu", __package__)
    return {f"{name}_cpu": getattr(cpu, name) for name in SCHEMAS}


def _register_triton() -> None:
    """The Triton kernels, for CUDA tensors, and in Triton's interpreter for CPU tensors."""
    for name in SCHEMAS:

        def implementation(*args: Any, name: str = name) -> Any:
            return getattr(import_module("..triton", __package__), name)(*args)

        for device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            _library.impl(f"{name}_triton", implementation, device)
    for name in ("row_stats", "row_softplus", "row_dot"):
        register_autocast(_library, f"{name}_triton")


def register_autocast(library: torch.library.Library, name: str) -> None:
    """For an operator of Triton whose first two arguments are features."""
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    for device in ("CUDA", "CPU"):
        library.impl(name, _autocast_rule(op, device), f"Autocast{device}")


def _autocast_rule(op: Callable, device: str) -> Callable:
    """Features in the type of the autocast region, as those of a matrix product; float64 stays."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))
    device = device.lower()

    def call(x: Tensor, y: Tensor | None, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        features = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, y))
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*features, *rest)

    return call


_library = torch.library.Library(NAMESPACE, "DEF")
_KERNELS = _cpu_kernels()  # of CPU tensors, by the names of operators
OPERATORS: dict[tuple[str, str], Callable] = {}
_CALLS: dict[tuple[str, str], Callable] = {}  # of them
for _backend in BACKENDS:
    for _name, _schema in SCHEMAS.items():
        _library.define(f"{_name}_{_backend}{_schema}")
    _register(_backend)
_register_triton()
