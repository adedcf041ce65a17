"""How many kernels the steps of `make gpu` compile, counted without a GPU: prints JSON.

    python -m benchmarks.gpu.count

Host code runs with the sizes of the steps, or with smaller ones that take the same way.
"""

from . import stand_in  # noqa: F401, I001  first of all

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from contrastive_kernels.triton import engine, tune
from contrastive_kernels.triton.compile import counting

from ..cases.case import Case
from ..cases.step import DTYPES
from . import smoke
from .cases import CASES
from .families import FAMILIES, Inputs
from .plan import TUNED

ARCHITECTURE = 90
LARGEST = 8192  # so many rows and keys have 2^26 pairs, from which on there is a fixed shift


@contextmanager
def many() -> Iterator[None]:
    """Few pairs go the way of many."""
    backends = sys.modules["contrastive_kernels.backends"]
    with patch.object(engine, "FIXED_PAIRS", 0), patch.object(backends, "FEW_PRODUCTS", 0):
        yield


@contextmanager
def without_numbers() -> Iterator[None]:
    """What is launched depends on no number: none is drawn, and no library multiplies."""

    def zeros(*shape: Any, generator: object = None, **options: Any) -> Tensor:
        return torch.zeros(*shape, **options)

    def total(first: Tensor, *operands: Tensor, out: Tensor, **options: Any) -> Tensor:
        return out

    with patch.object(torch, "randn", zeros), patch.object(torch, "addmm", total):
        yield


def of_smoke(names: set[str]) -> dict[str, int]:
    """For each process: its dtype and number of features. Adds the names of its kernels."""
    counts = {}
    for name, dim in product(smoke.NAMES, smoke.DIMS):
        with counting(ARCHITECTURE) as counted, many():
            for family in smoke.chosen(list(FAMILIES), DTYPES[name], dim):
                FAMILIES[family](Inputs(DTYPES[name], dim, "cpu", exact=False))
        counts[f"{name} {dim}"] = len(counted.kernels)
        names |= {kernel for kernel, _ in counted.kernels}
    return counts


def of_case(case: Case, seen: set[tuple[str, str]]) -> int:
    """Those that no case before it has left in Triton's cache."""
    if case.group == "whitening":  # CUDA kernels, which the build has made
        return 0
    sizes = replace(case.sizes, n=min(case.sizes.n, LARGEST), m=min(case.sizes.m, LARGEST))
    small = replace(case.resized(sizes), backend="triton")
    step = small.step(small.under_test, small.tensors())
    with counting(ARCHITECTURE) as counted:
        step()
    new = set(counted.kernels) - seen
    seen |= new
    return len(new)


def of_tune() -> int:
    """Those of one tile, for each candidate."""
    (entry,) = tune.entries([TUNED.schedule], [TUNED.dim], ["half"])
    with counting(ARCHITECTURE) as counted:
        tune.workload(entry, torch.device("cpu"), LARGEST)()
    return len(counted.kernels) * len(tune.candidates(entry, ARCHITECTURE))


def counts() -> dict:
    seen: set[tuple[str, str]] = set()
    names: set[str] = set()
    return {
        "smoke": of_smoke(names),
        "names": sorted(names),
        "cases": {name: of_case(case, seen) for name, case in CASES.items()},
        "tune": of_tune(),
    }


if __name__ == "__main__":
    with without_numbers():
        json.dump(counts(), sys.stdout)
