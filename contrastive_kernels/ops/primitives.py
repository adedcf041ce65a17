"""The primitives that every loss is algebra on: `sweep` (softmax statistics of the rows and columns
of a similarity matrix that is never stored), `softplus_sweep` (row sums of softplus) and, in
`pairs.py`, `row_dot` (the positives).

`operands` makes the record that sweeps take; where its keys are decides who runs it: chunks of a
source, keys of each row, the ranks of a group, or `pairs.py`, on the backend it names. Nothing here
checks; the public `row_stats` and `row_softplus`, and `checked_operands`, do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor

from ..backends import (
    are_few,
    can_align,
    can_attend,
    can_join,
    can_sum,
    resolve_backend,
    rounds_weights,
)
from ..checks import check_features, check_id_pair, check_keys, check_pair, finite, scalar
from ..distributed.shards import Batch, Shards
from ..sources import NegativeSource, as_source, is_source
from ..types import (
    IdPair,
    OwnKeys,
    RowColumnStats,
    RowStats,
    SoftplusSweep,
    Sweep,
    known,
    statistics_dtype,
)
from . import chunked, nested, own, pairs, registration, rows, sharded
from .pairs import KeyBias, Needs, Pairs, Part, row_dot
from .rowwise import by_rows, can_tie, tied


def operands(
    x: Tensor | Part,
    y: Tensor | Part | NegativeSource | OwnKeys | None,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor | KeyBias | None = None,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    normalize: bool = False,
    backend: str,
    batch: Batch | None = None,
    more: Tensor | None = None,
    aligned: bool = False,
    ends: Sequence[int] | None = None,
) -> Pairs:
    """The record of a sweep over z_ij = scale <x_i, y_j> + bias_j, of arguments that fit.

    y = None means y = x, computed for half of the pairs where that makes a symmetric matrix: ids of
    rows and columns that are one tensor, no bias. `more`: with y = None, rows that follow those of
    x, which are not copied where that can be. `aligned`: the sweep gives the logits of row i
    and its partner too, key i or row i of the other half; see `swept_positives`. A `KeyBias` is
    for y in chunks. `backend` is a resolved one. `batch`: y, bias and column ids are this rank's
    part of those of a group, of `batch.sizes` rows; statistics of rows are over the keys of all
    ranks, those of this rank's columns over all rows. `ends`: statistics come for every prefix of
    the features that ends there, ascending up to D, as rows of the results; where `can_nest`.
    """
    x_part, y_part = (t if isinstance(t, Part) else None for t in (x, y))
    x = x.features if isinstance(x, Part) else x
    y = y.features if isinstance(y, Part) else y
    dtype = statistics_dtype(x)
    if isinstance(scale, Tensor):
        scale = scale.to(device=x.device, dtype=dtype)
    else:
        scale = torch.full((), scale, dtype=dtype, device=x.device)
    chunk_bias = None
    if callable(bias):
        bias, chunk_bias = None, bias
    elif isinstance(bias, Tensor):  # a float64 one of rows stays so until it has met the logits
        bias = bias.to(x.device, bias.dtype if isinstance(y, OwnKeys) else dtype)
    elif bias is not None:
        bias = None if bias == 0 else torch.full((), bias, dtype=dtype, device=x.device)
    symmetric = y is None and bias is None and _same_ids(exclude) and _same_ids(keep)
    together = False
    if more is not None:
        together = symmetric and can_join(backend) and not isinstance(batch, Shards)
        together = together and x.dtype == more.dtype
        if not together:
            x = torch.cat((x, more))
    if y is None and not symmetric:
        y = x
    blocks = is_source(y) or isinstance(y, OwnKeys) or isinstance(batch, Shards)
    if bias is not None and bias.dim() == 0 and not blocks:
        bias = bias.expand(cast(Tensor, y).shape[-2])
    if together:
        y = more
    return Pairs(
        x, y, scale, bias, exclude, keep, normalize, backend, batch, together, aligned, chunk_bias,
        x_part, y_part, None if ends is None else tuple(ends),
    )  # fmt: skip


def checked_operands(
    x: Tensor,
    y: Tensor | NegativeSource | None,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    normalize: bool = False,
    backend: str = "auto",
) -> Pairs:
    """`operands` of what a user passes, or raise."""
    check_features("x", x, (2,))
    if y is not None:
        y = as_source("y", y)
        check_keys("y", y, (2, 3))
        check_pair(x, y)
        if len(y.shape) == 3 and y.shape[0] != x.shape[0]:
            raise ValueError(
                f"y of shape (N, M, D) must have one set of keys for each of the {x.shape[0]} "
                f"rows of x, got {tuple(y.shape)}"
            )
        if y.shape[-2] == 0:
            raise ValueError(f"y must not be empty, got shape {tuple(y.shape)}")
    keys = (x if y is None else y).shape[-2]
    scale = scalar("scale", scale)
    if isinstance(bias, Tensor):
        if bias.dim() > 0 and bias.shape != (keys,):
            raise ValueError(f"bias must have shape ({keys},), got {tuple(bias.shape)}")
    elif bias is not None:
        bias = finite("bias", bias)
    if exclude is not None:
        exclude = check_id_pair("exclude", exclude, x.shape[0], keys, x.device)
    if keep is not None:
        keep = check_id_pair("keep", keep, x.shape[0], keys, x.device)
    return operands(
        x, y, scale=scale, bias=bias, exclude=exclude, keep=keep, normalize=normalize,
        backend=resolve_backend(backend, x.device),
    )  # fmt: skip


def sweep(
    given: Pairs, *, mean: bool = False, columns: bool = False, threshold: Tensor | None = None
) -> Sweep:
    """Softmax statistics in one sweep; see `row_stats`.

    Beyond that: `mean=False` leaves the mean out; `threshold` (N,) asks for rank_i = #{j: z_ij >
    threshold_i}, total_i = sum_j z_ij and count_i, the number of kept pairs, all without gradient.
    """
    if given.ends is not None:
        return nested.softmax(given, given.ends, columns=columns)
    if is_source(given.y):
        return chunked.softmax(given, mean=mean, threshold=threshold)
    if isinstance(given.y, OwnKeys):
        return own.softmax(given, threshold=threshold)
    if isinstance(given.batch, Shards):
        return sharded.softmax(given, mean=mean, columns=columns, threshold=threshold)
    attend = attends(given, mean, columns)
    out = pairs.softmax(given, mean=mean, columns=columns, threshold=threshold, attend=attend)
    return Sweep(out.lse, out.mean, out.col_lse, out.col_mean, out.counts, partner=out.partner)


def attends(given: Pairs, mean: bool, columns: bool) -> bool:
    """Whether the sweep takes the weighted mean of the keys, the queries' gradient, on its way."""
    y = given.tensor
    if mean or columns or y is None or y.dim() == 3 or given.together or given.aligned:
        return False
    if _requires_grad(given.scale) and rounds_weights(given.backend, given.x.dtype, y.dtype):
        return False  # its gradient would be that of rounded weights
    frozen = not (y.requires_grad or _requires_grad(given.bias))
    return _may_attend(given.x, y, given.backend, frozen)


def softplus_sweep(
    given: Pairs, *, threshold: Tensor | None = None, summed: bool = False
) -> SoftplusSweep:
    """Row sums of softplus, with the threshold of `sweep`; see `row_softplus`.

    `summed`: value is the sum over the rows too, 0-d, which leaves backends more freedom.
    """
    if given.ends is not None:
        return nested.softplus(given, given.ends)
    if is_source(given.y):
        out = chunked.softplus(given, threshold=threshold)
    elif isinstance(given.y, OwnKeys):
        out = own.softplus(given, threshold=threshold)
    elif isinstance(given.batch, Shards):
        out = sharded.softplus(given, threshold=threshold)
    else:
        attend = None
        keys = given.x if given.y is None else given.y
        if (
            summed
            and threshold is None
            and can_sum(given.backend)
            and keys.dim() == 2
            and torch.is_grad_enabled()
        ):
            operands = (given.x, keys, given.scale, given.bias)
            attend = Needs(*(_requires_grad(t) for t in operands))
        out = pairs.softplus(given, threshold=threshold, attend=attend)
    return out._replace(value=out.value.sum()) if summed else out


class _Dots(NamedTuple):
    """<x_i, y_ik>, as `row_dot` makes it."""

    normalize: bool
    backend: str

    def values(self, x: Tensor, y: Tensor | None) -> Tensor:
        return registration.row_dot(self.backend, x, known(y), self.normalize)

    def gradients(
        self, x: Tensor, y: Tensor | None, values: Tensor, grad: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        made = registration.call(
            "row_dot_backward", self.backend, x=x, y=y, ends=None, grad=grad,
            normalize=self.normalize, needs=list(needs),
        )  # fmt: skip
        return made.dx if needs[0] else None, made.dy if needs[1] else None


class _Squares(NamedTuple):
    """<x_i, x_i>."""

    backend: str

    def values(self, x: Tensor, y: Tensor | None) -> Tensor:
        return registration.row_dot(self.backend, x, x.unsqueeze(1), False).squeeze(1)

    def gradients(
        self, x: Tensor, y: Tensor | None, values: Tensor, grad: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return 2 * grad.unsqueeze(1) * x, None


def positives(
    x: Tensor, y: Tensor, *, which: Tensor | None = None, normalize: bool = False, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(`row_dot` of x (N, D) and y, x, y): x and y for sweeps and nothing else, which then share
    their gradients' memory. y (N, D), (N, K, D), or (K N, D): K blocks of a vector for each row; or
    (M, D), `which` (N,) of it."""
    if not can_tie(backend, x) or (which is not None and not rows.adds_in_order(x)):
        if which is not None:
            own = rows.take_rows(y, which, backend)
        else:
            own = y if y.shape == x.shape else by_rows(x, y) if len(x) else y
        return row_dot(x, own, normalize=normalize, backend=backend), x, y
    dot, tied_x, tied_y = tied(_Dots(normalize, backend), x, y, which)
    single = which is not None or y.shape == x.shape
    return dot.squeeze(1) if single else dot, tied_x, known(tied_y)


def swept_positives(
    x: Tensor, y: Tensor, batch: Batch, *, normalize: bool, backend: str, dots: bool,
    one_way: bool = True, summed: bool = False, prefixes: bool = False,
) -> tuple[bool, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(aligned, dots, x, y) before a sweep of x (N, D) and the keys y of a batch, (N, D) or more.

    Where it can give the logits of <x_i, y_i> on its way, to be asked for by
    `operands(aligned=True)`, dots (N,) have no gradient and are None unless `dots`; else as
    `positives`. `one_way`: the sweep is of rows alone. `summed`: as `softplus_sweep` takes it.
    `prefixes`: the sweep is one at several prefixes, which always can.
    """
    if prefixes:
        return True, None, x, y
    can = can_align(backend) and not isinstance(batch, Shards)
    can = can and not (summed and can_sum(backend))
    if not can or (one_way and _may_attend(x, y, backend, frozen=not y.requires_grad)):
        return False, *positives(x, y, normalize=normalize, backend=backend)
    made = None
    if dots:
        made = row_dot(x.detach(), y[: len(x)].detach(), normalize=normalize, backend=backend)
    return True, made, x, y


def squares(x: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    """(|x_i|^2, x), x likewise."""
    if not can_tie(backend, x):
        return x.to(statistics_dtype(x)).square().sum(-1), x
    values, tied_x, _ = tied(_Squares(backend), x)
    return values, tied_x


def keeps_frozen_keys(x: Tensor, y: Tensor, backend: str) -> bool:
    """Whether the backward of `sweep` reads keys y (M, D) without gradient again, so that they
    must not change before it."""
    needed = torch.is_grad_enabled() and x.requires_grad
    return needed and not can_attend(backend, x, y.dtype, frozen=True)


def _may_attend(x: Tensor, y: Tensor, backend: str, frozen: bool) -> bool:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return False
    if not frozen and are_few(x.shape[0], y.shape[0], x.shape[1]):
        return False  # its products are fewer, its launches are not
    return can_attend(backend, x, y.dtype, frozen)


class _Options(TypedDict, total=False):
    scale: float | Tensor
    bias: Tensor | None
    exclude: IdPair | None
    keep: IdPair | None
    normalize: bool
    backend: str


@overload
def row_stats(
    x: Tensor,
    y: Tensor | NegativeSource,
    *,
    columns: Literal[False] = False,
    **options: Unpack[_Options],
) -> RowStats: ...


@overload
def row_stats(
    x: Tensor,
    y: Tensor | NegativeSource,
    *,
    columns: Literal[True],
    **options: Unpack[_Options],
) -> RowColumnStats: ...


@overload
def row_stats(
    x: Tensor, y: Tensor | NegativeSource, *, columns: bool, **options: Unpack[_Options]
) -> RowStats | RowColumnStats: ...


def row_stats(
    x: Tensor,
    y: Tensor | NegativeSource,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    columns: bool = False,
    normalize: bool = False,
    backend: str = "auto",
) -> RowStats | RowColumnStats:
    """Softmax statistics of the rows, and on request the columns, of a similarity matrix.

    z_ij = scale <x_i, y_j> + bias_j,   lse_i = log sum_j exp(z_ij),
    mean_i = sum_j exp(z_ij - lse_i) z_ij, over the pairs that are kept. The matrix is never
    stored: memory grows with N + M. Differentiable once in x, y, scale and bias; with
    `backend="reference"` any number of times, and in forward mode, where "auto" is the reference.

    Args:
        x: queries (N, D); float32, float64, bfloat16 or float16, any strides.
        y: keys (M, D), or (N, M, D): keys of its own for every query; or (M, D) in chunks, a
            `NegativeSource`, without gradient. Pass the same tensor as `x` for a self-similarity:
            it then costs half.
        scale: a number or a 0-d tensor, which may need a gradient.
        bias: (M,), added to every logit of key j.
        exclude: integer ids (row_ids (N,), col_ids (M,)); pairs with equal ids are dropped.
        keep: integer ids likewise; only pairs with equal ids are kept.
        columns: also return col_lse and col_mean (M,), the same statistics of each column.
        normalize: divide rows of x and y by their L2 norm (at least 1e-12) first.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        RowStats(lse, mean), each (N,), or RowColumnStats(lse, mean, col_lse, col_mean); float32,
        or float64 for float64 features. A row with no pair has lse = -inf, mean = 0 and no
        gradient.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a `backend` that cannot run here.
        NotImplementedError: a derivative that is not there: of kernels a second one, and one in
            forward mode; with y in chunks also one in a transform of torch.func.
    """
    if bias is not None and not (isinstance(bias, Tensor) and bias.dim() > 0):
        got = "()" if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"bias must be a tensor of shape (M,), got {got}")
    given = checked_operands(
        x, None if y is x else y, scale=scale, bias=bias, exclude=exclude, keep=keep,
        normalize=normalize, backend=backend,
    )  # fmt: skip
    if columns and given.y is not None and (is_source(y) or y.dim() == 3):
        got = "in chunks" if is_source(y) else "of shape (N, M, D)"
        raise ValueError(f"columns=True needs keys of shape (M, D), got a y {got}")
    out = sweep(given, mean=True, columns=columns)
    mean = known(out.mean)
    if columns:
        return RowColumnStats(out.lse, mean, known(out.col_lse), known(out.col_mean))
    return RowStats(out.lse, mean)


def row_softplus(
    x: Tensor,
    y: Tensor | NegativeSource,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Row sums of softplus: value_i = sum_j log(1 + exp(scale <x_i, y_j> + bias_j)), (N,).

    Arguments as in `row_stats`; `bias` is a number, a 0-d tensor or (M,), and may need a gradient.
    A row with no pair has value 0.
    """
    given = checked_operands(
        x, y, scale=scale, bias=bias, exclude=exclude, keep=keep, normalize=normalize,
        backend=backend,
    )  # fmt: skip
    return softplus_sweep(given).value


def _same_ids(ids: IdPair | None) -> bool:
    return ids is None or ids[0] is ids[1]


def _requires_grad(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad
