"""Whitening as a layer, used as batch normalisation is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..autograd import precise
from ..checks import check_features, check_range
from ..distributed import world_size
from ..ops import full_precision
from ..types import known, statistics_dtype
from .dense import approximate_root, invert_cholesky, invert_root, shrink_diagonal
from .errors import check
from .whiten import METHODS, whiten


class Whitening(nn.Module):
    """Decorrelated batch normalisation (Huang et al. 2018): features with covariance I.

    y = W (x - mean), W C W^T = I, with C the covariance of the batch shrunk by `eps` towards I,
    and W made as `method` says (see `whiten`). In training the statistics are those of the batch,
    or of each `group_size` consecutive rows; running ones serve evaluation, as in BatchNorm.

    Args:
        num_features: D of inputs (N, D) or (N, D, ...); every position is a row then.
        group_size: rows whitened together in training, a divisor of their number; None: all.
        eps: shrinkage towards I, in [0, 1).
        momentum: weight of a new batch in the running statistics; None: the plain average.
        affine: learn a scale and a shift for each feature.
        track_running_stats: False: evaluation uses the statistics of its batch too.
        iterations: steps of method="newton_schulz".

    State: running_mean (D,), running_covariance (D, D) (unbiased, not shrunk) and
    num_batches_tracked. Results have the dtype of the input.

    Raises:
        ValueError: an input that does not fit, and groups that cannot be whitened, as `whiten`.
    """

    running_mean: Tensor | None
    running_covariance: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        group_size: int | None = None,
        method: str = "cholesky",
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = True,
        iterations: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if group_size is not None and group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {group_size}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1] or None, got {momentum}")
        check_range("eps", eps, 0.0, 1.0)
        self.num_features = num_features
        self.group_size = group_size
        self.method = method
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.iterations = iterations
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **like)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_features, **like)) if affine else None
        names = ("running_mean", "running_covariance", "num_batches_tracked")
        buffers: dict[str, Tensor | None] = dict.fromkeys(names)
        if track_running_stats:
            buffers = {
                "running_mean": torch.empty(num_features, **like),
                "running_covariance": torch.empty(num_features, num_features, **like),
                "num_batches_tracked": torch.empty((), dtype=torch.long, device=device),
            }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        # running covariance, its version, and the matrix made of them
        self._cached: tuple[Tensor, int, Tensor] | None = None
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget the batches seen: mean 0, covariance I."""
        if self.track_running_stats:
            known(self.running_mean).zero_()
            nn.init.eye_(known(self.running_covariance))
            known(self.num_batches_tracked).zero_()

    def reset_parameters(self) -> None:
        """As at construction: scale 1, shift 0, no batches seen."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(known(self.weight))
            nn.init.zeros_(known(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, D) or (N, D, ...), whitened; same shape and dtype."""
        check_features("x", x, (x.dim(),) if isinstance(x, Tensor) else ())
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"x must have shape (N, {self.num_features}, ...), got {tuple(x.shape)}"
            )
        moved = x.movedim(1, -1)
        rows = moved.reshape(-1, self.num_features).to(statistics_dtype(x))
        with full_precision(x):
            if self.training or not self.track_running_stats:
                z = self._whiten_batch(rows)
            else:
                mean = known(self.running_mean).to(rows.dtype)
                z = precise(torch.matmul)(rows - mean, self._running_matrix().to(rows.dtype).T)
            if self.affine:
                z = z * known(self.weight) + known(self.bias)
        return z.to(x.dtype).reshape(moved.shape).movedim(-1, 1)

    def _whiten_batch(self, rows: Tensor) -> Tensor:
        size = self.group_size or len(rows)
        if len(rows) % size != 0:
            raise ValueError(f"group_size must divide the {len(rows)} rows, got {size}")
        groups = rows.view(-1, size, self.num_features)
        z = whiten(groups, method=self.method, eps=self.eps, iterations=self.iterations)
        if self.training and self.track_running_stats:
            self._update(rows.detach())
        return z.view_as(rows)

    @torch.no_grad()
    def _update(self, rows: Tensor) -> None:
        mean = rows.mean(0)
        centered = rows - mean
        covariance = centered.T @ centered / (len(rows) - 1)
        seen = known(self.num_batches_tracked).add_(1)
        for running, new in (
            (known(self.running_mean), mean),
            (known(self.running_covariance), covariance),
        ):
            weight: float | Tensor | None = self.momentum
            if weight is None:
                weight = seen.to(running.dtype).reciprocal()
            running.lerp_(new.to(running.dtype), weight)

    def _running_matrix(self) -> Tensor:
        """W (D, D) of the running covariance, made anew when that has changed."""
        covariance = known(self.running_covariance)
        versioned = not (torch.compiler.is_compiling() or covariance.is_inference())
        # DistributedDataParallel writes into buffers and leaves their versions as they were
        if not versioned or world_size() > 1:
            return self._matrix(covariance)
        if self._cached is not None:
            of, version, matrix = self._cached
            if of is covariance and version == covariance._version:
                return matrix
        matrix = self._matrix(covariance)
        self._cached = (covariance, covariance._version, matrix)
        return matrix

    @torch.no_grad()
    def _matrix(self, covariance: Tensor) -> Tensor:
        batch = covariance.to(statistics_dtype(covariance))[None] * (1 - self.eps)
        batch = shrink_diagonal(batch, self.eps)
        if self.method == "cholesky":
            matrix, info = invert_cholesky(batch)
        elif self.method == "zca":
            matrix, info = invert_root(batch)
        else:
            matrix, info = approximate_root(batch, self.iterations)
        check(info)
        return matrix[0]

    def __getstate__(self) -> dict[str, Any]:
        # versions of a copy start anew
        return {**self.__dict__, "_cached": None}

    def extra_repr(self) -> str:
        names = (
            "group_size", "method", "eps", "momentum", "affine", "track_running_stats"
        )  # fmt: skip
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.num_features}, {options}"
