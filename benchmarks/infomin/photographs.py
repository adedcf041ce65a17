"""Patches of the photographs that come inside scikit-image and scikit-learn.

Every photograph is scaled to 384 pixels of height and cut into vertical bands, in turn 128 pixels
to train on and 64 to test on. A patch, and a pair of patches above one another, lies inside one
band: no pixel is in both. Patches with nothing to see are left out.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from skimage import color, data, util
from sklearn.datasets import load_sample_image
from torch import Generator, Tensor

NAMES = (
    "astronaut", "cat", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket",
    "stereo_motorcycle", "china", "flower",
)  # fmt: skip
HEIGHT = 384
ROWS = 4  # regions of a photograph, one above the other
PATCH = 32
PERIOD, TRAINING = 192, 128  # width of a pair of bands, and of the one to train on
LEAST_CONTRAST = 0.03  # of a patch: the standard deviation of its grey values, in [0, 1]
SPACES = {
    "rgb": lambda image: image,
    "ydbdr": color.rgb2ydbdr,
    "lab": color.rgb2lab,
    "hsv": color.rgb2hsv,
    "grey": lambda image: color.rgb2gray(image)[..., None],
}


class Grid(NamedTuple):
    """Positions (N, 3) of patches, and of each its photograph and its region of it, (N,)."""

    positions: Tensor
    photograph: np.ndarray
    region: np.ndarray


class Photographs:
    """Photographs in one colour space, and the positions (photograph, y, x) of their patches.

    Args:
        space: a key of `SPACES`. Each channel is scaled to variance 1 over all photographs.

    Raises:
        ValueError: `space` is unknown.
    """

    def __init__(self, space: str):
        if space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
        converted = [SPACES[space](_load(name)) for name in NAMES]
        scale = np.concatenate([image.reshape(-1, image.shape[-1]) for image in converted]).std(0)
        self.pixels = _stack([image / scale for image in converted])
        self.contrast = _stack([_contrast(name) for name in NAMES])

    def pairs(self, split: str, distance: int = 0) -> Tensor:
        """The positions (N, 3) of all patches of a split that have one `distance` pixels below.

        Raises:
            ValueError: `split` is not "train" or "test", or `distance` leaves no room.
        """
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        if not 0 <= distance <= HEIGHT - PATCH:
            raise ValueError(f"distance must be in [0, {HEIGHT - PATCH}], got {distance}")
        seen = self.contrast >= LEAST_CONTRAST
        height = seen.shape[1] - distance
        both = seen[:, :height] & seen[:, distance:]
        offset = torch.arange(both.shape[2]) % PERIOD
        inside = offset <= TRAINING - PATCH
        if split == "test":
            inside = (offset >= TRAINING) & (offset <= PERIOD - PATCH)
        return (both & inside).nonzero()

    def patches(self, positions: Tensor) -> Tensor:
        """Patches (N, C, 32, 32), each channel less its mean: its mean colour tells nothing."""
        photograph, y, x = (each[:, None, None] for each in positions.unbind(1))
        side = torch.arange(PATCH)
        patches = self.pixels[photograph, y + side[:, None], x + side].permute(0, 3, 1, 2)
        return patches - patches.mean((2, 3), keepdim=True)

    def grid(self, split: str, stride: int = 16) -> Grid:
        """The patches of a split on a grid, without those on the border of two regions."""
        positions = self.pairs(split)
        photograph, y, x = positions.unbind(1)
        row = HEIGHT // ROWS
        chosen = positions[(y % stride == 0) & (x % stride == 0) & (y % row <= row - PATCH)]
        photograph, y, _ = chosen.unbind(1)
        return Grid(chosen, photograph.numpy(), (photograph * ROWS + y // row).numpy())


def drawn(positions: Tensor, count: int, generator: Generator) -> Tensor:
    """`count` random rows of the positions."""
    return positions[torch.randint(len(positions), (count,), generator=generator)]


def below(positions: Tensor, distance: int) -> Tensor:
    """The positions `distance` pixels below."""
    return positions + torch.tensor([0, distance, 0])


@cache
def _load(name: str) -> np.ndarray:
    """A photograph (384, W, 3), in [0, 1]."""
    if name in ("china", "flower"):
        image = load_sample_image(f"{name}.jpg")
    else:
        image = getattr(data, name)()
        image = image[0] if isinstance(image, tuple) else image  # the left eye
    image = util.img_as_float(image)
    shape = HEIGHT, round(image.shape[1] * HEIGHT / image.shape[0])
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    scaled = F.interpolate(planes, shape, mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


@cache
def _contrast(name: str) -> np.ndarray:
    """The standard deviation (H, W) of the grey values of the patch at each position."""
    grey = torch.from_numpy(color.rgb2gray(_load(name)))[None, None]
    mean, square = (
        F.avg_pool2d(F.avg_pool2d(x, (PATCH, 1), 1), (1, PATCH), 1) for x in (grey, grey.square())
    )
    return (square - mean.square()).clamp_min(0).sqrt()[0, 0].numpy()


def _stack(images: list[np.ndarray]) -> Tensor:
    """(P, H, W, ...) float32, with zeros at the right of narrow images."""
    width = max(image.shape[1] for image in images)
    padded = []
    for image in images:
        missing = [(0, 0), (0, width - image.shape[1])] + [(0, 0)] * (image.ndim - 2)
        padded.append(np.pad(image, missing))
    return torch.from_numpy(np.stack(padded)).float()
