"""The operands of a sweep as one record, and what runs it where all of them are at hand: the dense
reference, always without autocast, or the registered operators.

The functions ending in `_backward` are for who does the work of autograd by hand, block by block:
`stats` and their gradients are those of whole rows and columns, of which the block has a part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from .. import reference
from ..autograd import in_forward_mode, precise
from ..distributed.shards import Batch
from ..sources import NegativeSource
from ..types import Counts, IdPair, OwnKeys, SoftplusSweep, Sweep, known, statistics_dtype
from . import registration

# the bias (m,), without gradient, of a chunk of keys (m, D) when it comes; None: 0
KeyBias: TypeAlias = Callable[[Tensor], Tensor | None]


class Part(NamedTuple):
    """A part of features, along their first axis."""

    of: Tensor
    where: int | slice

    @property
    def features(self) -> Tensor:
        return self.of[self.where]


class Pairs(NamedTuple):
    """z_ij = scale <x_i, y_j> + bias_j over the pairs that are kept.

    x (N, D); y (M, D), (N, M, D), `OwnKeys`, in chunks, or None: x itself, in a matrix that is
    symmetric, so that there is no bias and rows have the ids of columns. scale 0-d, bias (M,) or
    None, where y is in chunks, `OwnKeys` or on several ranks also 0-d; with `OwnKeys` (T, D) bias
    and column ids are of these T, and a bias (N, 1) is one of the rows. Both of
    `statistics_dtype(x)`. exclude, keep: ids of
    rows and columns; pairs with equal `exclude` ids are dropped, only equal `keep` ids stay.
    backend: a resolved one. batch: whose rows y are, where ranks share them. together: the rows are
    those of x and then those of y (M, D), in a symmetric matrix as if y were None. aligned: the
    sweep also gives the logits of the rows of x and y that belong together. chunk_bias: with y in
    chunks, what makes the bias. x_part, y_part: what x and y are a part of. ends: statistics are
    those of every prefix of the features that ends there; see `nested.py`.
    """

    x: Tensor
    y: Tensor | NegativeSource | OwnKeys | None
    scale: Tensor
    bias: Tensor | None = None
    exclude: IdPair | None = None
    keep: IdPair | None = None
    normalize: bool = False
    backend: str = "reference"
    batch: Batch | None = None
    together: bool = False
    aligned: bool = False
    chunk_bias: KeyBias | None = None
    x_part: Part | None = None
    y_part: Part | None = None
    ends: tuple[int, ...] | None = None

    @property
    def keys(self) -> Tensor | NegativeSource | OwnKeys:
        return self.x if self.y is None else self.y

    @property
    def tensor(self) -> Tensor | None:
        """y, where it is known not to come in chunks."""
        return cast("Tensor | None", self.y)


FORWARD_PAIRS = 2**20  # of a block of rows in forward mode


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    y: bool
    scale: bool
    bias: bool


class Gradients(NamedTuple):
    """Those of the operands; what was not asked for is None or empty."""

    x: Tensor | None = None
    y: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast off: what a half input gains is speed, and the primitives compute in float32."""
    return torch.autocast(x.device.type, enabled=False)


def operand_dtype(backend: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the operators of Triton make of features under autocast; of the others as they are."""
    if backend != "triton" or dtype == torch.float64:
        return dtype
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else dtype


def softmax(
    pairs: Pairs,
    *,
    mean: bool = False,
    columns: bool = False,
    threshold: Tensor | None = None,
    attend: bool = False,
) -> Sweep:
    """Softmax statistics of tensors; `attend` as the operators take it."""
    if pairs.backend == "reference":
        return _dense_softmax(pairs, mean=mean, columns=columns, threshold=threshold)
    if columns and pairs.y is None:
        pairs = pairs._replace(y=pairs.x)
    out = registration.call(
        "row_stats", pairs.backend, **shared_arguments(pairs), threshold=threshold, mean=mean,
        normalize=pairs.normalize, columns=columns, attend=attend, together=pairs.together,
        aligned=pairs.aligned,
    )  # fmt: skip
    return Sweep(
        lse=out.lse,
        mean=out.mean if mean else None,
        col_lse=out.col_lse if columns else None,
        col_mean=out.col_mean if columns and mean else None,
        counts=None if threshold is None else Counts(out.rank, out.total, out.count),
        attended=out.attended if attend else None,
        slope=out.slope if attend else None,
        lse_low=out.lse_low,
        col_lse_low=out.col_lse_low if columns else None,
        mean_low=out.mean_low if mean else None,
        col_mean_low=out.col_mean_low if columns and mean else None,
        partner=out.partner if pairs.aligned else None,
    )


def softplus(
    pairs: Pairs, *, threshold: Tensor | None = None, attend: Needs | None = None
) -> SoftplusSweep:
    """Row sums of softplus; with `attend` their sum, 0-d, with these gradients made on the way."""
    if pairs.backend == "reference":
        parts = [
            precise(reference.softplus_sweep)(
                block.x, block.tensor, scale=block.scale, bias=block.bias, exclude=block.exclude,
                keep=block.keep, normalize=block.normalize, threshold=level,
            )
            for block, level in _row_blocks(pairs, threshold)
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else _below(parts)
    out = registration.call(
        "row_softplus", pairs.backend, **shared_arguments(pairs._replace(y=pairs.keys)),
        threshold=threshold, normalize=pairs.normalize, attend=list(attend or 4 * (False,)),
        aligned=pairs.aligned,
    )  # fmt: skip
    partner = out.partner if pairs.aligned else None
    counts = None if threshold is None else Counts(out.rank, out.total, out.count)
    return SoftplusSweep(out.value, counts, partner)


def _dense_softmax(pairs: Pairs, *, mean: bool, columns: bool, threshold: Tensor | None) -> Sweep:
    def of(block: Pairs, columns: bool, threshold: Tensor | None) -> Sweep:
        return precise(reference.sweep)(
            block.x, block.tensor, scale=block.scale, bias=block.bias, exclude=block.exclude,
            keep=block.keep, normalize=block.normalize, mean=mean, columns=columns,
            threshold=threshold,
        )  # fmt: skip

    blocks = _row_blocks(pairs, threshold)
    if len(blocks) == 1:
        return of(pairs, columns, threshold)
    out = _below([of(block, False, level) for block, level in blocks])
    if not columns:
        return out
    # Whole columns: parts of one, with weights exp(lse - lse), would be off by as much as logits
    # are rounded.
    whole = _below([of(block, True, None) for block in _column_blocks(pairs)])
    return out._replace(col_lse=whole.col_lse, col_mean=whole.col_mean)


def _row_blocks(pairs: Pairs, threshold: Tensor | None) -> list[tuple[Pairs, Tensor | None]]:
    """All pairs, with the threshold; or, in forward mode, which keeps no block for later, blocks of
    rows of a bounded number of pairs."""
    n, m = pairs.x.shape[0], cast(Tensor, pairs.keys).shape[-2]
    size = max(1, FORWARD_PAIRS // max(1, m))
    if n <= size or not in_forward_mode():
        return [(pairs, threshold)]
    y = cast(Tensor, pairs.keys)

    def of(ids: IdPair | None, rows: slice) -> IdPair | None:
        return None if ids is None else (ids[0][rows], ids[1])

    return [
        (
            pairs._replace(
                x=pairs.x[rows], y=y[rows] if y.dim() == 3 else y,
                exclude=of(pairs.exclude, rows), keep=of(pairs.keep, rows),
            ),
            None if threshold is None else threshold[rows],
        )
        for rows in (slice(i, i + size) for i in range(0, n, size))
    ]  # fmt: skip


def _column_blocks(pairs: Pairs) -> list[Pairs]:
    """Likewise of columns."""
    y = cast(Tensor, pairs.keys)
    size = max(1, FORWARD_PAIRS // max(1, pairs.x.shape[0]))

    def of(ids: IdPair | None, columns: slice) -> IdPair | None:
        return None if ids is None else (ids[0], ids[1][columns])

    return [
        pairs._replace(
            y=y[columns], bias=None if pairs.bias is None else pairs.bias[columns],
            exclude=of(pairs.exclude, columns), keep=of(pairs.keep, columns),
        )
        for columns in (slice(i, i + size) for i in range(0, y.shape[0], size))
    ]  # fmt: skip


def _below(parts: list[Any]) -> Any:
    """Records of tensors of rows as one."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(parts)
    return type(first)(*(_below(list(each)) for each in zip(*parts, strict=True)))


def row_dot(
    x: Tensor, y: Tensor, *, ends: Tensor | None = None, normalize: bool = False, backend: str
) -> Tensor:
    """<x_i, y_i> for y (N, D), giving (N,), or <x_i, y_ik> for y (N, K, D), giving (N, K).

    With `ends` (N,), int64, the keys of row i are those of y (T, D) from ends_(i-1) to ends_i, and
    the result is (T,). With `normalize` every row is first divided by its norm (at least 1e-12).
    The result is float32, or float64 for float64 features. A rank may have no rows. `backend` is a
    resolved one.
    """
    if x.shape[0] == 0 or y.shape[0] == 0:  # the graph of the other ranks, with no rows
        x = x.view(0, *(y.dim() - 2) * (1,), x.shape[1]) if ends is None else x[:0]
        return (x * y).sum(-1, dtype=statistics_dtype(x))
    if backend == "reference":
        return precise(reference.row_dot)(x, y, normalize=normalize)
    if y.dim() == 3 or ends is not None:
        return registration.row_dot(backend, x, y, normalize, ends)
    return registration.row_dot(backend, x, y.unsqueeze(1), normalize).squeeze(1)


def softmax_backward(
    pairs: Pairs,
    stats: Sweep,
    grads: Sweep,
    needs: Needs,
    into: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Gradients:
    """The gradients of the operands from those of (lse, mean, col_lse, col_mean, partner); `into`
    as `registration.row_stats_backward` takes it, by a registered operator alone."""
    if pairs.backend == "reference":
        return _dense_backward(pairs, stats, grads, needs)
    empty = pairs.x.new_empty(0, dtype=statistics_dtype(pairs.x))
    given = {
        name: empty if (t := getattr(stats, name)) is None else t
        for name in (
            "lse", "mean", "col_lse", "col_mean", "attended", "slope", "lse_low", "col_lse_low"
        )
    }  # fmt: skip
    out = registration.row_stats_backward(
        pairs.backend, **shared_arguments(pairs), **given, mean_low=stats.mean_low,
        col_mean_low=stats.col_mean_low, grad_lse=grads.lse, grad_mean=grads.mean,
        grad_col_lse=grads.col_lse, grad_col_mean=grads.col_mean, grad_partner=grads.partner,
        normalize=pairs.normalize, needs=list(needs), together=pairs.together, into=into,
    )  # fmt: skip
    return Gradients(*out)


def softplus_backward(pairs: Pairs, grad: Tensor, needs: Needs) -> Gradients:
    """The gradients of the operands from that of the value."""
    if pairs.backend == "reference":
        return _dense_backward(pairs, None, grad, needs)
    out = registration.call(
        "row_softplus_backward", pairs.backend, **shared_arguments(pairs), low=None, grad=grad,
        grad_partner=None, normalize=pairs.normalize, needs=list(needs),
    )  # fmt: skip
    return Gradients(*out)


def exact(high: Tensor, low: Tensor | None) -> Tensor:
    """A statistic in float64, with what its rounding took."""
    return high.double() if low is None else high.double() + low


def rounded(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a statistic in `dtype`, what rounding takes from it)."""
    high = exact.clone(memory_format=torch.contiguous_format).to(dtype)
    return high, (exact - high).nan_to_num(0.0).to(dtype)  # -inf - -inf of a row without a pair


def merge(a: Tensor, b: Tensor) -> Tensor:
    """Statistics (K, 1 + C) of two sets of pairs as those of their union: lse, and C means with the
    weights exp(z - lse)."""
    lse = torch.logaddexp(a[:, :1], b[:, :1])
    finite = lse.masked_fill(lse == -torch.inf, 0.0)  # no pair at all: means stay 0
    share = (torch.minimum(a[:, :1], b[:, :1]) - finite).exp()
    more, less = (torch.where(b[:, :1] > a[:, :1], *pair)[:, 1:] for pair in ((b, a), (a, b)))
    # shares of the means themselves would not add up to 1 as exactly as large means need
    return torch.cat((lse, more + share * (less - more)), 1)


def shared_arguments(pairs: Pairs) -> dict[str, Any]:
    """The arguments that all operators on pairs share."""
    exclude, keep = pairs.exclude or (None, None), pairs.keep or (None, None)
    one_side = pairs.y is None or pairs.together  # one set of ids serves rows and columns
    return {
        "x": pairs.x, "y": pairs.y, "scale": pairs.scale, "bias": pairs.bias,
        "exclude_rows": exclude[0], "exclude_cols": None if one_side else exclude[1],
        "keep_rows": keep[0], "keep_cols": None if one_side else keep[1],
    }  # fmt: skip


def _dense_backward(
    pairs: Pairs, stats: Sweep | None, grads: Sweep | Tensor, needs: Needs
) -> Gradients:
    operands = {"x": pairs.x, "y": pairs.tensor, "scale": pairs.scale, "bias": pairs.bias}
    leaves: dict[str, Any] = {k: t if t is None else t.detach() for k, t in operands.items()}
    wanted = {name: leaves[name].requires_grad_() for name in leaves if getattr(needs, name)}
    with torch.enable_grad():
        block = pairs._replace(**leaves)
        if isinstance(grads, Tensor):
            given = [(softplus(block).value, grads)]
        else:
            stats = known(stats)
            exact_mean = registration.exact_mean
            out = softmax(block, mean=grads.mean is not None, columns=grads.col_lse is not None)
            given = [
                *_shares(
                    out.lse, out.mean, stats.lse, stats.lse_low, stats.mean,
                    exact_mean(grads.lse, grads.mean, stats.mean_low), grads.mean,
                ),
                *_shares(
                    out.col_lse, out.col_mean, stats.col_lse, stats.col_lse_low, stats.col_mean,
                    exact_mean(grads.col_lse, grads.col_mean, stats.col_mean_low), grads.col_mean,
                ),
            ]  # fmt: skip
    outputs, upstream = zip(*given, strict=True)
    found = torch.autograd.grad(outputs, list(wanted.values()), upstream, materialize_grads=True)
    return Gradients(**dict(zip(wanted, found, strict=True)))


def _shares(
    lse: Tensor | None,
    mean: Tensor | None,
    whole_lse: Tensor | None,
    whole_lse_low: Tensor | None,
    whole_mean: Tensor | None,
    grad_lse: Tensor | None,
    grad_mean: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """(output, its gradient) of the lse and mean of a part of each row, from those of the whole."""
    if grad_lse is None:
        return []
    lse, whole = known(lse), exact(known(whole_lse), whole_lse_low)
    share = (lse.detach() - whole.masked_fill(whole == -torch.inf, 0.0)).exp().to(lse.dtype)
    if mean is None or grad_mean is None or whole_mean is None:
        return [(lse, share * grad_lse)]
    rest = grad_lse + grad_mean * (mean.detach() - whole_mean)
    return [(lse, share * rest), (mean, share * grad_mean)]
