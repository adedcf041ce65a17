"""One trial: train an encoder without labels, then see what its features are worth."""

from typing import NamedTuple

import numpy as np

from .data import IMAGES
from .evaluate import Accuracy, evaluate, features
from .measure import LOSSES
from .processes import count_step
from .train import METHODS, train


class Outcome(NamedTuple):
    """What one training gave."""

    curve: list[float]  # the loss of every step
    accuracy: Accuracy
    moved: np.ndarray  # features (N, F) of the moved test images


def trial(images_name: str, loss: str, variant: str, steps: int, seed: int) -> Outcome:
    """Train with one loss, "fused" or "dense", on one set of images, and evaluate the encoder.

    Names and numbers go in and come out, for this runs in a process of its own.
    """
    images = IMAGES[images_name](seed)
    network, curve = train(
        images, METHODS[loss], LOSSES[variant], steps=steps, seed=seed, on_step=count_step
    )
    accuracy = evaluate(network, images, seed)
    return Outcome(curve, accuracy, features(network, images.moved_test(seed)))
