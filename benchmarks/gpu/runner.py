"""Commands one after another, each with a time limit and a log."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..harness.paths import ROOT

TOTAL_SECONDS = 530.0
NO_SANITIZER = "compute-sanitizer is not on PATH: left out"


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: also that of its log, name.log.
        seconds: its time limit.
        environment: variables set beside those of this process.
        reserved: stages before it must leave it all of its time.
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    reserved: bool = False


def stages() -> list[Stage]:
    """Every stage, with this interpreter."""
    python = sys.executable
    on_gpu = {"CK_TEST_DEVICE": "cuda"}
    tests = [python, "-m", "pytest", "-q", "--maxfail=20", "tests"]
    smoke = [python, "-m", "pytest", "-q", "-m", "smoke", "tests"]
    build = [python, "setup.py", "build_ext", "--inplace"]
    chosen = [
        Stage("build", build, 180, {"CK_FORCE_BUILD": "1"}),
        Stage("tests", tests, 240, on_gpu),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print(NO_SANITIZER)
    else:
        # the caching allocator would hide accesses beyond a tensor
        environment = on_gpu | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *smoke]
            chosen.append(Stage(tool, command, 60, environment))
    benchmarks = [python, "-m", "contrastive_kernels", "bench", "--device", "cuda"]
    return [*chosen, Stage("benchmarks", benchmarks, 240, reserved=True)]


def run(stage: Stage, limit: float, out: Path) -> str | None:
    """Runs a stage, its output on the terminal and in its log; why it failed, or None."""
    if limit <= 0:
        return "no time was left"
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that a stage is stopped with all processes it started
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    with (out / f"{stage.name}.log").open("w") as log:
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


def run_all(chosen: list[Stage], out: Path, total: float = TOTAL_SECONDS) -> dict[str, str]:
    """Runs all stages within `total` seconds; name -> reason of those that failed."""
    end = time.monotonic() + total
    failures = {}
    for i, stage in enumerate(chosen):
        later = sum(s.seconds for s in chosen[i + 1 :] if s.reserved)
        limit = min(stage.seconds, end - time.monotonic() - later)
        print(f"== {stage.name}: {' '.join(stage.command)}", flush=True)
        start = time.monotonic()
        failure = run(stage, limit, out)
        if failure is not None:
            failures[stage.name] = failure
        print(f"== {stage.name}: {failure or 'passed'}, {time.monotonic() - start:.0f} s\n")
    return failures


def copy_results(since: float, results: Path, out: Path) -> None:
    """Copies the result files written at or after `since`, in seconds of the epoch."""
    for path in results.glob("*.json"):
        if path.stat().st_mtime >= since:
            shutil.copy(path, out)
            print(f"copied {path.name} to {out}")
