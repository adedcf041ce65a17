"""What a representation is worth: a linear probe with few labels, and nearest neighbours."""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from .data import ImageSet

LABELS_PER_CLASS = 10
DRAWS = 5


class Accuracy(NamedTuple):
    """Shares of the test images classified right, as they are and moved at random."""

    probe: float
    neighbours: float
    moved_probe: float
    moved_neighbours: float


def features(network: nn.Module | None, views: Tensor) -> np.ndarray:
    """The frozen features (N, F) of a network, or the raw pixels where there is none."""
    if network is None:
        return views.flatten(1).numpy()
    training = network.training
    network.eval()
    with torch.no_grad():
        result = network(views).numpy()
    network.train(training)
    return result


@threadpool_limits.wrap(limits=1)  # other trainings use the other cores
def evaluate(network: nn.Module | None, images: ImageSet, seed: int) -> Accuracy:
    """Fit on training images as they are, score on the test images as they are and moved.

    The probe is logistic regression on 10 labelled training images per class, the mean over 5
    draws of them; the 5 nearest neighbours by cosine are taken among all training images.
    """
    train = features(network, images.plain(images.train))
    labels = images.train_labels
    tests = [
        features(network, views) for views in (images.plain(images.test), images.moved_test(seed))
    ]

    scores = []
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        order = rng.permutation(len(labels))
        few = np.concatenate(
            [order[labels[order] == c][:LABELS_PER_CLASS] for c in np.unique(labels)]
        )
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        probe.fit(train[few], labels[few])
        scores.append([probe.score(test, images.test_labels) for test in tests])
    probes = np.mean(scores, axis=0)

    neighbours = make_pipeline(Normalizer(), KNeighborsClassifier(5)).fit(train, labels)
    knn = [neighbours.score(test, images.test_labels) for test in tests]
    return Accuracy(probes[0], knn[0], probes[1], knn[1])
