"""What passes between the layers: dtypes, ids, groups, and what sweeps and losses return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = ProcessGroup | DeviceMesh | str  # a name: "world"
else:
    Group = Any

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

IdPair = tuple[Tensor, Tensor]  # integers: of the rows (N,), of the columns (M,)


T = TypeVar("T")


def known(value: T | None) -> T:
    """`value`, for who has asked for it, so that it is there."""
    assert value is not None
    return value


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 features, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class OwnKeys(NamedTuple):
    """Keys that each row has for itself, not as many as the other rows.

    keys (N, M, D), of which those count where mask (N, M) is True; or keys (T, D), of which the
    next counts_i are those of row i, counts (N,) being int64.
    """

    keys: Tensor
    mask: Tensor | None = None
    counts: Tensor | None = None


class RowStats(NamedTuple):
    """Softmax statistics of each row: lse (N,), mean (N,)."""

    lse: Tensor
    mean: Tensor


class RowColumnStats(NamedTuple):
    """Softmax statistics of each row (N,) and of each column (M,)."""

    lse: Tensor
    mean: Tensor
    col_lse: Tensor
    col_mean: Tensor


class Counts(NamedTuple):
    """What a sweep counts for a threshold, of each row (N,), without gradient.

    rank: the number of logits above the threshold, NaN included, as all are where that is NaN;
    total, pairs: the sum and the number of all.
    """

    rank: Tensor
    total: Tensor
    pairs: Tensor


class Sweep(NamedTuple):
    """What one sweep over a similarity matrix gives; what was not asked for is None.

    lse, mean and counts have one entry per row, col_lse and col_mean one per column; partner, of
    `aligned` operands, the logit of each row and its partner. attended (N, D), slope (N,), and
    lse_low, col_lse_low, mean_low and col_mean_low, what rounding took, are what a forward sweep
    leaves to its backward: see `ops/schemas.py`.
    """

    lse: Tensor
    mean: Tensor | None = None
    col_lse: Tensor | None = None
    col_mean: Tensor | None = None
    counts: Counts | None = None
    attended: Tensor | None = None
    slope: Tensor | None = None
    lse_low: Tensor | None = None
    col_lse_low: Tensor | None = None
    mean_low: Tensor | None = None
    col_mean_low: Tensor | None = None
    partner: Tensor | None = None


class SoftplusSweep(NamedTuple):
    """Row sums of softplus, with the same optional counts and partner as `Sweep`."""

    value: Tensor
    counts: Counts | None = None
    partner: Tensor | None = None


class TopK(NamedTuple):
    """The k largest products of each row (N, k), and their keys (N, k), int64."""

    values: Tensor
    ids: Tensor


class HardNegatives(NamedTuple):
    """Keys that are negatives of each query (N, K), int64, their scores (N, K), and those of its
    positives."""

    ids: Tensor
    scores: Tensor
    positive_scores: Tensor


class LossStats(NamedTuple):
    """Free statistics of a loss, all detached; None where a loss has no such number.

    A mean over pairs is nan when there is no such pair.

    accuracy: share of rows whose positive ranks first (0-d): of rank 0, and not NaN.
    rank: number of negatives with a logit above the positive's, for each row, int64. Ties do not
        count: a negative equal to the positive, or above it by no more than two such products may
        differ through rounding, (D / 2 + 8) eps |scale| |x| |y| (eps of `lse`'s dtype, |x| = |y| =
        1 for normalised features; and 2^-9 |scale| |x| |y| where products are of TF32). NaN counts
        as above everything, and everything as above NaN.
    positive_similarity, negative_similarity: mean similarity of the pairs (0-d).
    lse: log of the denominator of each row, EqCo margin included.
    mi_lower_bound: log(K + 1) - loss in nats (0-d), only for losses that are a bound of the mutual
        information.
    """

    accuracy: Tensor | None = None
    rank: Tensor | None = None
    positive_similarity: Tensor | None = None
    negative_similarity: Tensor | None = None
    lse: Tensor | None = None
    mi_lower_bound: Tensor | None = None


Loss: TypeAlias = Tensor | tuple[Tensor, LossStats]
