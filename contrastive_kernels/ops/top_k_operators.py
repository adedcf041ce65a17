"""The registered operators of the largest products of each row, for "cpu" and "triton".

The forward sweep keeps the ids of the winners; the backward reads no other key.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..autograd import no_second_order, precise, register_rules
from ..backends import CPU_ERROR, INTERPRETED
from ..types import TopK, known, statistics_dtype
from . import registration
from .rows import add_rows
from .rowwise import BLOCK_ELEMENTS
from .schemas import empty_gradients, empty_stats

STORED_PAIRS = 2**26  # of a block, where there is no kernel
_SCHEMAS = {
    "top_k": (
        "(Tensor x, Tensor y, Tensor? exclude_rows, Tensor? exclude_cols, Tensor? keep_rows, "
        "Tensor? keep_cols, Tensor? threshold, Tensor? floor, int k, bool normalize) -> "
        "(Tensor values, Tensor ids)"
    ),
    "top_k_backward": (
        "(Tensor x, Tensor y, Tensor ids, Tensor grad, bool normalize, bool[2] needs) -> "
        "(Tensor dx, Tensor dy)"
    ),
}
_Arguments: Any = namedtuple(
    "_Arguments",
    "x y exclude_rows exclude_cols keep_rows keep_cols threshold floor k normalize",
)


def top_k(backend: str, **arguments: Any) -> TopK:
    """The operator by the names of its arguments. `floor` (N,): only products above it count."""
    return TopK(*_CALLS["top_k", backend](*_Arguments(**arguments)))


def gradients(
    backend: str,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    grad: Tensor,
    normalize: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Of x (N, D) and y (M, D), in the type of the statistics, from those of the values (N, k); an
    id of -1 has none. On a CPU rows in blocks: memory does not grow with N k D."""
    dtype = statistics_dtype(x)
    dx = torch.zeros_like(x, dtype=dtype) if needs[0] else None
    dy = torch.zeros_like(y, dtype=dtype) if needs[1] else None
    rows, k = ids.shape
    size = max(1, BLOCK_ELEMENTS // (k * x.shape[1])) if x.is_cpu else max(1, rows)
    for block in (slice(i, i + size) for i in range(0, rows, size)):
        absent = ids[block] < 0
        which = ids[block].clamp(min=0)
        keys = y.index_select(0, which.flatten()).view(*which.shape, -1).to(dtype)
        keys = keys.masked_fill(absent[..., None], 0.0)
        upstream = grad[block].to(dtype).masked_fill(absent, 0.0)
        of_x, of_keys = _of_rows(backend, x[block].to(dtype), keys, upstream, normalize, needs)
        if dx is not None:
            dx[block] = known(of_x)
        if dy is not None:
            add_rows(dy, which.flatten(), known(of_keys).flatten(0, 1), backend)
    return dx, dy


def _of_rows(
    backend: str,
    x: Tensor,
    keys: Tensor,
    grad: Tensor,
    normalize: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `row_dot` of x (n, D) and keys (n, k, D)."""
    if backend != "reference":
        made = registration.call(
            "row_dot_backward", backend, x=x, y=keys, ends=None, grad=grad.contiguous(),
            normalize=normalize, needs=list(needs),
        )  # fmt: skip
        return made.dx, made.dy
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, keys), needs, strict=True)]
        dots = precise(reference.row_dot)(*leaves, normalize=normalize)
        wanted = [t for t in leaves if t.requires_grad]
        found = iter(torch.autograd.grad(dots, wanted, grad))
    of_x, of_keys = (next(found) if need else None for need in needs)
    return of_x, of_keys


def _in_blocks(given: Any) -> TopK:
    """By stored products of a block of keys, whose first are merged with those before."""
    x, y, k = given.x, given.y, given.k
    best = None
    size = max(k, STORED_PAIRS // len(x))
    for columns in (slice(i, i + size) for i in range(0, len(y), size)):
        exclude, keep = (
            None if rows is None else (rows, cols[columns])
            for rows, cols in (
                (given.exclude_rows, given.exclude_cols), (given.keep_rows, given.keep_cols)
            )
        )  # fmt: skip
        found = reference.top_k(
            x, y[columns], k, exclude=exclude, keep=keep, threshold=given.threshold,
            normalize=given.normalize,
        )  # fmt: skip
        best = reference.merged(best, found, columns.start, k)
    return known(best)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    given = _Arguments(*inputs)
    ctx.normalize = given.normalize
    ctx.save_for_backward(given.x, given.y, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _setup_nothing(_ctx: Any, _inputs: tuple, _output: Any) -> None:
    pass


def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    given = _Arguments(*inputs)
    values = empty_stats(given.x, given.x.shape[0], given.k)
    return values, torch.empty_like(values, dtype=torch.int64)


def _fake_backward(
    x: Tensor, y: Tensor, ids: Tensor, grad: Tensor, normalize: bool, needs: list[bool]
) -> tuple[Tensor, ...]:
    return empty_gradients(needs, x, y)


def _register(backend: str) -> None:
    def backward_kernel(
        x: Tensor, y: Tensor, ids: Tensor, grad: Tensor, normalize: bool, needs: list[bool]
    ) -> tuple[Tensor, Tensor]:
        dx, dy = gradients(backend, x, y, ids, grad, normalize, (needs[0], needs[1]))
        return (
            x.new_empty(0) if dx is None else dx.to(x.dtype),
            y.new_empty(0) if dy is None else dy.to(y.dtype),
        )

    def differentiate(ctx: Any, grad: Tensor | None, _: None) -> Any:
        none = _Arguments(*(None for _ in _Arguments._fields))
        if grad is None:
            return none
        x, y, ids = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        dx, dy = _CALLS["top_k_backward", backend](x, y, ids, grad, ctx.normalize, list(needs))
        return none._replace(x=dx if needs[0] else None, y=dy if needs[1] else None)

    kernels: dict[str, Any] = {"top_k": None, "top_k_backward": None}
    if backend == "cpu" and CPU_ERROR is None:
        kernels["top_k"] = import_module("..cpu.top_k", __package__).top_k
        kernels["top_k_backward"] = backward_kernel
    rules: dict[str, tuple[Callable, Callable, Callable]] = {
        "top_k": (_fake, differentiate, _setup),
        "top_k_backward": (_fake_backward, no_second_order, _setup_nothing),
    }
    for name, schema in _SCHEMAS.items():
        _library.define(f"{name}_{backend}{schema}")
        op = getattr(getattr(torch.ops, registration.NAMESPACE), f"{name}_{backend}").default
        _CALLS[name, backend] = register_rules(_library, op, *rules[name], kernels[name])
    if backend != "triton":
        return

    def forward_kernel(*args: Any) -> tuple[Tensor, Tensor]:
        lists = import_module("..triton.top_k", __package__).top_k(*args)
        given = _Arguments(*args)
        if lists is None:
            return _in_blocks(given)
        return reference.first(lists[0], lists[1], given.k)

    for device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        _library.impl(f"top_k_{backend}", forward_kernel, device)
        _library.impl(f"top_k_backward_{backend}", backward_kernel, device)
    registration.register_autocast(_library, f"top_k_{backend}")


_library = torch.library.Library(registration.NAMESPACE, "FRAGMENT")
_CALLS: dict[tuple[str, str], Any] = {}
for _backend in registration.BACKENDS:
    _register(_backend)
