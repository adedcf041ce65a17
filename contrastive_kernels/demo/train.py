"""The encoder, and one training per loss: the same for the fused and for the dense loss."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

import contrastive_kernels as ck

from .data import ImageSet

WIDTH = 32  # channels of the first convolution
MOMENTUM = 0.99  # of the key encoder, per step
QUEUE = 512  # keys that info_nce remembers
FEW = 16  # negatives of eqco


class Method(NamedTuple):
    """How one loss is trained: images per step, size of its embeddings, and its loss of one step.

    `loss` takes a `Run` and returns the loss and the keys that the queue takes after backward.
    """

    loss: Callable[["Run"], tuple[Tensor, Tensor | None]]
    batch: int = 256
    dim: int = 64
    key_encoder: bool = False
    queue: int = QUEUE
    width: int = WIDTH


def encoder(width: int = WIDTH) -> nn.Sequential:
    """Three convolutions and a mean over the pixels: images (N, 1, S, S) to (N, 4 width) features.

    SiLU, not ReLU: at a kink the last bit of a number decides about a whole gradient, so that after
    a hundred steps no two float32 trainings would be alike, whatever their loss is computed with.
    """
    layers: list[nn.Module] = []
    for inputs, outputs, stride in [
        (1, width, 1),
        (width, 2 * width, 2),
        (2 * width, 4 * width, 2),
    ]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def head(dim: int, width: int = WIDTH) -> nn.Sequential:
    """Features to the embeddings that the loss compares; thrown away after training."""
    features = 4 * width
    hidden = nn.Linear(features, features, bias=False)
    return nn.Sequential(hidden, nn.BatchNorm1d(features), nn.SiLU(), nn.Linear(features, dim))


class Run:
    """What a step has at hand: the networks, the queue, random views, and where losses come from.

    `losses` is the package itself (fused) or `contrastive_kernels.reference` (dense).
    """

    def __init__(self, images: ImageSet, method: Method, losses: ModuleType, seed: int):
        torch.manual_seed(seed)
        self.images = images
        self.method = method
        self.losses = losses
        self.generator = Generator().manual_seed(seed)
        self.network = nn.Sequential(encoder(method.width), head(method.dim, method.width))
        self.key_network = copy.deepcopy(self.network) if method.key_encoder else None
        self.queue = ck.FeatureQueue(method.queue, method.dim)

    def draw(self, extra: int = 0) -> Tensor:
        """The images of one step, all different, `extra` more than the batch."""
        order = torch.randperm(len(self.images.train), generator=self.generator)
        return self.images.train[order[: self.method.batch + extra]]

    def views(self, images: Tensor, count: int) -> Tensor:
        """Embeddings (count, N, D) of `count` random views of each image."""
        views = [self.images.view(images, self.generator) for _ in range(count)]
        return self.network(torch.cat(views)).view(count, len(images), -1)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Embeddings (N, D) of one random view by the key encoder, a slow average of the other."""
        if self.key_network is None:
            raise ValueError("this method has no key encoder")
        for slow, fast in zip(
            self.key_network.parameters(), self.network.parameters(), strict=True
        ):
            slow.lerp_(fast, 1 - MOMENTUM)
        return self.key_network(self.images.view(images, self.generator))


def _nt_xent(run: Run) -> tuple[Tensor, None]:
    z1, z2 = run.views(run.draw(), 2)
    return run.losses.nt_xent(z1, z2, temperature=0.2), None


def _info_nce(run: Run) -> tuple[Tensor, Tensor]:
    images = run.draw()
    keys = run.keys(images)
    (query,) = run.views(images, 1)
    negatives = run.queue.negatives
    return run.losses.info_nce(query, keys, negatives=negatives, temperature=0.2), keys


def _eqco(run: Run) -> tuple[Tensor, None]:
    # The negatives are keys of further images, so that none of them shows the query's image; alpha
    # makes these few count like a whole queue.
    images = run.draw(extra=FEW)
    keys, negatives = run.keys(images).split([run.method.batch, FEW])
    (query,) = run.views(images[: run.method.batch], 1)
    return run.losses.eqco(query, keys, negatives=negatives, alpha=QUEUE, temperature=0.2), None


def _cacr(run: Run) -> tuple[Tensor, None]:
    query, *positives = run.views(run.draw(), 5)
    return run.losses.cacr(query, torch.stack(positives, 1), t_neg=2.0), None


def _w_mse(run: Run) -> tuple[Tensor, None]:
    views = run.views(run.draw(), 2)
    return run.losses.w_mse(views, group_size=128, generator=run.generator), None


METHODS = {
    "nt_xent": Method(_nt_xent),
    "info_nce": Method(_info_nce, key_encoder=True),
    "eqco": Method(_eqco, key_encoder=True),
    "cacr": Method(_cacr, batch=128),
    "w_mse": Method(_w_mse, dim=32),
}


def train(
    images: ImageSet,
    method: Method,
    losses: ModuleType,
    *,
    steps: int,
    seed: int,
    on_step: Callable[[], None],
) -> tuple[nn.Module, list[float]]:
    """The encoder trained without labels, and the loss of every step.

    Equal seeds give equal networks, batches and views.
    """
    run = Run(images, method, losses, seed)
    return run.network[0], fit(run, steps, on_step)


def fit(run: Run, steps: int, on_step: Callable[[], None]) -> list[float]:
    """Train the network of a run; the loss of every step."""
    peak_rate = 5e-3
    # With the usual eps of 1e-8, a gradient that is nothing but rounding moves its weight as far as
    # a real one, and two float32 trainings part.
    optimizer = torch.optim.AdamW(
        run.network.parameters(), lr=peak_rate, weight_decay=1e-4, eps=1e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_rate, total_steps=steps, cycle_momentum=False
    )
    curve = []
    for _ in range(steps):
        loss, keys = run.method.loss(run)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if keys is not None:
            run.queue.enqueue(keys)
        curve.append(loss.item())
        on_step()
    return curve


def untrained(images: ImageSet, seed: int, width: int = WIDTH) -> nn.Module:
    """The encoder as it starts, with batch norm statistics of the training images."""
    torch.manual_seed(seed)
    network = encoder(width)
    with torch.no_grad():
        for batch in images.plain(images.train).split(256):
            network(batch)
    return network
