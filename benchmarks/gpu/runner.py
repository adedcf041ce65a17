"""Commands one after another, each with a time limit and a log."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from ..harness.paths import ROOT
from .plan import GRACE_SECONDS, TOTAL_SECONDS, Step

NO_TIME = "no time was left"


def grace(limit: float) -> float:
    """Seconds of a limit between the request to stop and the end."""
    return min(GRACE_SECONDS, limit / 3)


def run(step: Step, limit: float, out: Path) -> str | None:
    """Runs a step, its output on the terminal and in its log; why it failed, or None.

    Asked to stop as by Ctrl-C, pytest prints the tracebacks it has, and `bench` its tables.
    """
    if limit <= 0:
        return NO_TIME
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that a step is ended with all processes it started
        # who runs in the background may have been told to ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    stopped = threading.Event()

    def ask() -> None:
        stopped.set()
        process.send_signal(signal.SIGINT)

    def end() -> None:
        os.killpg(process.pid, signal.SIGKILL)

    timers = [threading.Timer(limit - grace(limit), ask), threading.Timer(limit, end)]
    for timer in timers:
        timer.start()
    with (out / f"{step.name}.log").open("w") as log:
        for text in process.stdout:
            sys.stdout.write(text)
            sys.stdout.flush()
            log.write(text)
            log.flush()
    status = process.wait()
    for timer in timers:
        timer.cancel()
    if stopped.is_set():
        return f"stopped after {limit - grace(limit):.1f} s"
    return f"exit status {status}" if status else None


def run_all(chosen: list[Step], out: Path, total: float = TOTAL_SECONDS) -> dict[str, str]:
    """Runs all steps within `total` seconds; name -> reason of those that failed.

    None takes the time of a later one, and the last takes what is left. steps.json has after each
    step how it went.
    """
    end = time.monotonic() + total
    failures, done = {}, []
    for i, step in enumerate(chosen):
        left = end - time.monotonic() - sum(later.seconds for later in chosen[i + 1 :])
        limit = left if i == len(chosen) - 1 else min(step.seconds, left)
        print(f"== {step.name}: {' '.join(step.command)}", flush=True)
        start = time.monotonic()
        failure = run(step, limit, out)
        if failure is not None:
            failures[step.name] = failure
        seconds = time.monotonic() - start
        print(f"== {step.name}: {failure or 'passed'}, {seconds:.0f} s\n", flush=True)
        done.append({"name": step.name, "failed": failure, "seconds": round(seconds, 1)})
        (out / "steps.json").write_text(json.dumps(done, indent=1))
    return failures
