"""The images: digits and photographs that come inside scikit-learn and scikit-image."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from skimage import color, data, transform, util
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor

# Photographs that leave at least 40 test patches with something to see.
PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "stereo_motorcycle",
)
PATCH = 24
LEAST_CONTRAST = 0.03  # the standard deviation of a patch that has something to see


class Warp(NamedTuple):
    """How far an image may be moved; every value is drawn uniformly within plus or minus it."""

    degrees: float
    scale: float
    shift: float  # in pixels of the input
    shear: float = 0.0
    elastic: float = 0.0  # in pixels of the input
    brightness: float = 0.0  # images lie in [0, 1]
    contrast: float = 0.0
    flip: bool = False
    mid: float = 0.0  # the grey that contrast leaves alone
    padding: str = "zeros"  # what lies beyond the border; "reflection" where the scene goes on


class Augmentation(NamedTuple):
    """A random view of an image: a warp, then a square of zeros, then noise."""

    warp: Warp
    erase: int  # the largest side of the square, in pixels
    noise: float  # the standard deviation


class ImageSet(NamedTuple):
    """Grey images (N, 1, S, S) in [0, 1]; training uses no label, the test knows them."""

    name: str
    side: int  # of the views an encoder sees; an image may be larger, to leave room for moving
    train: Tensor
    train_labels: np.ndarray
    test: Tensor
    test_labels: np.ndarray
    augmentation: Augmentation
    moved: Warp  # what the second test does to the test images

    def view(self, images: Tensor, generator: Generator) -> Tensor:
        """One random view of each image."""
        warp, erase, noise = self.augmentation
        views = _erase(_warp(images, self.side, warp, generator), erase, generator)
        return views + noise * torch.randn(views.shape, generator=generator)

    def plain(self, images: Tensor) -> Tensor:
        """The images as they are: the middle of each."""
        margin = (images.shape[-1] - self.side) // 2
        return images[..., margin : margin + self.side, margin : margin + self.side]

    def moved_test(self, seed: int) -> Tensor:
        """The test images, each turned, shifted and scaled at random."""
        return _warp(self.test, self.side, self.moved, Generator().manual_seed(seed))


def digits(seed: int) -> ImageSet:
    """scikit-learn's 1797 handwritten digits, 8 x 8: 1297 to train on, 500 to test."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    train, test, train_labels, test_labels = train_test_split(
        images, bunch.target, test_size=500, stratify=bunch.target, random_state=seed
    )
    return ImageSet(
        name="digits",
        side=8,
        train=train,
        train_labels=train_labels,
        test=test,
        test_labels=test_labels,
        augmentation=Augmentation(
            Warp(20, scale=0.15, shift=1, shear=0.15, elastic=0.5, contrast=0.3),
            erase=3,
            noise=0.1,
        ),
        moved=Warp(25, scale=0.15, shift=1),
    )


def photographs(seed: int) -> ImageSet:
    """Grey patches of scikit-image's photographs; the class of a patch is its photograph.

    The left two thirds of each photograph give the training patches, the rest the test patches,
    so that no pixel is in both.
    """
    rng = np.random.default_rng(seed)
    train, test = [], []
    for name in PHOTOGRAPHS:
        left, right = sides(name)
        train.append(_patches(left, stride=PATCH // 2, most=250, rng=rng))
        test.append(_patches(right, stride=PATCH, most=50, rng=rng))
    classes = np.arange(len(PHOTOGRAPHS))
    scene: dict[str, Any] = {"mid": 0.5, "padding": "reflection"}
    return ImageSet(
        name="photograph patches",
        side=16,
        train=torch.from_numpy(np.concatenate(train))[:, None],
        train_labels=classes.repeat([len(patches) for patches in train]),
        test=torch.from_numpy(np.concatenate(test))[:, None],
        test_labels=classes.repeat([len(patches) for patches in test]),
        augmentation=Augmentation(
            Warp(20, scale=0.2, shift=4, brightness=0.2, contrast=0.4, flip=True, **scene),
            erase=0,
            noise=0.03,
        ),
        moved=Warp(25, scale=0.2, shift=4, brightness=0.1, contrast=0.2, **scene),
    )


IMAGES = {"digits": digits, "photograph patches": photographs}


def sides(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The left two thirds of a photograph, to train on, and the rest of it, to test on."""
    photograph = _photograph(name)
    border = round(0.65 * photograph.shape[1])
    return photograph[:, :border], photograph[:, border:]


def _photograph(name: str) -> np.ndarray:
    """A bundled photograph as a grey image in [0, 1], its shorter side at most 384 pixels."""
    image = getattr(data, name)()
    image = util.img_as_float(image[0] if isinstance(image, tuple) else image)
    image = color.rgb2gray(image) if image.ndim == 3 else image
    factor = min(1.0, 384 / min(image.shape))
    shape = [round(side * factor) for side in image.shape]
    return transform.resize(image, shape, anti_aliasing=factor < 1).astype(np.float32)


def _patches(image: np.ndarray, stride: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """At most `most` patches (n, PATCH, PATCH) of the image, without the empty ones."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (PATCH, PATCH))
    patches = windows[::stride, ::stride].reshape(-1, PATCH, PATCH)
    patches = patches[patches.std((1, 2)) > LEAST_CONTRAST]
    return patches[rng.permutation(len(patches))[:most]]


def _warp(images: Tensor, side: int, warp: Warp, generator: Generator) -> Tensor:
    """Turn, scale, shear, shift, bend and re-light each image; the middle side x side comes out."""
    n, _, size, _ = images.shape

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=generator) - 1

    angle = uniform(n) * math.radians(warp.degrees)
    zoom = (1 + warp.scale * uniform(n)) * side / size
    mirror = uniform(n).sign() if warp.flip else torch.ones(n)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift = 2 / size * warp.shift * uniform(2, n)
    first = torch.stack([mirror * cos, warp.shear * uniform(n) - sin, shift[0]], 1)
    second = torch.stack([mirror * sin, cos, shift[1]], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), [n, 1, side, side], align_corners=False)
    if warp.elastic:
        bend = 2 / size * warp.elastic * uniform(n, 2, 3, 3)
        bend = F.interpolate(bend, size=(side, side), mode="bicubic", align_corners=True)
        grid = grid + bend.permute(0, 2, 3, 1)
    views = F.grid_sample(images, grid, padding_mode=warp.padding, align_corners=False)
    contrast = 1 + warp.contrast * uniform(n, 1, 1, 1)
    return warp.mid + (views - warp.mid) * contrast + warp.brightness * uniform(n, 1, 1, 1)


def _erase(images: Tensor, most: int, generator: Generator) -> Tensor:
    """Set a random rectangle of each image to 0, its sides between 1 and `most` pixels."""
    if most == 0:
        return images
    n, _, side, _ = images.shape
    start = torch.randint(0, side, (2, n, 1), generator=generator)
    length = torch.randint(1, most + 1, (2, n, 1), generator=generator)
    pixel = torch.arange(side)
    rows, columns = (pixel >= start) & (pixel < start + length)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
