"""Every family of kernels once, against float64: the first thing that `make gpu` shows.

    python -m benchmarks.gpu.smoke --out build/gpu/smoke.jsonl

Each pair of a dtype and a number of features has a process of its own, all at once: most of the
time is the compiler's. A line of JSON is written for each family as soon as it is known. A process
in which a family fails ends there, as the device may be unusable, and another does the rest.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Lock

import torch

from contrastive_kernels.backends import unusable_reason

from ..cases.step import DTYPES
from ..harness.check import first_line
from ..harness.paths import ROOT
from .families import FAMILIES, Inputs, whitened

DIMS = (64, 128, 256, 768)
NAMES = ("bfloat16", "float16", "float32")
# The largest relative error of a result, in the Frobenius norm.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
PROCESSES = 12
PROCESS_SECONDS = 75.0


def chosen(families: list[str], dtype: torch.dtype, dim: int) -> list[str]:
    left_out = set() if whitened(dtype, dim) else {"whitening"}
    if dtype == torch.float32 or dim > 256:
        left_out |= {name for name in FAMILIES if name.startswith("hopper")}
    return [name for name in families if name not in left_out]


def errors(family: str, dtype: torch.dtype, dim: int, device: str) -> dict[str, float]:
    """The relative error of each result and gradient against float64 on the same inputs."""
    run = FAMILIES[family]
    got = run(Inputs(dtype, dim, device, exact=False))
    wanted = run(Inputs(dtype, dim, device, exact=True))
    return {name: ((t.double() - wanted[name]).norm() / wanted[name].norm()).item()
            for name, t in got.items()}  # fmt: skip


def record(family: str, dtype: torch.dtype, dim: int, device: str) -> dict:
    """What a family gave; why it failed is in it."""
    made: dict = {"family": family, "dtype": str(dtype)[6:], "dim": dim}
    start = time.perf_counter()
    try:
        found = errors(family, dtype, dim, device)
        made["errors"] = found
        wrong = {name: error for name, error in found.items() if not error <= LIMITS[dtype]}
        if wrong:
            made["failed"] = f"beyond {LIMITS[dtype]:.0e}: {', '.join(wrong)}"
    except Exception as failure:
        made["failed"] = first_line(failure)
        made["ended"] = True
    return made | {"seconds": round(time.perf_counter() - start, 2)}


def line(made: dict) -> str:
    found = " ".join(f"{name} {error:.1e}" for name, error in made.get("errors", {}).items())
    what = f"{made['family']:23s} {made['dtype']:9s} D={made['dim']:<4d} {made['seconds']:5.1f} s"
    return f"{what}  {found}" + (f"  FAILED: {made['failed']}" if "failed" in made else "")


def here(families: list[str], dtype: torch.dtype, dim: int, device: str) -> Iterator[dict]:
    """The records in this process, up to the first that breaks off."""
    from contrastive_kernels.triton import engine

    engine.FIXED_PAIRS = 0  # few pairs go the way of many
    sys.modules["contrastive_kernels.backends"].FEW_PRODUCTS = 0
    for family in families:
        made = record(family, dtype, dim, device)
        yield made
        if "ended" in made:
            return


def alone(families: list[str], name: str, dim: int, device: str) -> Iterator[dict]:
    """The records from processes of their own: the next begins where one ended."""
    end = time.monotonic() + PROCESS_SECONDS
    left = chosen(families, DTYPES[name], dim)
    while left:
        command = [sys.executable, "-m", "benchmarks.gpu.smoke", "--here", "--device", device,
                   "--dtype", name, "--dim", str(dim), "--family", *left]  # fmt: skip
        limit = max(1.0, end - time.monotonic())
        try:
            text = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                  timeout=limit)  # fmt: skip
            ended, text = f"the process ended with status {text.returncode}", text.stdout
        except subprocess.TimeoutExpired as late:
            ended, text = "took too long", (late.stdout or b"").decode()
        done = [json.loads(row) for row in text.splitlines() if row.startswith("{")]
        yield from done
        left = left[len(done) :]
        if left and not (done and "ended" in done[-1]):
            made = {"family": left.pop(0), "dtype": name, "dim": dim, "seconds": 0.0}
            yield made | {"failed": ended}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke", description=__doc__)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--dtype", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--dim", nargs="+", type=int, default=list(DIMS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--here", action="store_true", help="in this process; prints JSON")
    parser.add_argument("--out", type=Path, help="a file for the lines of JSON")
    options = parser.parse_args(argv)
    reason = unusable_reason("triton", options.device)
    if reason:
        print(f"no kernels to run: {reason}", file=sys.stderr)
        return 2
    pairs = list(product(options.dtype, options.dim))
    failed = 0
    if options.here:
        for name, dim in pairs:
            families = chosen(options.family, DTYPES[name], dim)
            for made in here(families, DTYPES[name], dim, options.device):
                print(json.dumps(made), flush=True)
                failed += "failed" in made
        return 1 if failed else 0
    lock = Lock()
    if options.out is not None:
        options.out.write_text("")

    def run(pair: tuple[str, int]) -> int:
        wrong = 0
        for made in alone(options.family, *pair, options.device):
            wrong += "failed" in made
            with lock:
                print(line(made), flush=True)
                if options.out is not None:
                    with options.out.open("a") as file:
                        file.write(json.dumps(made) + "\n")
        return wrong

    with ThreadPoolExecutor(PROCESSES) as pool:
        failed = sum(pool.map(run, pairs))
    print(f"smoke: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
