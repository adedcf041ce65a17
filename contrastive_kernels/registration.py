"""Registered operators: one schema, one fake and one autograd rule for each primitive,
bound to every backend that has kernels. Those of "cpu" register themselves, in C++; those of
"triton" are imported when they are first called.

A result that was not asked for is an empty tensor, since operators return a fixed number of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from .backends import INTERPRETED

NAMESPACE = "contrastive_kernels"
BACKENDS = ("cpu", "triton")

_PAIRS = (
    "Tensor x, Tensor? y, Tensor scale, Tensor? bias, Tensor? exclude_rows, Tensor? exclude_cols, "
    "Tensor? keep_rows, Tensor? keep_cols"
)
_SCHEMAS = {
    "row_stats": (
        f"({_PAIRS}, Tensor? threshold, bool mean, bool normalize, bool columns, bool attend) -> "
        "(Tensor lse, Tensor mean, Tensor col_lse, Tensor col_mean, Tensor rank, Tensor total, "
        "Tensor count, Tensor attended, Tensor slope)"
    ),
    "row_stats_backward": (
        f"({_PAIRS}, Tensor lse, Tensor mean, Tensor col_lse, Tensor col_mean, Tensor attended, "
        "Tensor slope, Tensor? grad_lse, Tensor? grad_mean, Tensor? grad_col_lse, "
        "Tensor? grad_col_mean, bool normalize, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "row_softplus": (
        f"({_PAIRS}, Tensor? threshold, bool normalize, bool[4] attend) -> "
        "(Tensor value, Tensor rank, Tensor total, Tensor count, "
        "Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)"
    ),
    "row_softplus_backward": (
        f"({_PAIRS}, Tensor grad, bool normalize, bool[4] needs) -> "
        "(Tensor, Tensor, Tensor, Tensor)"
    ),
    "row_dot": "(Tensor x, Tensor y, bool normalize) -> Tensor",
    "row_dot_backward": (
        "(Tensor x, Tensor y, Tensor grad, bool normalize, bool[2] needs) -> (Tensor, Tensor)"
    ),
}


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 features, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _stats(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=statistics_dtype(x))


def _gradients(needs: list[bool], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape if need else (0,))
        for need, t in zip(needs, (t if t is not None else inputs[0] for t in inputs), strict=True)
    )


def resident_dim(x: Tensor, y: Tensor) -> int:
    """The longest vectors of which the Triton kernels hold a gradient at once: those of longer ones
    go through stored parts of dL/dz."""
    single = x.dtype != y.dtype or x.dtype == torch.float32
    return 128 if single else 256


def can_attend(backend: str, x: Tensor, y: Tensor, frozen: bool) -> bool:
    """Whether the forward sweep may bring the gradient of the queries too (`attend`), where keys
    are frozen or not."""
    return frozen if backend == "cpu" else x.shape[1] <= resident_dim(x, y)


def can_sum(backend: str) -> bool:
    """Whether `row_softplus` can sum over the rows, which brings every gradient in the forward."""
    return backend == "triton"


def _fake_row_stats(
    backend, x, y, scale, bias, _er, _ec, _kr, _kc, threshold, mean, normalize, columns, attend
):
    rows, keys = x.shape[0], (x if y is None else y).shape[-2]
    sizes = (rows, rows * mean, keys * columns, keys * (columns and mean))
    monitors = (rows * (threshold is not None),) * 3
    # what the backward pass needs of an `attend`: weighted keys, or gradients, as the backend likes
    attended, slope = _stats(x, 0), _stats(x, 0)
    if attend:
        attended = _stats(x, rows, x.shape[1])
        if backend == "triton":
            attended, slope = (
                torch.empty_like(x, memory_format=torch.contiguous_format),
                _stats(x, rows),
            )
    return (*(_stats(x, size) for size in sizes + monitors), attended, slope)


def _fake_row_softplus(x, y, scale, bias, _er, _ec, _kr, _kc, threshold, normalize, attend):
    monitors = (x.shape[0] * (threshold is not None),) * 3
    sizes = (1 if any(attend) else x.shape[0], *monitors)
    return (*(_stats(x, size) for size in sizes), *_gradients(attend, x, y, scale, bias))


def _fake_pairs_backward(x, y, scale, bias, *rest):
    return _gradients(rest[-1], x, y, scale, bias)


def _setup_row_stats(ctx, inputs, output):
    mean, ctx.normalize, columns, attend = inputs[9:13]
    pairs = inputs[:8]
    if attend and not (ctx.needs_input_grad[1] or ctx.needs_input_grad[3]):
        # the backward pass has its weighted keys already: the keys may change, as a queue's do
        pairs = (inputs[0], None, inputs[2], *(5 * (None,)))
    ctx.save_for_backward(*pairs, *output[:4], *output[7:])
    asked = (True, mean, columns, columns and mean, *(5 * (False,)))
    absent = [t for t, wanted in zip(output, asked, strict=True) if not wanted]
    ctx.mark_non_differentiable(*absent)
    ctx.set_materialize_grads(False)


def _setup_row_softplus(ctx, inputs, output):
    ctx.normalize, ctx.attend = inputs[9:]
    # with `attend` the value is the sum over rows, and its gradients are there already
    ctx.save_for_backward(*(output[4:] if any(ctx.attend) else inputs[:8]))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _setup_row_dot(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.normalize = inputs[2]


def _setup_nothing(ctx, inputs, output):
    pass


def _needed(needs: tuple[bool, ...], grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [grad if need else None for need, grad in zip(needs, grads, strict=True)]


def _no_second_order(ctx, *grads):
    raise RuntimeError(
        'second-order gradients are supported by backend="reference" only: '
        "the fused backward has no derivative"
    )


def _register(backend: str) -> None:
    ops = {name: getattr(getattr(torch.ops, NAMESPACE), f"{name}_{backend}") for name in _SCHEMAS}
    ops = {name: op.default for name, op in ops.items()}

    def row_stats_backward(ctx, *grads):
        if all(grad is None for grad in grads[:4]):
            return (None,) * 13
        needs = list(ctx.needs_input_grad[:4])
        out = ops["row_stats_backward"](*ctx.saved_tensors, *grads[:4], ctx.normalize, needs)
        return (*_needed(needs, out), *(9 * (None,)))

    def row_softplus_backward(ctx, *grads):
        if grads[0] is None:
            return (None,) * 11
        needs = list(ctx.needs_input_grad[:4])
        if any(ctx.attend):
            # 0-d, so that it leaves the types alone
            out = tuple(t * grads[0].reshape(()) for t in ctx.saved_tensors)
        else:
            out = ops["row_softplus_backward"](*ctx.saved_tensors, grads[0], ctx.normalize, needs)
        return (*_needed(needs, out), *(7 * (None,)))

    def row_dot_backward(ctx, grad):
        needs = list(ctx.needs_input_grad[:2])
        out = ops["row_dot_backward"](*ctx.saved_tensors, grad, ctx.normalize, needs)
        return (*_needed(needs, out), None)

    rules = {
        "row_stats": (partial(_fake_row_stats, backend), row_stats_backward, _setup_row_stats),
        "row_stats_backward": (_fake_pairs_backward, _no_second_order, _setup_nothing),
        "row_softplus": (_fake_row_softplus, row_softplus_backward, _setup_row_softplus),
        "row_softplus_backward": (_fake_pairs_backward, _no_second_order, _setup_nothing),
        "row_dot": (
            lambda x, y, normalize: _stats(x, *y.shape[:2]), row_dot_backward, _setup_row_dot
        ),
        "row_dot_backward": (
            lambda x, y, grad, normalize, needs: _gradients(needs, x, y), _no_second_order,
            _setup_nothing,
        ),
    }  # fmt: skip
    for name, (fake, backward, setup_context) in rules.items():
        torch.library.register_fake(f"{NAMESPACE}::{name}_{backend}", fake, lib=_library)
        rule = _autograd_rule(ops[name], backward, setup_context)
        _library.impl(f"{name}_{backend}", rule, "Autograd")
        _ops[name, backend] = ops[name]


def _autograd_rule(op: Callable, backward_rule: Callable, setup_context: Callable) -> Callable:
    """What torch.library.register_autograd makes of them, less its walk through the schema, which
    takes longer than a small loss does."""

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(backward_rule)

    def call(*args):
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            return Rule.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def row_stats(backend: str) -> Callable:
    """The operator `row_stats_<backend>`."""
    return _ops["row_stats", backend]


def row_softplus(backend: str) -> Callable:
    """The operator `row_softplus_<backend>`."""
    return _ops["row_softplus", backend]


def backward(name: str, backend: str) -> Callable:
    """The operator `<name>_backward_<backend>`, for who does the work of autograd by hand."""
    return _ops[f"{name}_backward", backend]


def row_dot(backend: str) -> Callable:
    """The operator `row_dot_<backend>`."""
    return _ops["row_dot", backend]


def _register_triton() -> None:
    """The Triton kernels, for CUDA tensors, and in Triton's interpreter for CPU tensors."""
    for name in _SCHEMAS:

        def implementation(*args, name=name):
            return getattr(import_module("contrastive_kernels.triton"), name)(*args)

        for device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            _library.impl(f"{name}_triton", implementation, device)
    for name in ("row_stats", "row_softplus", "row_dot"):
        for device in ("CUDA", "CPU"):
            rule = _autocast_rule(_ops[name, "triton"], device)
            _library.impl(f"{name}_triton", rule, f"Autocast{device}")


def _autocast_rule(op: Callable, device: str) -> Callable:
    """Features in the type of the autocast region, as those of a matrix product; float64 stays."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))
    device = device.lower()

    def call(x, y, *rest):
        dtype = torch.get_autocast_dtype(device)
        x, y = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, y))
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(x, y, *rest)

    return call


_library = torch.library.Library(NAMESPACE, "DEF")
_ops: dict[tuple[str, str], Callable] = {}
for _backend in BACKENDS:
    for _name, _schema in _SCHEMAS.items():
        _library.define(f"{_name}_{_backend}{_schema}")
    _register(_backend)
_register_triton()
