"""How time and peak memory grow: with negatives, batch, features and threads.

python -m benchmarks.scaling: measures ours and the baselines, and draws docs/images/scaling_*.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch

from ..harness.apart import apart
from ..harness.console import Progress
from ..harness.environment import describe, results_path, save
from ..harness.implementations import OURS
from ..harness.memory_limit import free_bytes
from ..harness.paths import IMAGES, RESULTS
from .plot import draw
from .point import LONG_SECONDS, Task, attempt, find_truth, timings, write_keys
from .studies import RESIDENT_BYTES, STUDIES, Study

POINT_SECONDS = 90.0
BUDGET, QUICK_BUDGET = 1.5, 0.1
# Of the memory that is free when the run begins.
MEMORY_SHARE = 0.8
# Where nobody says what is free.
DEFAULT_BYTES = 8 * 10**9


def measure(task: Task, names: list[str], budget: float, progress: Progress) -> dict:
    """{name: {"milliseconds", "mb"} or {"reason"}} of ours and the baselines at a point."""
    progress("float64 oracle")
    failed = apart(2 * POINT_SECONDS, find_truth, task)
    if failed:
        return {name: {"reason": f"no oracle: {failed['reason']}"} for name in names}
    results = {}
    for name in names:
        progress(f"{name}, one call")
        results[name] = apart(POINT_SECONDS, attempt, task, name)
    short = [n for n, r in results.items() if r.get("seconds", LONG_SECONDS) < LONG_SECONDS]
    measured = {}
    if short:
        progress("time")
        measured = apart(POINT_SECONDS, timings, task, short, budget)
    for name, result in results.items():
        if "seconds" not in result:
            continue
        ms = 1e3 * result.pop("seconds")
        once = {"median": ms, "p20": ms, "p80": ms, "samples": 1}
        result["milliseconds"] = measured.get(name, once)
    return results


def run_study(
    study: Study, options: argparse.Namespace, folder: Path, limit: int, record: dict
) -> Iterator[None]:
    """Adds the points of a study to the record, one by one; an implementation that fails at one
    has ended."""
    left: list[str] = []
    for index, point in enumerate(study.points(options.quick)):
        left = left or [OURS, *(baseline.name for baseline in point.case.baselines)]
        threads = point.threads or options.threads
        keys = folder / "keys"
        if point.streamed and not keys.exists():
            largest = study.points(options.quick)[-1].case.sizes
            needed = 4 * largest.m * largest.d
            if shutil.disk_usage(folder).free < 1.2 * needed:
                print(f"  no room for a file of {needed / 1e9:.1f} GB in {folder}")
                return
            failed = apart(10 * POINT_SECONDS, write_keys, keys, largest.m, largest.d)
            if failed:
                print(f"  no file of negatives: {failed['reason']}")
                return
        progress = Progress(f"{study.name} {point.x}")
        task = Task(study.name, index, options.quick, threads, limit, keys, folder / "truth")
        results = measure(task, left, QUICK_BUDGET if options.quick else BUDGET, progress)
        progress.close()
        entry = {"x": point.x, "sizes": vars(point.case.sizes), "threads": threads}
        record["points"].append(entry | {"streamed": point.streamed, "results": results})
        for name, result in results.items():
            print(f"  {study.name} {point.x:>9,}  {name:40s} {told(result)}", flush=True)
        left = [name for name in left if "reason" not in results[name]]
        yield
        if not left:
            return


def told(result: dict) -> str:
    if "reason" in result:
        return result["reason"]
    mb = "" if result["mb"] is None else f"{result['mb']:10.1f} MB"
    return f"{result['milliseconds']['median']:10.2f} ms {mb}"


def run(options: argparse.Namespace, keep: Callable[[dict], None]) -> dict:
    """Measures the studies asked for; `keep` gets what there is after every point."""
    environment = describe(options.threads)
    free = free_bytes()
    limit = int(MEMORY_SHARE * (DEFAULT_BYTES if free is None else free))
    result = {
        "command": "python -m benchmarks.scaling" + (" --quick" if options.quick else ""),
        "date": date.today().isoformat(),
        "device_type": "cpu",
        "environment": environment,
        "memory_limit": limit,
        "resident_bytes": RESIDENT_BYTES,
        "point_seconds": POINT_SECONDS,
        "studies": {},
    }
    print(
        f"{environment['device']}, {options.threads} threads, torch {torch.__version__}; a process "
        f"may have {limit / 1e9:.1f} GB and a point {POINT_SECONDS:.0f} s"
    )
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for study in STUDIES.values():
                if options.study and study.name not in options.study:
                    continue
                rows = study.points(options.quick)[0].case.sizes.n
                title = study.title.format(n=rows)
                record = {"label": study.label, "title": title, "points": []}
                result["studies"][study.name] = record
                for _ in run_study(study, options, Path(folder), limit, record):
                    keep(result)
    except KeyboardInterrupt:
        print("stopped: what was measured is kept")
    return result


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--plot", action="store_true", help="only draw the results that there are")
    parser.add_argument("--study", action="append", choices=STUDIES, help="only this; repeatable")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--json", type=Path, help="the result; by default that of this device")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the plots")
    parser.add_argument("--folder", type=Path, help="for a temporary file of up to 8.6 GB")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    path = options.json
    if path is None:
        path = RESULTS / "scaling" / results_path(describe(options.threads)).name
        others = sorted(path.parent.glob("*.json"))
        if options.plot and others and not path.exists():
            path = others[-1]  # of another device
    kept = options.json is not None or not (options.quick or options.study)
    if options.plot:
        if not path.exists():
            print(f"no results: {path} does not exist")
            return 1
        result = json.loads(path.read_text())
    else:
        result = run(options, lambda result: save(path, result) if kept else None)
    if options.plot or kept:
        for image in draw(result, options.images):
            print(f"wrote {image.name}")
    return 0
