"""What is measured of a trained encoder."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from contrastive_kernels.demo.evaluate import evaluate, features

from .data import scenes


def accuracy(encoder: nn.Module | None) -> dict[str, float]:
    """Nearest neighbours and linear probe on crops of the photographs; the same labels for all."""
    scores = evaluate(encoder, scenes(), seed=0)
    return {name: float(getattr(scores, name)) for name in ("neighbours", "probe")}


@threadpool_limits.wrap(limits=1)
def probe(
    encoder: nn.Module,
    images: tuple[Tensor, Tensor],
    labels: tuple[np.ndarray, np.ndarray],
) -> float:
    """The accuracy of logistic regression on frozen features: fit on the first, scored on the
    second images."""
    train, test = (features(encoder, each) for each in images)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    return float(model.fit(train, labels[0]).score(test, labels[1]))


def spectrum(values: Tensor) -> list[float]:
    """The eigenvalues of the covariance of (N, D) features as shares of their sum, descending."""
    centred = (values - values.mean(0)).double()
    eigenvalues = torch.linalg.svdvals(centred).square()
    return (eigenvalues / eigenvalues.sum().clamp_min(1e-30)).tolist()


def effective_rank(shares: list[float]) -> float:
    """exp of the entropy of the spectrum (Roy and Vetterli 2007): D where it is flat, 1 of a
    line."""
    p = torch.tensor(shares, dtype=torch.float64)
    return torch.special.entr(p).sum().exp().item()


class Pull(NamedTuple):
    """The gradient of the loss of a query with respect to the unit query, over random negatives."""

    length: float  # of its expectation, as the root mean square over the queries
    noise: float  # the share of its mean square that is variance over the draws of the negatives


def pull(loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, draws: list[Tensor]) -> Pull:
    """Of a loss (N,) of unit queries (N, D) and negatives, from each draw (K, D) of these; at least
    two draws."""
    query = query.detach().requires_grad_()
    with torch.enable_grad():
        losses = (loss(query, negatives).sum() for negatives in draws)
        gradients = torch.stack([torch.autograd.grad(value, query)[0] for value in losses])
    square = gradients.square().sum(2).mean()
    # |E g|^2 = E |g|^2 - var g: the square of the mean of a few draws would be too large
    variance = gradients.var(0).sum(1).mean()
    return Pull((square - variance).clamp(min=0).sqrt().item(), (variance / square).item())
