"""The experiments of `python -m benchmarks.infomin`: for one seed, a record of each training."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from .colour_flow import ColourFlow, views
from .photographs import NAMES, ROWS, Photographs, below, drawn
from .view_training import (
    BATCH,
    Draw,
    Encoders,
    Labelled,
    accuracies,
    bound,
    contrast,
    encoder,
    learn_views,
    probe,
    settle,
)

Split = Callable[[Tensor], tuple[Tensor, Tensor]]  # pixels to two views

DIRECTIONS = 8
LEAST_COHERENCE = 0.3  # of the gradients of a patch, for it to have a direction
FIXED = {  # colour space, and its channel that is the first view
    "R, GB": ("rgb", 0),
    "G, RB": ("rgb", 1),
    "B, RG": ("rgb", 2),
    "Y, DbDr": ("ydbdr", 0),
    "L, ab": ("lab", 0),
    "V, HS": ("hsv", 2),
}
FLOWS = {  # what the colour model starts from, and whether it preserves volume
    "RGB, affine": ("rgb", False),
    "RGB, volume preserving": ("rgb", True),
    "YDbDr, volume preserving": ("ydbdr", True),
}
LABELLED = 64  # patches of a step that are classified


class Settings(NamedTuple):
    """How much is trained; the rest of the settings are constants beside their use."""

    seeds: int = 3
    steps: int = 300  # of the encoders
    view_steps: int = 300  # of the view generator
    batches: int = 16  # of held-out pairs, for the bound
    stride: int = 16  # of the labelled patches
    distances: tuple[int, ...] = (8, 16, 32, 64, 96, 128, 192)


QUICK = Settings(seeds=1, steps=2, view_steps=2, batches=1, stride=48, distances=(8, 192))


def distance(settings: Settings, seed: int) -> Iterator[dict]:
    """Views: two grey patches, one `distance` pixels above the other; one encoder for both."""
    photographs = Photographs("grey")
    train, test = (photographs.grid(split, settings.stride) for split in ("train", "test"))
    patches = photographs.patches(train.positions), photographs.patches(test.positions)
    labelled = Labelled(
        (patches[0],),
        (patches[1],),
        {
            "photograph": (train.photograph, test.photograph),
            "region": (train.region, test.region),
            "direction": (direction(patches[0]), direction(patches[1])),
        },
    )

    def pairs(apart: int) -> Draw:
        positions = {split: photographs.pairs(split, apart) for split in ("train", "test")}

        def draw(split: str, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
            upper = drawn(positions[split], count, generator)
            return photographs.patches(upper), photographs.patches(below(upper, apart))

        return draw

    near = pairs(settings.distances[0])
    yield {"views": "untrained"} | measured(
        near, settings, seed, labelled, trained=False, shared=True
    )
    for apart in settings.distances:
        yield {"views": f"{apart}"} | measured(pairs(apart), settings, seed, labelled, shared=True)


def colour(settings: Settings, seed: int) -> Iterator[dict]:
    """Views: one and two channels of a patch, as they are or as the view generator gives them."""
    scene = _scene("rgb", settings.stride)
    if seed == 0:
        yield {"views": "colour covariance"} | covariance_probe(scene)
    yield {"views": "untrained"} | scene.measured(_split(0), settings, seed, trained=False)
    for name, (space, first) in FIXED.items():
        scene = _scene(space, settings.stride)
        yield {"views": name} | scene.measured(_split(first), settings, seed)
    for start, (space, volume_preserving) in FLOWS.items():
        scene = _scene(space, settings.stride)
        for mode, draw_labelled in (
            ("unsupervised", None),
            ("semi-supervised", scene.draw_labelled),
        ):
            flow = learn_views(
                scene.draw,
                volume_preserving=volume_preserving,
                draw_labelled=draw_labelled,
                classes=len(NAMES) * ROWS,
                steps=settings.view_steps,
                seed=seed,
            )
            record = scene.measured(_learned(flow), settings, seed)
            yield {"views": f"{start}, {mode}"} | record


PARTS = {"distance": distance, "colour": colour}


class Scene:
    """Patches in one colour space, at random and labelled."""

    def __init__(self, space: str, stride: int):
        self.photographs = Photographs(space)
        self.positions = {split: self.photographs.pairs(split) for split in ("train", "test")}
        self.train, self.test = (self.photographs.grid(split, stride) for split in self.positions)
        self.patches = [
            self.photographs.patches(grid.positions) for grid in (self.train, self.test)
        ]

    def draw(self, generator: Generator, split: str = "train", count: int = BATCH) -> Tensor:
        return self.photographs.patches(drawn(self.positions[split], count, generator))

    def draw_labelled(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """Random patches of the grid to train on, and their regions."""
        index = torch.randint(len(self.patches[0]), (LABELLED,), generator=generator)
        return self.patches[0][index], torch.from_numpy(self.train.region)[index]

    def tasks(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {
            "photograph": (self.train.photograph, self.test.photograph),
            "region": (self.train.region, self.test.region),
        }

    def measured(
        self,
        split: Split,
        settings: Settings,
        seed: int,
        trained: bool = True,
    ) -> dict:
        """New encoders of the two views that `split` makes of a patch, and what they are worth."""

        def draw(bands: str, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return split(self.draw(generator, bands, count))

        with torch.no_grad():
            labelled = Labelled(*(split(patches) for patches in self.patches), self.tasks())
        return measured(draw, settings, seed, labelled, trained=trained)


def measured(
    draw: Draw,
    settings: Settings,
    seed: int,
    labelled: Labelled,
    *,
    trained: bool = True,
    shared: bool = False,
) -> dict[str, float]:
    """Trains encoders from the seed: I_NCE of held-out pairs, and the accuracy of each task."""
    torch.manual_seed(seed)
    networks = [encoder(view.shape[1]) for view in labelled.train]
    encoders = Encoders(networks[0], networks[0] if shared else networks[1])
    run = contrast if trained else settle
    run(draw, encoders, steps=settings.steps, seed=seed)
    # the same held-out pairs for all
    result = {"bound": bound(draw, encoders, batches=settings.batches, seed=1)} if trained else {}
    return result | accuracies(encoders, labelled)


def direction(patches: Tensor) -> np.ndarray:
    """The direction across the edges of grey patches (N, 1, H, W), one of 8 classes.

    It is the main axis of the structure tensor (Bigun and Granlund 1987); -1 where none stands out.
    """
    x = patches[:, 0].double()
    across = x[:, 1:-1, 2:] - x[:, 1:-1, :-2]
    down = x[:, 2:, 1:-1] - x[:, :-2, 1:-1]
    real = (across.square() - down.square()).sum((1, 2))
    imaginary = (2 * across * down).sum((1, 2))
    coherence = torch.hypot(real, imaginary) / (across.square() + down.square()).sum((1, 2))
    turn = torch.atan2(imaginary, real) / (2 * torch.pi)  # of the doubled angle
    classes = (turn * DIRECTIONS).round().long() % DIRECTIONS
    return classes.where(coherence >= LEAST_COHERENCE, -1).numpy()


def covariance_probe(scene: Scene) -> dict[str, float]:
    """What the colours alone tell: a probe on the logs of the deviations and the covariances."""
    both = []
    for patches in scene.patches:
        x = patches.flatten(2).double()
        covariance = x @ x.mT / x.shape[-1]
        rows, columns = torch.triu_indices(3, 3)
        deviations = covariance.diagonal(dim1=1, dim2=2).clamp_min(1e-6).log()
        both.append(torch.cat([covariance[:, rows, columns], deviations], 1).numpy())
    return {name: probe(*both, *labels) for name, labels in scene.tasks().items()}


def _split(first: int) -> Split:
    order = [first] + [channel for channel in range(3) if channel != first]
    return lambda patches: views(patches[:, order])


def _learned(flow: ColourFlow) -> Split:
    return lambda patches: views(flow(patches)[0])


@cache
def _scene(space: str, stride: int) -> Scene:
    return Scene(space, stride)
