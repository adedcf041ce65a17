"""One training, and the networks of the claims."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from contrastive_kernels.demo.data import ImageSet
from contrastive_kernels.demo.processes import count_step
from contrastive_kernels.demo.train import encoder, head

WIDTH = 16
DIM = 32
WARM_UP = 0.1  # of the steps
POINTS = 20  # of a curve that is kept


def network(seed: int) -> nn.Sequential:
    """An encoder of crops and a head, which is thrown away after training."""
    torch.manual_seed(seed)
    return nn.Sequential(encoder(WIDTH), head(DIM, WIDTH))


def coarse_network(seed: int) -> nn.Sequential:
    """The same with larger strides, for images of 24 pixels: an encoder half as dear."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = [1, WIDTH, 2 * WIDTH, 4 * WIDTH]
    for inputs, outputs in zip(channels, channels[1:], strict=False):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.SiLU()]
    pooled = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(pooled, head(DIM, WIDTH))


class Views:
    """Embeddings of random views of images, by a network in training."""

    def __init__(self, net: nn.Module, images: ImageSet, generator: Generator):
        self.net, self.images, self.generator = net, images, generator

    def __call__(self, images: Tensor, count: int) -> Tensor:
        """(count, N, D) of `count` views of each image."""
        views = [self.images.view(images, self.generator) for _ in range(count)]
        return self.net(torch.cat(views)).view(count, len(images), -1)


def fit(
    loss: Callable[[], Tensor],
    net: nn.Module,
    *,
    steps: int,
    rate: float,
    sgd: bool = False,
    after: Callable[[], None] | None = None,
) -> list[float]:
    """Trains with a linear warm-up and a cosine; the means of the loss over twenty parts.

    Args:
        rate: the peak of the learning rate.
        sgd: with momentum 0.9 and weight decay 1e-4, as EqCo's paper; else AdamW, as the demo.
        after: what follows each step.
    """
    parameters = list(net.parameters())
    if sgd:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameters, lr=rate, momentum=0.9, weight_decay=1e-4
        )
    else:
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, steps))
    values = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if after is not None:
            after()
        count_step()  # where a run is stopped, its trainings end too
        values.append(value.item())
    return curve(values)


def factor(step: int, steps: int) -> float:
    """Of the peak rate, at a step."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def curve(values: list[float]) -> list[float]:
    """Their means over POINTS parts, fewer of fewer values; rounded, since they are for the eye."""
    parts = torch.tensor(values).tensor_split(min(POINTS, len(values)))
    return [round(part.mean().item(), 4) for part in parts]


def key_network(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """slow = momentum slow + (1 - momentum) fast, of the parameters."""
    for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
        a.lerp_(b, 1 - momentum)
