"""How many negatives do InfoNCE, EqCo and CACR need? Trains encoders on photographs with 4 to
65,536 of them: accuracy, gradients and time. About 25 minutes on one core.

python -m benchmarks.negatives           # train, and write the result
python -m benchmarks.negatives --quick   # a few steps, seconds: does everything run?
"""

import argparse
import shlex
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from contrastive_kernels.demo.evaluate import Accuracy, evaluate
from contrastive_kernels.demo.train import fit, untrained

from .console import Progress
from .environment import RESULTS, describe, results_path, save
from .negatives_training import (
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
    begun,
    filled,
    loss_of,
    pull,
    scenes,
    supervised,
)

PACKAGES = ("numpy", "scikit-image", "scikit-learn")


class Settings(NamedTuple):
    """How much is trained; the rest of the settings are constants of negatives_training."""

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
    options = parser.parse_args()
    try:
        measure(options)
    except KeyboardInterrupt:
        print("\nstopped; what was trained so far is kept", file=sys.stderr)
        return 130
    return 0


def measure(options: argparse.Namespace) -> None:
    """Trains everything; the result is saved after each training."""
    torch.set_num_threads(1)
    settings = QUICK if options.quick else Settings()
    environment = describe(1, PACKAGES)
    path = options.json
    if path is None and not options.quick:
        path = RESULTS / "negatives" / results_path(environment).name
    chosen = scenes()
    result = {
        "command": " ".join(["python -m benchmarks.negatives", *map(shlex.quote, sys.argv[1:])]),
        "date": date.today().isoformat(),
        "environment": environment,
        "settings": settings._asdict() | FIXED,
        "crops": {"positions": len(chosen.crops), "pixels": len(chosen.crops.pixels)},
        "baselines": [],
        "trainings": [],
        "gradients": [],
        "costs": [],
    }

    def keep(kind: str, record: dict) -> None:
        result[kind].append(record)
        print("  ".join(f"{v:.3f}" if isinstance(v, float) else f"{v}" for v in record.values()))
        if path is not None:
            save(path, result)

    def accuracy(network: nn.Module | None) -> dict:
        # the same labels and the same turns for all: the spread is that of training
        scores = Accuracy(*map(float, evaluate(network, chosen.images, seed=0)))
        return scores._asdict()

    keep("baselines", {"name": "raw pixels", "seed": 0} | accuracy(None))
    for seed in range(settings.seeds):
        network = untrained(chosen.images, seed, WIDTH)
        keep("baselines", {"name": "untrained", "seed": seed} | accuracy(network))
        network = supervised(chosen, seed, settings.steps)
        keep("baselines", {"name": "supervised", "seed": seed} | accuracy(network))
        start = filled(chosen, seed, settings.queue)
        for count in settings.counts:
            for name in POSITIVES:
                run = begun(start, name, count)
                record = {"loss": name, "negatives": count, "seed": seed}
                record |= trained(run, settings.steps)
                keep("trainings", record | accuracy(run.network[0]))
                if (name, count) == ("InfoNCE", settings.counts[len(settings.counts) // 2]):
                    teacher = run
        # with the encoder of one training, so that only the number differs
        for count in settings.counts:
            for name in POSITIVES:
                record = {"loss": name, "negatives": count, "seed": seed}
                keep("gradients", record | pull(teacher, name, count, settings.draws)._asdict())
    for count in settings.counts:
        for name in POSITIVES:
            record = {"loss": name, "negatives": count}
            keep("costs", record | {"loss_ms": loss_cost(name, count, settings.repeats)})
    if path is not None:
        print(f"wrote {path.name}")


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


if __name__ == "__main__":
    sys.exit(main())
