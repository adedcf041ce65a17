"""Peak memory of one step, in a process of its own.

The process runs a tiny dense loss first, so that the libraries of a matrix multiply are loaded (and
a peer its own loss, for what it imports late), and makes the inputs. Then it gives freed memory
back to the system, resets the high-water mark of its resident set, and runs the step once. The
result is the high-water mark minus the resident set before, minus the gradients that the step
leaves in the inputs. The loss under test has not run before, so that a workspace which it keeps
for the next call counts.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from . import dense
from .case import Case
from .cases import CASES
from .measure import Step
from .peers import Lazy, Loss, PeerUnavailable

OURS = "ours"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLEAR_REFS = Path("/proc/self/clear_refs")


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


def peak_of(step: Step) -> float:
    """Peak beyond inputs and gradients of one call, in MB (10^6 bytes)."""
    ctypes.CDLL(None).malloc_trim(0)
    # 5 resets the high-water mark; see proc_pid_clear_refs(5)
    CLEAR_REFS.write_text("5")
    before = _resident("VmRSS")
    step()
    peak = _resident("VmHWM")
    kept = sum(g.nbytes for g in step.gradients().values())
    return (peak - before - kept) / 1e6


def measure(case: Case, contender: str, dtype: str, quick: bool, threads: int) -> dict:
    """`peak_of` in a fresh process: {"mb": ...} or {"reason": ...}."""
    command = [sys.executable, "-m", f"{__package__}.memory", case.name, contender, dtype]
    command += ["--threads", str(threads)] + (["--quick"] if quick else [])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"reason": lines[-1]}
    return json.loads(done.stdout)


def _loss(case: Case, contender: str) -> Loss:
    if contender == OURS:
        return case.loss.load() if isinstance(case.loss, Lazy) else case.loss
    return next(r.peer for r in case.rivals if r.peer.name == contender).load()


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one step of one case.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("contender", help=f"{OURS!r} or the name of a peer")
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case, dtype = CASES[options.case], DTYPES[options.dtype]
    try:
        loss = _loss(case, options.contender)
    except PeerUnavailable as reason:
        print(json.dumps({"reason": str(reason)}))
        return
    tiny = [torch.randn(64, 128, dtype=dtype, requires_grad=True) for _ in range(2)]
    dense.info_nce(*tiny, temperature=0.1).backward()
    if options.contender != OURS:
        few = case.tensors(replace(case.sizes, n=64, m=64), dtype)
        Step(loss, few, case.options, case.backward)()
    tensors = case.tensors(case.sizes.quick() if options.quick else case.sizes, dtype)
    print(json.dumps({"mb": peak_of(Step(loss, tensors, case.options, case.backward))}))


if __name__ == "__main__":
    main()
