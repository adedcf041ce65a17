"""Peak memory of one step, in a process of its own.

The process is forked from one that has imported torch and this package and done nothing else. It
runs a tiny dense loss first (and a baseline its own loss, for what it imports late), and makes the
inputs. Then it loads what the step may need of the libraries' code, gives freed memory back to the
system, resets the high-water mark of its resident set, and runs the step once. The result is the
high-water mark minus the resident set before, minus the gradients that the step leaves in the
inputs. The loss under test has not run before, so that a workspace which it keeps for the next call
counts.
"""

import ctypes
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..baselines import dense
from ..cases.case import Case
from ..cases.step import BackwardStep, Step
from ..cases.table import CASES
from . import memory_limit
from .apart import apart
from .implementations import OURS
from .memory_limit import STATUS, bytes_of

CLEAR_REFS = Path("/proc/self/clear_refs")
MADV_POPULATE_READ = 22


def unsupported() -> str | None:
    """Why the high-water mark cannot be reset here, or None."""
    if not os.access(CLEAR_REFS, os.W_OK):
        return f"peak memory needs Linux and a writable {CLEAR_REFS}"
    return None


def _load_libraries() -> None:
    """Makes the files that are mapped resident: code that runs for the first time is no memory of
    the step. A kernel before 5.14 cannot, and counts it."""
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, *rest = line.split()
        if permissions.startswith("r") and rest[-1].startswith("/"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_POPULATE_READ)


def peak_of(step: Step) -> float:
    """Peak beyond inputs and gradients of one call, in MB (10^6 bytes)."""
    if isinstance(step, BackwardStep):
        step.prepare()
    _load_libraries()
    ctypes.CDLL(None).malloc_trim(0)
    # 5 resets the high-water mark; see proc_pid_clear_refs(5)
    CLEAR_REFS.write_text("5")
    before = bytes_of(STATUS, "VmRSS")
    step()
    peak = bytes_of(STATUS, "VmHWM")  # the high-water mark
    kept = sum(g.nbytes for g in step.gradients().values())
    return (peak - before - kept) / 1e6


def measure(case: Case, name: str, threads: int) -> dict:
    """`peak_of` ours or the baseline of this name, in a fresh process: {"mb" or "reason": ...}.

    The case is one of the table, perhaps with other sizes, dtype, pass or backend.
    """
    return apart(None, _measured, case.record(), name, threads)


def _measured(record: dict, name: str, threads: int) -> dict:
    """Runs in the process."""
    # what a package prints when it is imported belongs to nobody
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    torch.set_num_threads(threads)
    with memory_limit.limited():
        return {"mb": _peak(CASES[record["name"]].as_in(record), name)}


def _peak(case: Case, name: str) -> float:
    baseline = None if name == OURS else case.baseline(name)
    loss = case.under_test if baseline is None else baseline.load()
    tiny = [torch.randn(64, 128, dtype=case.dtype, requires_grad=True) for _ in range(2)]
    dense.info_nce(*tiny, temperature=0.1).backward()
    if baseline is not None:
        # what compiles does so for each size
        few = case if baseline.compiles else replace(case, sizes=case.sizes.tiny())
        few.step(loss, few.tensors())()
    return peak_of(case.step(loss, case.tensors()))
