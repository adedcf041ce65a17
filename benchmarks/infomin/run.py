"""How much should two views share? InfoMin's experiments (Tian et al. 2020) on photographs: patches
at growing distance, and colour channels, fixed or learned. About 20 minutes on one core.

python -m benchmarks.infomin           # train, and write results, plots and page
python -m benchmarks.infomin --quick   # two steps of everything, seconds: does it run?
"""

import argparse
import shlex
import sys
import time
from datetime import date
from pathlib import Path

import torch

from ..harness.environment import describe, save
from ..harness.paths import RESULTS
from . import photographs, report, view_training
from .parts import PARTS, QUICK, Settings

PACKAGES = ("numpy", "scikit-image", "scikit-learn")
CONSTANTS = {
    "patch": photographs.PATCH,
    "batch": view_training.BATCH,
    "features": view_training.FEATURES,
    "embedding": view_training.EMBEDDING,
    "temperature": view_training.TEMPERATURE,
    "rate": view_training.RATE,
    "flow_rate": view_training.FLOW_RATE,
}


def measure(part: str, settings: Settings, command: str, path: Path | None) -> None:
    """Runs one part; what it has is saved after each seed, and its records are printed."""
    start = time.process_time()
    result = {
        "part": part,
        "command": command,
        "date": date.today().isoformat(),
        "note": "one thread",
        "environment": describe(1, PACKAGES),
        "settings": settings._asdict() | CONSTANTS,
        "records": [],
    }
    for seed in range(settings.seeds):
        for record in PARTS[part](settings, seed):
            result["records"].append({"seed": seed, **record})
            print("  ".join(map(_shown, result["records"][-1].values())), flush=True)
        result["settings"]["seeds"] = seed + 1
        result["cpu_minutes"] = round((time.process_time() - start) / 60, 1)
        if path is not None:
            save(path, result)


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value}"


def main(argv: list[str] | None = None) -> int:
    """Trains what is asked for and writes it down; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.infomin",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one")
    parser.add_argument("--quick", action="store_true", help="nothing is kept, but by --output")
    parser.add_argument("--output", type=Path, help="the folder where results go")
    parser.add_argument("--plot", action="store_true", help="only draw the results again")
    parser.add_argument("--report", action="store_true", help="only write the page again")
    parser.add_argument(
        "--check", action="store_true", help="only compare the page; 1 when it disagrees"
    )
    options = parser.parse_args(argv)
    if options.check:
        return report.update(check=True)
    kept = not (options.quick or options.output)
    if not (options.plot or options.report):
        folder = RESULTS / "infomin" if kept else options.output
        command = shlex.join(["python", "-m", "benchmarks.infomin", *argv])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for part in options.part or PARTS:
                path = None if folder is None else folder / f"{part}.json"
                measure(part, QUICK if options.quick else Settings(), command, path)
        except KeyboardInterrupt:
            print("\nstopped; the parts and seeds that were finished are kept", file=sys.stderr)
            return 130
        finally:
            torch.set_num_threads(threads)
        if not kept:
            return 0
    if options.plot or not options.report:
        for path in report.plot():
            print(f"wrote {path.name}")
    if options.report or not options.plot:
        return report.update(check=False)
    return 0
