"""Encoders trained with any number of negatives, and the gradients that the number makes.

Queries come from a batch, negatives are drawn from one queue of keys that is equally long in every
training, so that their number changes neither the batch nor the age of the keys.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import contrastive_kernels as ck
from contrastive_kernels.demo.data import PHOTOGRAPHS, ImageSet, photographs
from contrastive_kernels.demo.train import Method, Run, fit

from ..claims import probe
from ..claims.data import Crops, crops
from ..claims.probe import Pull

BATCH = 64
DIM = 32
WIDTH = 16
FRESH = 512  # keys that enter the queue each step: the batch's, and those of further patches
QUERIES = 256  # of a measured gradient
FILL = 2048  # keys per pass while the queue is filled
POSITIVES = {"InfoNCE": 1, "EqCo": 1, "CACR": 4}
TEMPERATURE = 0.2
ALPHA = 65536.0
T_NEG = 2.0
TEST = 2000


def loss_of(name: str, query: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
    """A loss (N,) of queries (N, D), positives (P, N, D) and shared negatives (K, D)."""
    shared = {"negatives": negatives, "reduction": "none"}
    match name:
        case "InfoNCE":
            return ck.info_nce(query, keys[0], temperature=TEMPERATURE, **shared)
        case "EqCo":
            return ck.eqco(query, keys[0], temperature=TEMPERATURE, alpha=ALPHA, **shared)
        case "CACR":
            # the weights are constants, as in the official code with a queue
            positives = keys.transpose(0, 1)
            return ck.cacr(query, positives, t_neg=T_NEG, detach_weights=True, **shared)
    raise ValueError(f"name must be one of {', '.join(POSITIVES)}, got {name}")


class Scenes(NamedTuple):
    """Training crops of the left sides of the photographs, and what the encoders are tested on."""

    crops: Crops
    images: ImageSet


def scenes() -> Scenes:
    """The demo's patches to fit the classifiers on, and random crops of the right sides as test."""
    test, labels = crops("right").draw(TEST, Generator().manual_seed(0))
    images = photographs(0)._replace(test=test, test_labels=labels.numpy())
    return Scenes(crops("left"), images)


class CropRun(Run):
    """A run on random crops."""

    def __init__(self, scenes: Scenes, method: Method, seed: int):
        super().__init__(scenes.images, method, ck, seed)
        self.crops = scenes.crops

    def draw(self, extra: int = 0) -> Tensor:
        return self.crops.draw(self.method.batch + extra, self.generator)[0]

    def negatives(self, count: int) -> Tensor:
        """`count` rows of the queue, each at most once."""
        rows = self.queue.negatives
        return rows[torch.randperm(len(rows), generator=self.generator)[:count]]

    def keys_of(self, images: Tensor, positives: int) -> tuple[Tensor, Tensor]:
        """Positives (P, N, D) of the first N images, the batch, and the keys to remember."""
        n = self.method.batch
        keys = self.keys(torch.cat([images, images[:n].repeat(positives - 1, 1, 1, 1)]))
        fresh, further = keys.split([len(images), len(keys) - len(images)])
        return torch.cat([fresh[:n], further]).view(positives, n, -1), fresh


def contrastive(name: str, count: int, queue: int) -> Method:
    """Training with `count` negatives out of a queue."""

    def loss(run: CropRun) -> tuple[Tensor, Tensor]:
        images = run.draw(FRESH - BATCH)
        positives, fresh = run.keys_of(images, POSITIVES[name])
        (query,) = run.views(images[:BATCH], 1)
        return loss_of(name, query, positives, run.negatives(count)).mean(), fresh

    return Method(loss, BATCH, DIM, key_encoder=True, queue=queue, width=WIDTH)


def _cross_entropy(run: CropRun) -> tuple[Tensor, None]:
    images, labels = run.crops.draw(BATCH, run.generator)
    (logits,) = run.views(images, 1)
    return F.cross_entropy(logits, labels), None


SUPERVISED = Method(_cross_entropy, BATCH, dim=len(PHOTOGRAPHS), width=WIDTH)


def supervised(scenes: Scenes, seed: int, steps: int) -> torch.nn.Module:
    """The encoder trained with the labels of the crops."""
    run = CropRun(scenes, SUPERVISED, seed)
    fit(run, steps, lambda: None)
    return run.network[0]


def filled(scenes: Scenes, seed: int, queue: int) -> CropRun:
    """A run that has not begun; its queue is full of keys of the encoder as it starts."""
    run = CropRun(scenes, contrastive("InfoNCE", 1, queue), seed)
    for _ in range(queue // FILL):
        run.queue.enqueue(run.keys(scenes.crops.draw(FILL, run.generator)[0]))
    return run


def begun(start: CropRun, name: str, count: int) -> CropRun:
    """A copy of `start`, to be trained with a loss; all copies see the same images."""
    run = copy.copy(start)
    for part in ("network", "key_network", "queue"):
        setattr(run, part, copy.deepcopy(getattr(start, part)))
    run.generator = start.generator.clone_state()
    run.method = contrastive(name, count, len(start.queue.negatives))
    return run


@torch.no_grad()
def pulls(run: CropRun, counts: Iterable[int], draws: int) -> Iterator[tuple[int, str, Pull]]:
    """Of every number and loss, on the same queries and with the same draws from the queue."""
    run.method = run.method._replace(batch=QUERIES)
    images = run.draw()
    positives, _ = run.keys_of(images, max(POSITIVES.values()))
    query = F.normalize(run.views(images, 1)[0], dim=1)
    for count in counts:
        negatives = [run.negatives(count) for _ in range(draws)]
        for name, keys in POSITIVES.items():
            yield count, name, pull(name, query, positives[:keys], negatives)


def pull(name: str, query: Tensor, keys: Tensor, draws: list[Tensor]) -> Pull:
    """Of one loss, from each draw (K, D) of the negatives; at least two draws."""
    return probe.pull(lambda query, negatives: loss_of(name, query, keys, negatives), query, draws)
