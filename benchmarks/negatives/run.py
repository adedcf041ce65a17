"""How many negatives do InfoNCE, EqCo and CACR need? Trains encoders on photographs with 4 to
65,536 of them: accuracy, gradients and time. About 25 minutes on one core.

python -m benchmarks.negatives           # train, and write result, plot and page
python -m benchmarks.negatives --quick   # a few steps, seconds: does everything run?
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import date
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from contrastive_kernels.demo.evaluate import Accuracy, evaluate
from contrastive_kernels.demo.train import fit, untrained

from ..harness.console import Progress
from ..harness.environment import describe, results_path, save
from ..harness.paths import RESULTS
from . import report
from .training import (
    ALPHA,
    BATCH,
    DIM,
    FRESH,
    POSITIVES,
    T_NEG,
    TEMPERATURE,
    TEST,
    WIDTH,
    CropRun,
    Scenes,
    begun,
    filled,
    loss_of,
    pulls,
    scenes,
    supervised,
)

PACKAGES = ("numpy", "scikit-image", "scikit-learn")


class Settings(NamedTuple):
    """How much is trained; the rest of the settings are constants of training.py."""

    counts: tuple[int, ...] = tuple(4**power for power in range(1, 9))
    seeds: int = 3
    steps: int = 300
    queue: int = 65536
    draws: int = 32  # of negatives, for a gradient
    repeats: int = 9  # of a timing


QUICK = Settings(counts=(4, 64), seeds=1, steps=2, queue=2048, draws=2, repeats=1)
FIXED = {
    "batch": BATCH,
    "dim": DIM,
    "width": WIDTH,
    "fresh": FRESH,
    "test": TEST,
    "temperature": TEMPERATURE,
    "alpha": ALPHA,
    "t_neg": T_NEG,
    "positives": POSITIVES,
}


def cpu_milliseconds() -> float:
    """Time that this process has computed; unlike the clock it stands while others compute."""
    return 1e3 * time.process_time()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.negatives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="nothing is kept, but by --json")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--only", choices=PARTS, help="measure this part of the result again")
    parser.add_argument("--plot", action="store_true", help="only draw the result again")
    parser.add_argument("--report", action="store_true", help="only write the page again")
    parser.add_argument(
        "--check", action="store_true", help="only compare the page; 1 when it disagrees"
    )
    options = parser.parse_args()
    if options.check:
        return report.update(check=True)
    if not (options.plot or options.report):
        try:
            measure(options)
        except KeyboardInterrupt:
            print("\nstopped; what was trained so far is kept", file=sys.stderr)
            return 130
    whole = not (options.plot or options.report or options.quick or options.json)
    if options.plot or whole:
        for path in report.plot():
            print(f"wrote {path.name}")
    if options.report or whole:
        return report.update(check=False)
    return 0


def measure(options: argparse.Namespace) -> None:
    """Trains and measures; the result is saved after each record."""
    torch.set_num_threads(1)
    settings = QUICK if options.quick else Settings()
    environment = describe(1, PACKAGES)
    path = options.json
    if path is None and not options.quick:
        path = RESULTS / "negatives" / results_path(environment).name
    if options.only and not (path and path.exists()):
        raise SystemExit("--only needs the result of a whole run, in its place or at --json")
    chosen = scenes()
    source = {
        "command": command(options),
        "date": date.today().isoformat(),
        "commit": environment["commit"],
    }
    if options.only:
        result = json.loads(path.read_text())
        result.setdefault("again", {})[options.only] = source
    else:
        result = source | {
            "environment": environment,
            "settings": settings._asdict() | FIXED,
            "crops": {"positions": len(chosen.crops), "pixels": len(chosen.crops.pixels)},
            **{part: [] for part in PARTS},
        }
    for part in [options.only] if options.only else PARTS:
        result[part] = []
        for record in PARTS[part](chosen, settings):
            result[part].append(record)
            values = record.values()
            print("  ".join(f"{v:.3f}" if isinstance(v, float) else f"{v}" for v in values))
            if path is not None:
                save(path, result)
    if path is not None:
        print(f"wrote {path.name}")


def command(options: argparse.Namespace) -> str:
    """What gives the result again; where it is written does not matter."""
    words = ["python -m benchmarks.negatives"]
    words += ["--quick"] * options.quick
    words += [f"--only {options.only}"] if options.only else []
    return " ".join(words)


def costs(chosen: Scenes, settings: Settings) -> Iterator[dict]:
    for count, name in product(settings.counts, POSITIVES):
        milliseconds = loss_cost(name, count, settings.repeats)
        yield {"loss": name, "negatives": count, "loss_ms": milliseconds}


def baselines(chosen: Scenes, settings: Settings) -> Iterator[dict]:
    yield {"name": "raw pixels", "seed": 0} | accuracy(None, chosen)
    for seed in range(settings.seeds):
        network = untrained(chosen.images, seed, WIDTH)
        yield {"name": "untrained", "seed": seed} | accuracy(network, chosen)
        network = supervised(chosen, seed, settings.steps)
        yield {"name": "supervised", "seed": seed} | accuracy(network, chosen)


def trainings(chosen: Scenes, settings: Settings) -> Iterator[dict]:
    for seed in range(settings.seeds):
        start = filled(chosen, seed, settings.queue)
        for count, name in product(settings.counts, POSITIVES):
            run = begun(start, name, count)
            record = {"loss": name, "negatives": count, "seed": seed} | trained(run, settings.steps)
            yield record | accuracy(run.network[0], chosen)


def gradients(chosen: Scenes, settings: Settings) -> Iterator[dict]:
    """With one encoder for each seed, so that only loss and number differ."""
    middle = settings.counts[len(settings.counts) // 2]
    for seed in range(settings.seeds):
        run = begun(filled(chosen, seed, settings.queue), "InfoNCE", middle)
        trained(run, settings.steps)
        for count, name, pull in pulls(run, settings.counts, settings.draws):
            yield {"loss": name, "negatives": count, "seed": seed} | pull._asdict()


# A run that is stopped has finished the first ones; trainings take nearly all of the time.
PARTS = {"costs": costs, "gradients": gradients, "baselines": baselines, "trainings": trainings}


def accuracy(network: nn.Module | None, chosen: Scenes) -> dict:
    # the same labels and the same turns for all: the spread over seeds is that of training
    return Accuracy(*map(float, evaluate(network, chosen.images, seed=0)))._asdict()


def trained(run: CropRun, steps: int) -> dict:
    """Trains a run; the loss at its end, and the time of a step."""
    progress = Progress("training")
    times = [cpu_milliseconds()]

    def on_step() -> None:
        times.append(cpu_milliseconds())
        progress(f"step {len(times) - 1}")

    curve = fit(run, steps, on_step)
    progress.close()
    differences = [after - before for before, after in zip(times, times[1:], strict=False)]
    return {
        "last_loss": statistics.fmean(curve[-20:]),
        "step_ms": statistics.median(differences),
    }


def loss_cost(name: str, count: int, repeats: int) -> float:
    """The time of a loss alone, forward and backward."""
    query = torch.randn(BATCH, DIM, requires_grad=True)
    keys, negatives = torch.randn(POSITIVES[name], BATCH, DIM), torch.randn(count, DIM)
    times = []
    for _ in range(repeats + 1):
        start = cpu_milliseconds()
        loss_of(name, query, keys, negatives).mean().backward()
        times.append(cpu_milliseconds() - start)
    return statistics.median(times[1:])
