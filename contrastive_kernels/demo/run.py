"""The demo from start to end: train, evaluate, measure, report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

import contrastive_kernels as ck

from .data import IMAGES, ImageSet
from .evaluate import evaluate
from .measure import LOSSES, Case, measure, million
from .processes import side_by_side
from .report import Results, Trial, million_lines, picture, table
from .train import FEW, METHODS, QUEUE, untrained
from .trial import trial


def run(seed: int, steps: int | None, output: Path, quick: bool) -> None:
    """Do everything, print the table, and write demo.png into the output folder."""
    start = time.perf_counter()
    steps = (20 if quick else 200) if steps is None else steps
    dim = 128
    size = 512 if quick else 4096

    fused = ck.backends()["cpu"]
    if not fused.usable:
        print(f"No fused kernels here, so fused is dense too: {fused.reason}")

    sets = {name: make(seed) for name, make in IMAGES.items()}
    plan = [("digits", loss) for loss in METHODS] + [("photograph patches", "nt_xent")]
    trainings = len(plan) * len(LOSSES)
    total = trainings * steps + len(sets) + 2 * len(METHODS) + 2
    with tqdm(total=total, bar_format="{desc:30}{bar}{percentage:4.0f}% {elapsed}") as bar:
        bar.set_description(f"training {trainings} encoders")
        trials = _train(plan, sets, steps, seed, lambda done: bar.update(done - bar.n))
        baselines = {}
        for name, images in sets.items():
            with _stage(bar, "baselines"):
                baselines[name] = {
                    "raw pixels": evaluate(None, images, seed),
                    "untrained encoder": evaluate(untrained(images, seed), images, seed),
                }
        small, large = {}, {}
        for loss, method in METHODS.items():
            with _stage(bar, f"time and memory, {loss}"):
                small[loss] = measure(_case(loss, method.batch, method.dim, QUEUE))
            with _stage(bar, f"time and memory, {loss}"):
                large[loss] = measure(_case(loss, size, dim, 4 * size))
        with _stage(bar, "very many negatives"):
            # Dense, this one step would ask for gigabytes.
            many = million(100_000 if quick else 1_000_000) if fused.usable else None
        results = Results(trials, baselines, small, large, many)
        path = output / "demo.png"
        with _stage(bar, "picture"):
            picture(results, path, seed)

    print("\n" + table(results) + "\n")
    if many is not None:
        print(million_lines(many) + "\n")
    worst = max(trial.difference() for trial in trials)
    print(
        f"Shown in {time.perf_counter() - start:.0f} s: {len(METHODS)} losses trained fused and"
        f" dense, their curves never further apart than {worst:.0e}; the picture is {path}"
    )


@contextmanager
def _stage(bar: tqdm, name: str) -> Iterator[None]:
    """One tick of the progress bar, named while it lasts."""
    bar.set_description(name)
    yield
    bar.update()


def _train(
    plan: list[tuple[str, str]],
    sets: dict[str, ImageSet],
    steps: int,
    seed: int,
    on_progress: Callable[[int], None],
) -> list[Trial]:
    """Train every (images, loss) of the plan with every variant of the loss."""
    tasks = [(*pair, variant, steps, seed) for pair in plan for variant in LOSSES]
    # The longest come last in the plan; started first, they leave no core idle at the end.
    outcomes = side_by_side(trial, tasks[::-1], on_progress)[::-1]
    variants = zip(*[iter(outcomes)] * len(LOSSES), strict=True)
    return [
        Trial(sets[name], loss, dict(zip(LOSSES, pair, strict=True)))
        for (name, loss), pair in zip(plan, variants, strict=True)
    ]


def _case(loss: str, images: int, dim: int, queue: int) -> Case:
    """The case of a loss at a size, with its usual negatives and groups."""
    negatives = {"info_nce": queue, "eqco": FEW}.get(loss, 0)
    return Case(loss, images, dim, negatives=negatives, group=max(128, 2 * dim))
