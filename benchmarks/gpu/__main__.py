"""What `make gpu` runs on a machine with a GPU and no network: build, tests, sanitizer, benchmarks.

Every stage has a time limit and a log, and runs even if one before it failed; the exit status says
whether anything did. The build is one of the stages, so nothing here imports torch.
"""

import argparse
import sys
import time
from pathlib import Path

from ..harness.paths import RESULTS
from .runner import copy_results, run_all, stages


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="logs and results")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    failures = run_all(stages(), out)
    copy_results(start, RESULTS, out)
    for name, reason in failures.items():
        print(f"FAILED: {name}: {reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
