"""Peak memory of one step, in a process of its own.

The process is forked from one that has imported torch and this package and done nothing else. It
runs a tiny dense loss first (and a peer its own loss, for what it imports late), and makes the
inputs. Then it loads what the step may need of the libraries' code, gives freed memory back to the
system, resets the high-water mark of its resident set, and runs the step once. The result is the
high-water mark minus the resident set before, minus the gradients that the step leaves in the
inputs. The loss under test has not run before, so that a workspace which it keeps for the next call
counts.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

from . import dense, headroom
from .case import Case
from .cases import CASES
from .check import first_line
from .contenders import OURS
from .measure import BackwardStep, Step
from .peers import PeerUnavailable

CLEAR_REFS = Path("/proc/self/clear_refs")
MADV_POPULATE_READ = 22


def unsupported() -> str | None:
    """Why the high-water mark cannot be reset here, or None."""
    if not os.access(CLEAR_REFS, os.W_OK):
        return f"peak memory needs Linux and a writable {CLEAR_REFS}"
    return None


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (high-water mark) in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


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
    before = _resident("VmRSS")
    step()
    peak = _resident("VmHWM")
    kept = sum(g.nbytes for g in step.gradients().values())
    return (peak - before - kept) / 1e6


def measure(case: Case, contender: str, threads: int) -> dict:
    """`peak_of` in a fresh process: {"mb": ...} or {"reason": ...}.

    The case is one of the table, perhaps with other sizes, dtype, passes or backend.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    changes = {name: getattr(case, name) for name in ("sizes", "dtype", "passes", "backend")}
    process = context.Process(
        target=_send, args=(sender, case.name, changes, contender, threads), daemon=True
    )
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return {"reason": f"its process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _context() -> ForkServerContext:
    """Processes forked from a server that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    # torch imports the compiler when an operator written in Python is first called
    context.set_forkserver_preload(["torch._dynamo", "contrastive_kernels", __name__])
    # Ctrl-C reaches every process of the terminal, but the parent alone decides: the server and
    # all that it forks inherit that they ignore it. It finds modules where this process does.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _search_path():
            forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)
    return context


@contextmanager
def _search_path() -> Iterator[None]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _send(sender: Connection, name: str, changes: dict, contender: str, threads: int) -> None:
    """Runs in the process: sends the result."""
    # what a peer prints when it is imported belongs to nobody
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    torch.set_num_threads(threads)
    try:
        with headroom.limited():
            sender.send({"mb": _peak(replace(CASES[name], **changes), contender)})
    except PeerUnavailable as reason:
        sender.send({"reason": str(reason)})
    except Exception as failure:
        sender.send({"reason": first_line(failure)})


def _peak(case: Case, contender: str) -> float:
    peer = None
    if contender != OURS:
        peer = next(rival.peer for rival in case.rivals if rival.peer.name == contender)
    loss = case.under_test if peer is None else peer.load()
    tiny = [torch.randn(64, 128, dtype=case.dtype, requires_grad=True) for _ in range(2)]
    dense.info_nce(*tiny, temperature=0.1).backward()
    if peer is not None:
        # what compiles does so for each size
        few = case if peer.compiles else replace(case, sizes=case.sizes.tiny())
        few.step(loss, few.tensors())()
    return peak_of(case.step(loss, case.tensors()))
