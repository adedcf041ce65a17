"""The images of the claims: random crops of photographs, few of them with a long tail, and digits
on photographs; all composed by seeded generators of what packages ship."""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from contrastive_kernels.demo.data import (
    LEAST_CONTRAST,
    PATCH,
    PHOTOGRAPHS,
    Augmentation,
    ImageSet,
    digits,
    photographs,
    sides,
)

TEST = 180  # test crops of each photograph
DIGIT = 12  # the side of a digit on a photograph of PATCH pixels
PLACES = 5  # in each direction
DIM = 0.6  # how bright a photograph is under a digit of brightness 1
FACTORS = ("digit", "place", "background")


class Crops:
    """All windows (PATCH, PATCH) with something to see of grey images (H, W), and their labels."""

    def __init__(self, images: list[Tensor]):
        starts, widths, labels, offset = [], [], [], 0
        for label, image in enumerate(images):
            mean, square = (F.avg_pool2d(x[None], PATCH, 1)[0] for x in (image, image.square()))
            row, column = (square - mean.square() > LEAST_CONTRAST**2).nonzero(as_tuple=True)
            starts.append(offset + row * image.shape[1] + column)
            widths.append(torch.full_like(row, image.shape[1]))
            labels.append(torch.full_like(row, label))
            offset += image.numel()
        self.pixels = torch.cat([image.flatten() for image in images])
        self.starts, self.widths, self.labels = map(torch.cat, (starts, widths, labels))

    def __len__(self) -> int:
        return len(self.starts)

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Random windows (count, 1, PATCH, PATCH) and their labels, all positions alike."""
        chosen = torch.randint(len(self), (count,), generator=generator)
        return self.at(chosen), self.labels[chosen]

    def of(self, labels: Tensor, generator: Generator) -> Tensor:
        """A random position (N,) of each of these labels (N,)."""
        counts = self.labels.bincount()
        first = counts.cumsum(0) - counts
        inside = torch.rand(len(labels), generator=generator, dtype=torch.float64)
        return first[labels] + (inside * counts[labels]).long()

    def at(self, chosen: Tensor) -> Tensor:
        """The windows (N, 1, PATCH, PATCH) at these positions (N,)."""
        step = torch.arange(PATCH)
        corner = self.starts[chosen, None, None]
        rows = self.widths[chosen, None, None] * step[:, None]
        return self.pixels[corner + rows + step][:, None]


@cache
def crops(side: str) -> Crops:
    """Those of the "left" sides of the photographs, to train on, or of the "right", to test on."""
    index = ("left", "right").index(side)
    return Crops([torch.from_numpy(sides(name)[index]) for name in PHOTOGRAPHS])


@cache
def scenes() -> ImageSet:
    """The demo's patches to fit classifiers on, and as test equally many crops of each photograph.

    Its augmentation makes the views of a training.
    """
    labels = torch.arange(len(PHOTOGRAPHS)).repeat_interleave(TEST)
    right = crops("right")
    test = right.at(right.of(labels, Generator().manual_seed(0)))
    return photographs(0)._replace(test=test, test_labels=labels.numpy())


def sizes(total: int, classes: int, ratio: float) -> list[int]:
    """How many of `total` images each class has; the first `ratio` times as many as the last, and
    between them exponentially fewer, as in long-tailed versions of data sets; at least one."""
    shares = ratio ** -(torch.arange(classes, dtype=torch.float64) / (classes - 1))
    counts = (total * shares / shares.sum()).round().long().clamp_min(1)
    counts[0] += total - counts.sum()
    return counts.tolist()


def few(total: int, ratio: float, seed: int) -> tuple[Tensor, Tensor]:
    """`total` training crops and their labels; a seed says which photograph is how rare."""
    generator = Generator().manual_seed(seed)
    order = torch.randperm(len(PHOTOGRAPHS), generator=generator)
    labels = order.repeat_interleave(torch.tensor(sizes(total, len(order), ratio)))
    left = crops("left")
    return left.at(left.of(labels, generator)), labels


def strength(augmentation: Augmentation, factor: float) -> Augmentation:
    """An augmentation that moves, scales, lights and disturbs `factor` times as much."""
    warp = augmentation.warp
    scaled = {
        name: factor * getattr(warp, name)
        for name in ("degrees", "scale", "shift", "shear", "elastic", "brightness", "contrast")
    }
    # a scale of 0 would be a point, and a negative one a mirror
    scaled["scale"] = min(scaled["scale"], 0.9)
    moved = warp._replace(**scaled, flip=warp.flip and factor > 0)
    return augmentation._replace(warp=moved, noise=factor * augmentation.noise)


class Scene(NamedTuple):
    """What images show, (N,) each: which digit, at which of the places, on which crop."""

    digit: Tensor
    place: Tensor
    background: Tensor


class Composed:
    """Digits on photographs, at one of 25 places. The `side` says which digits and crops."""

    def __init__(self, side: str):
        images = digits(0)
        train = side == "left"
        small = images.train if train else images.test
        self.digits = F.interpolate(
            small, (DIGIT, DIGIT), mode="bilinear", align_corners=False
        ).clamp(0, 1)
        self.classes = torch.from_numpy(images.train_labels if train else images.test_labels)
        self.crops = crops(side)

    def draw(self, count: int, generator: Generator) -> Scene:
        """Random scenes; all photographs are alike, and all positions in one."""
        photograph = torch.randint(len(PHOTOGRAPHS), (count,), generator=generator)
        return Scene(
            torch.randint(len(self.digits), (count,), generator=generator),
            torch.randint(PLACES**2, (count,), generator=generator),
            self.crops.of(photograph, generator),
        )

    def images(self, scene: Scene) -> Tensor:
        """The images (N, 1, PATCH, PATCH) of the scenes."""
        step = (PATCH - DIGIT) // (PLACES - 1)
        mask = torch.zeros(len(scene.digit), 1, PATCH, PATCH)
        ys, xs = scene.place // PLACES * step, scene.place % PLACES * step
        side = torch.arange(DIGIT)
        rows = (ys[:, None] + side)[:, :, None]
        columns = (xs[:, None] + side)[:, None, :]
        index = torch.arange(len(mask))[:, None, None]
        mask[index, 0, rows, columns] = self.digits[scene.digit, 0]
        return DIM * self.crops.at(scene.background) * (1 - mask) + mask

    def views(
        self, shared: Iterable[str], count: int, noise: float, generator: Generator
    ) -> list[Tensor]:
        """Two views of `count` scenes, which share these factors and draw the others again."""
        first, second = (self.draw(count, generator) for _ in range(2))
        second = second._replace(**{name: getattr(first, name) for name in shared})
        images = [self.images(scene) for scene in (first, second)]
        return [x + noise * torch.randn(x.shape, generator=generator) for x in images]

    def labels(self, scene: Scene) -> dict[str, np.ndarray]:
        """The class of each factor; of a background its photograph."""
        return {
            "digit": self.classes[scene.digit].numpy(),
            "place": scene.place.numpy(),
            "background": self.crops.labels[scene.background].numpy(),
        }
