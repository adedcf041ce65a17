"""Every family of kernels once, against float64: the first thing that `make gpu` shows.

    python -m benchmarks.gpu.smoke --out build/gpu/smoke.jsonl

Each pair of a dtype and a number of features has a process of its own, all at once: most of the
time is the compiler's. A line of JSON is written for each family as soon as it is known. A process
in which a family fails ends there, as the device may be unusable, and another does the rest.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Lock
from unittest.mock import patch

import torch
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import ops, reference
from contrastive_kernels.backends import unusable_reason
from contrastive_kernels.losses.cases import runs

from ..cases.step import DTYPES
from ..harness.check import first_line
from ..harness.paths import ROOT

# Not multiples of a tile, and more keys than one part takes.
ROWS, KEYS = 257, 1090
OWN_KEYS, GROUPS = 7, (6, 160)
DIMS = (64, 128, 256, 768)
NAMES = ("bfloat16", "float16", "float32")
# The largest relative error of a result, in the Frobenius norm.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
PROCESSES = 12
PROCESS_SECONDS = 75.0
# (results, by name) of a function of leaves, whose gradients are results too
Results = dict[str, Tensor]


def normal(*shape: int, seed: int, like: torch.dtype) -> Tensor:
    made = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=made, dtype=torch.float64, device="cpu").to(like)


class Inputs:
    """Leaves of a family: rounded for the kernels, and the same numbers in float64."""

    def __init__(self, dtype: torch.dtype, dim: int, device: str, exact: bool):
        self.dtype, self.dim, self.device, self.exact = dtype, dim, device, exact
        self.leaves: dict[str, Tensor] = {}

    def features(self, name: str, *shape: int, learned: bool = True) -> Tensor:
        t = normal(*shape, self.dim, seed=len(name) + len(shape), like=self.dtype)
        return self._leaf(name, t, learned)

    def numbers(self, name: str, *values: float) -> Tensor:
        dtype = torch.float64 if self.exact else torch.float32
        return self._leaf(name, torch.tensor(values, dtype=dtype), True)

    def _leaf(self, name: str, t: Tensor, learned: bool) -> Tensor:
        t = t.to(self.device)
        t = (t.double() if self.exact else t).detach().requires_grad_(learned)
        if learned:
            self.leaves[name] = t
        return t

    def ids(self, count: int, each: int) -> Tensor:
        return torch.arange(count, device=self.device) // each

    def differentiated(self, values: Results) -> Results:
        """The values, and gradients of the leaves for random upstream gradients, of one sign: a sum
        that cancels has a large relative error."""
        values = {name: t.masked_fill(t == -torch.inf, 0.0) for name, t in values.items()}
        chosen = [t for t in values.values() if t.requires_grad]
        upstream = [normal(*t.shape, seed=40 + k, like=t.dtype).abs().to(t.device)
                    for k, t in enumerate(chosen)]  # fmt: skip
        gradients = torch.autograd.grad(chosen, list(self.leaves.values()), upstream)
        names = (f"d{name}" for name in self.leaves)
        return values | dict(zip(names, gradients, strict=True))


def swept(
    *, itself: bool = False, frozen: bool = False, softplus: bool = False, biased: bool = False,
    normalize: bool = True, summed: bool = False, own: bool = False, **options: bool,
) -> Callable[[Inputs], Results]:  # fmt: skip
    """A family of sweeps: pairs of equal ids are dropped."""

    def run(given: Inputs) -> Results:
        x = given.features("x", ROWS)
        shape = (ROWS, OWN_KEYS) if own else (KEYS,)
        y = None if itself else given.features("y", *shape, learned=not frozen)
        scale = given.numbers("scale", 0.3 if not normalize else 9.0).reshape(())
        keys = ROWS if itself else shape[-1]
        pairs = {
            "scale": scale,
            "exclude": (given.ids(ROWS, 3), given.ids(keys, 2 if own else 11)),
            "normalize": normalize,
        }
        if itself:
            pairs["exclude"] = (pairs["exclude"][0],) * 2
        if biased:
            pairs["bias"] = given.numbers("bias", *(-1.0 + 0.01 * (k % 7) for k in range(keys)))
        if given.exact:
            sweep = reference.softplus_sweep if softplus else reference.sweep
            out = sweep(x, y, **pairs, **options)
        else:
            backend = "triton"
            checked = ops.checked_operands(x, y, backend=backend, **pairs)
            if softplus:
                out = ops.softplus_sweep(checked, summed=summed, **options)
            else:
                out = ops.sweep(checked, **options)
        names = ("value",) if softplus else ("lse", "mean", "col_lse", "col_mean")
        values = {name: getattr(out, name) for name in names}
        values = {name: t for name, t in values.items() if t is not None}
        if summed and given.exact:
            values = {"value": values["value"].sum()}
        return given.differentiated(values)

    return run


def row_dots(given: Inputs) -> Results:
    x = given.features("x", ROWS)
    counts = torch.tensor(runs(ROWS), device=given.device)
    one, own = given.features("one", ROWS, 1), given.features("own", ROWS, OWN_KEYS)
    ragged = given.features("ragged", int(counts.sum()))
    if given.exact:
        unit = torch.nn.functional.normalize
        rows = torch.arange(ROWS, device=given.device).repeat_interleave(counts)
        values = {name: reference.row_dot(x, y, normalize=True) for name, y in
                  (("pairs", one), ("keys", own))}  # fmt: skip
        values["runs"] = (unit(x, dim=1)[rows] * unit(ragged, dim=1)).sum(1)
    else:
        options = {"normalize": True, "backend": "triton"}
        values = {"pairs": ops.row_dot(x, one, **options), "keys": ops.row_dot(x, own, **options)}
        values["runs"] = ops.row_dot(x, ragged, ends=counts.cumsum(0), **options)
    return given.differentiated(values)


def whitening(given: Inputs) -> Results:
    x = given.features("x", *GROUPS)
    return given.differentiated({"result": (reference if given.exact else ck).whiten(x, eps=0.1)})


def on_hopper(given: Inputs) -> Results:
    """`attend` by the engine for Hopper, which has to be asked for."""
    with patch.dict(os.environ, CK_HOPPER="1"):
        return swept(frozen=True)(given)


FAMILIES: dict[str, Callable[[Inputs], Results]] = {
    "rows": swept(mean=True, biased=True),
    "columns": swept(columns=True, biased=True),
    "two_way": swept(columns=True),
    "itself": swept(itself=True),
    "attend": swept(frozen=True),
    "gradient": swept(normalize=False),
    "softplus": swept(softplus=True, biased=True),
    "softplus_sum": swept(softplus=True, summed=True),
    "own_keys": swept(own=True),
    "row_dot": row_dots,
    "whitening": whitening,
    "hopper": on_hopper,  # the last: if it never ends, the others are known
}


def whitened(dtype: torch.dtype, dim: int) -> bool:
    """What the CUDA kernels of whitening take."""
    return dtype == torch.float32 and dim < GROUPS[1]


def chosen(families: list[str], dtype: torch.dtype, dim: int) -> list[str]:
    left_out = set() if whitened(dtype, dim) else {"whitening"}
    if dtype == torch.float32 or dim > 256:
        left_out.add("hopper")
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
    what = f"{made['family']:13s} {made['dtype']:9s} D={made['dim']:<4d} {made['seconds']:5.1f} s"
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
