"""Late interaction: the sum, over a query's tokens, of the largest product with a document's.

Operators as those of `registration.py`. The forward keeps which token won (winners), or the
log-sum-exp of a smooth maximum (values; of "triton" the largest products too), for each token of a
query in each slot: 1 / Ld of the products, which are never stored. A slot is a document, or one of
those that each query has for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..autograd import no_second_order, precise, register_rules
from ..backends import CPU_ERROR, INTERPRETED, resolve_backend
from ..checks import check_pair, check_positive
from ..types import statistics_dtype
from .registration import BACKENDS, NAMESPACE, register_autocast
from .schemas import empty_gradients, empty_stats
from .token_sets import TokenSets, check_token_sets

_TOKENS = (
    "Tensor x, Tensor y, Tensor x_ends, Tensor y_ends, Tensor? x_kept, Tensor? y_kept, SymInt own, "
    "float temperature, bool normalize, bool zeros"
)
_SCHEMAS = {
    "max_sim": f"({_TOKENS}) -> (Tensor scores, Tensor winners, Tensor values)",
    "max_sim_backward": (
        f"({_TOKENS}, Tensor winners, Tensor values, Tensor grad, bool[2] needs) -> "
        "(Tensor dx, Tensor dy)"
    ),
}


def max_sim(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    *,
    query_lengths: Tensor | None = None,
    document_lengths: Tensor | None = None,
    temperature: float | None = None,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Late interaction scores of queries and documents, each a set of tokens (ColBERT, Khattab and
    Zaharia 2020, eq. 3; ColPali, Faysse et al. 2024, eq. 1).

    score_nm = sum_i max_j <q_ni, d_mj>, over the tokens i of query n and j of document m. No
    product is stored: what is kept of them for the gradient is which token won, of equal ones the
    first.
    Differentiable once in queries and documents; with `backend="reference"` any number of times,
    and in forward mode, where "auto" is the reference.

    Args:
        queries: tokens (N, Lq, D); float32, float64, bfloat16 or float16, any strides. Or of all
            queries one after the other, (total, D), with `query_lengths`.
        documents: tokens (M, Ld, D), or likewise with `document_lengths`; or (N, K, Ld, D): K
            documents for every query alone.
        query_mask, document_mask: bool, of the shape without D: True where a token counts. The
            others may have any value, and get the gradient 0.
        query_lengths, document_lengths: integers (N,), (M,): how many tokens each has.
        temperature: a number > 0: the maximum becomes the smooth one, t log sum_j exp(z_j / t).
            Tokens of documents that do not count are then cleared in a copy.
        normalize: divide tokens by their L2 norm (at least 1e-12) first.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (N, M), or (N, K); float32, or float64 for float64 tokens. A query without tokens has the
        score 0, and a document without tokens the score -inf with every other query, neither with a
        gradient.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a `backend` that cannot run here.
        NotImplementedError: a derivative that is not there: of kernels a second one, and one in
            forward mode.
    """
    of_queries = check_token_sets("queries", queries, query_mask, query_lengths)
    of_documents = check_token_sets("documents", documents, document_mask, document_lengths, (3, 4))
    check_pair(of_queries.tokens, of_documents.tokens, "queries", "documents")
    own = 0
    if documents.dim() == 4:
        own = documents.shape[1]
        if documents.shape[0] != of_queries.number:
            raise ValueError(
                f"documents of shape (N, K, L, D) must have N = {of_queries.number} as queries "
                f"have, got {tuple(documents.shape)}"
            )
    if temperature is not None:
        check_positive("temperature", temperature)
    backend = resolve_backend(backend, queries.device)
    return token_scores(
        of_queries, of_documents, own=own, temperature=temperature, normalize=normalize,
        backend=backend,
    )  # fmt: skip


def token_scores(
    queries: TokenSets,
    documents: TokenSets,
    *,
    own: int = 0,
    temperature: float | None = None,
    normalize: bool,
    zeros: bool = False,
    backend: str,
) -> Tensor:
    """`max_sim` of arguments that fit; `own`: each query has so many documents for itself; `zeros`:
    tokens of documents that do not count have the product 0, as if they were cleared."""
    slots = own or documents.number
    if queries.number == 0 or slots == 0:  # the graph of the other ranks, with no rows
        nothing = queries.tokens[:0].sum() + documents.tokens[:0].sum()
        dtype = statistics_dtype(queries.tokens)
        return nothing.to(dtype).expand(queries.number, slots)
    if zeros and (temperature is not None or backend == "reference"):
        documents = documents.cleared()._replace(kept=None)
    if backend == "reference":
        return _dense(queries, documents, own, temperature, normalize)
    if temperature is not None:  # 0 times what does not count may be NaN
        documents = documents.cleared()
    x, y = queries, documents
    return _CALLS["max_sim", backend](
        x.tokens,
        y.tokens,
        x.ends,
        y.ends,
        x.kept,
        y.kept,
        own,
        temperature or 0.0,
        normalize,
        zeros,
    )[0]


def _dense(
    queries: TokenSets, documents: TokenSets, own: int, temperature: float | None, normalize: bool
) -> Tensor:
    (x, x_kept), (y, y_kept) = queries.padded(), documents.padded()
    if own:
        y = y.unflatten(0, (-1, own))
        y_kept = None if y_kept is None else y_kept.unflatten(0, (-1, own))
    return precise(reference.max_sim)(
        x, y, query_mask=x_kept, document_mask=y_kept, temperature=temperature, normalize=normalize
    )


def _fake(
    backend: str, x: Tensor, y: Tensor, x_ends: Tensor, y_ends: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    _, _, own, temperature, *_ = rest
    state, none = (own or y_ends.shape[0], x.shape[0]), (0,)
    winners = x.new_empty(none if temperature else state, dtype=torch.int32)
    values = empty_stats(x, *(state if temperature or backend == "triton" else none))
    return empty_stats(x, x_ends.shape[0], state[0]), winners, values


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.own, ctx.temperature, ctx.normalize, ctx.zeros = inputs
    _, winners, values = output
    ctx.mark_non_differentiable(winners, values)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, winners, values)


def _differentiate(backend: str, ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    nothing = (None,) * 10
    if grad is None:
        return nothing
    *tensors, winners, values = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    made = _CALLS["max_sim_backward", backend](
        *tensors, ctx.own, ctx.temperature, ctx.normalize, ctx.zeros, winners, values, grad, needs
    )
    return *(t if need else None for t, need in zip(made, needs, strict=True)), *nothing[2:]


def _fake_backward(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return empty_gradients(rest[-1], x, y)


def _setup_nothing(_ctx: Any, _inputs: tuple, _output: Any) -> None:
    pass


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_CALLS: dict[tuple[str, str], Callable] = {}


def _register(backend: str) -> None:
    kernels = None
    if backend == "cpu" and CPU_ERROR is None:
        kernels = import_module("..cpu.max_sim", __package__)

    rules: dict[str, tuple[Callable, Callable, Callable]] = {
        "max_sim": (partial(_fake, backend), partial(_differentiate, backend), _setup),
        "max_sim_backward": (_fake_backward, no_second_order, _setup_nothing),
    }
    for name, schema in _SCHEMAS.items():
        _library.define(f"{name}_{backend}{schema}")
        op = getattr(getattr(torch.ops, NAMESPACE), f"{name}_{backend}").default
        kernel = getattr(kernels, name, None)
        _CALLS[name, backend] = register_rules(_library, op, *rules[name], kernel)


def _register_triton() -> None:
    for name in _SCHEMAS:

        def implementation(*args: Any, name: str = name) -> Any:
            return getattr(import_module("..triton.max_sim", __package__), name)(*args)

        for device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            _library.impl(f"{name}_triton", implementation, device)
    register_autocast(_library, "max_sim_triton")


for _backend in BACKENDS:
    _register(_backend)
_register_triton()
