"""What `make gpu` runs on a machine with a GPU and no network: build, tests, sanitizer, benchmarks.

Every step has a time limit and a log, and runs even if one before it failed; the exit status says
whether anything did. The build is one of the steps, so nothing here imports torch.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOTAL_SECONDS = 530.0
NO_SANITIZER = "compute-sanitizer is not on PATH: left out"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: also that of its log, name.log.
        seconds: its time limit.
        environment: variables set beside those of this process.
        reserved: steps before it must leave it all of its time.
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    reserved: bool = False


def steps() -> list[Step]:
    """Every step, with this interpreter."""
    python = sys.executable
    on_gpu = {"CK_TEST_DEVICE": "cuda"}
    tests = [python, "-m", "pytest", "-q", "--maxfail=20", "tests"]
    smoke = [python, "-m", "pytest", "-q", "-m", "smoke", "tests"]
    build = [python, "setup.py", "build_ext", "--inplace"]
    chosen = [
        Step("build", build, 180, {"CK_FORCE_BUILD": "1"}),
        Step("tests", tests, 240, on_gpu),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print(NO_SANITIZER)
    else:
        # the caching allocator would hide accesses beyond a tensor
        environment = on_gpu | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *smoke]
            chosen.append(Step(tool, command, 60, environment))
    benchmarks = [python, "-m", "contrastive_kernels", "bench", "--device", "cuda"]
    return [*chosen, Step("benchmarks", benchmarks, 240, reserved=True)]


def run(step: Step, limit: float, out: Path) -> str | None:
    """Runs a step, its output on the terminal and in its log; why it failed, or None."""
    if limit <= 0:
        return "no time was left"
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that a step is stopped with all processes it started
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    with (out / f"{step.name}.log").open("w") as log:
        for text in process.stdout:
            sys.stdout.write(text)
            sys.stdout.flush()
            log.write(text)
            log.flush()
    status = process.wait()
    timer.cancel()
    if stopped.is_set():
        return f"stopped after {limit:.1f} s"
    return f"exit status {status}" if status else None


def run_all(chosen: list[Step], out: Path, total: float = TOTAL_SECONDS) -> dict[str, str]:
    """Runs all steps within `total` seconds; name -> reason of those that failed."""
    end = time.monotonic() + total
    failures = {}
    for i, step in enumerate(chosen):
        later = sum(s.seconds for s in chosen[i + 1 :] if s.reserved)
        limit = min(step.seconds, end - time.monotonic() - later)
        print(f"== {step.name}: {' '.join(step.command)}", flush=True)
        start = time.monotonic()
        failure = run(step, limit, out)
        if failure is not None:
            failures[step.name] = failure
        print(f"== {step.name}: {failure or 'passed'}, {time.monotonic() - start:.0f} s\n")
    return failures


def copy_results(since: float, results: Path, out: Path) -> None:
    """Copies the result files written at or after `since`, in seconds of the epoch."""
    for path in results.glob("*.json"):
        if path.stat().st_mtime >= since:
            shutil.copy(path, out)
            print(f"copied {path.name} to {out}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="logs and results")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    failures = run_all(steps(), out)
    copy_results(start, RESULTS, out)
    for name, reason in failures.items():
        print(f"FAILED: {name}: {reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
