"""What `make gpu` runs on a machine with a GPU and no network: see plan.py.

Every step has a time limit and a log, and runs even if one before it failed; the exit status says
whether anything did. The build is one of the steps, so nothing here imports torch.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from ..harness.paths import ROOT
from .plan import SANITIZER, TOTAL_SECONDS, Step, expected, steps
from .runner import run_all


def counted() -> dict:
    command = [sys.executable, "-m", "benchmarks.gpu.count"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def number_of_tests(step: Step) -> str:
    """As collected for the CPU, which has tests of one backend more."""
    command = [*step.command, "--collect-only", "-qq", "-p", "no:xdist"]
    at = command.index("-n") if "-n" in command else len(command)
    command = [*command[:at], *command[at + 2 :]] if at < len(command) else command
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return str(sum("::" in row for row in done.stdout.splitlines()))


def table(chosen: list[Step], tests: str) -> str:
    """The plan: what each step compiles, how long it should and may take, and what it leaves."""
    counts = counted()
    times = expected(chosen, counts)
    rows = [f"{'step':12s}{'kernels':>9s}{'expected s':>12s}{'allotted s':>12s}  result"]
    for step in chosen:
        kernels, seconds = times[step.name]
        number = "as they come" if step.name == "tests" else str(kernels)
        rows.append(
            f"{step.name:12s}{number:>9s}{seconds:12.0f}{step.seconds:12.0f}  {step.result}"
        )
    total = sum(step.seconds for step in chosen)
    rows.append(f"{'all':12s}{'':9s}{'':12s}{total:12.0f}  of {TOTAL_SECONDS:.0f}; steps.json")
    cases = ", ".join(f"{name} {count}" for name, count in counts["cases"].items())
    return "\n".join([*rows, f"kernels of the cases: {cases}", f"tests: {tests}"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="logs and results")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; needs no GPU")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    chosen = steps(out)
    if not any(step.name == "memcheck" for step in chosen):
        print(f"{SANITIZER} is not on PATH: left out")
    if options.dry_run:
        print(table(chosen, number_of_tests(chosen[-1])))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    failures = run_all(chosen, out)
    for name, reason in failures.items():
        print(f"FAILED: {name}: {reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
