"""One training, from one seed, with the package's own loss and with the fused one."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import contrastive_kernels as ck

# train(on_step): calls on_step(loss) after each step
Train = Callable[[Callable[[float], None]], None]
CLEAR_REFS = Path("/proc/self/clear_refs")


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process in MB; Linux alone tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


def run(name: str, train: Train, steps: int) -> tuple[list[float], float, float]:
    """Losses, seconds a step without the first, and MB beyond what was there before."""
    torch.manual_seed(0)
    losses, times = [], []
    linux = CLEAR_REFS.exists()
    if linux:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text("5")  # starts the high-water mark anew
        before = resident("VmRSS")
    with tqdm(total=steps, desc=name, unit="step") as bar:

        def on_step(loss: float) -> None:
            losses.append(loss)
            times.append(time.perf_counter())
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")

        train(on_step)
    peak = resident("VmHWM") - before if linux else float("nan")
    return losses, (times[-1] - times[0]) / (len(times) - 1), peak


def compare(trainings: dict[str, Train], steps: int) -> float:
    """Train each way, print what each costs, and return the largest difference of a loss."""
    rows = {name: run(name, train, steps) for name, train in trainings.items()}
    for name, (losses, seconds, peak) in rows.items():
        print(f"{name:28} last loss {losses[-1]:.5f} {1e3 * seconds:8.1f} ms a step {peak:6.0f} MB")
    theirs, ours = rows.values()
    largest = max(abs(a - b) for a, b in zip(theirs[0], ours[0], strict=True))
    speed = theirs[1] / ours[1]
    print(f"fused: the same {steps} losses within {largest:.1e}, {speed:.2f} x the steps a second")
    return largest


def beside(peer: str, train: Train, steps: int) -> float:
    """`compare` a peer's own losses with its patched ones."""

    def fused(on_step: Callable[[float], None]) -> None:
        with ck.patched(peer):
            train(on_step)

    return compare({f"{peer}'s own": train, "fused": fused}, steps)
