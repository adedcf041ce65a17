"""The benchmark command: python -m contrastive_kernels bench --help"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import date
from pathlib import Path

import torch

import contrastive_kernels as ck

from .base import builds, compare
from .base.worker import Ended, Worker
from .cases.case import Case
from .cases.step import DTYPES
from .cases.table import MEMORY_LIMIT_MB
from .gpu import alone as gpu_alone
from .gpu import instruments as gpu_instruments
from .gpu import measure as gpu_measure
from .gpu import report as gpu_report
from .grid import point as grid_point
from .grid import run as grid_run
from .harness import measure as cpu_measure
from .harness import memory
from .harness.console import HEAD, rows, summary
from .harness.environment import describe, describe_gpu, results_path, save
from .harness.paths import IN_CHECKOUT
from .harness.timing import gemm_flops
from .options import PROGRAM, SIZES, named, parse

# Seconds of a run of the whole table on a GPU, within its step of `make gpu`, and of one case.
GPU_SECONDS, GPU_CASE_SECONDS = 170.0, 30.0
UNUSABLE, INTERRUPTED = 2, 130
# measure(case, how many come before it); None where a second measurement has no better record
Measure = Callable[[Case, int], dict | None]


def main(argv: list[str]) -> int:
    """Run the benchmarks with these command-line options; return the exit status."""
    options, cases = parse(argv)
    if options.list:
        print("\n".join(_listed(case) for case in cases))
        return 0
    if options.grid:
        return _on_grid(options, cases)
    begin = _on_gpu if options.device == "cuda" else _on_cpu
    if options.base:
        begin = _against_base
    records: list[dict] = []
    try:
        with begin(options, cases) as (head, measure):
            result = head | {"cases": records}
            path = _path(options, result["environment"])
            for done, case in enumerate([*cases, *(cases if _whole_gpu(options) else [])]):
                record = measure(case, done)
                if done < len(cases):
                    records.append(record)
                elif record is not None:
                    records[done - len(cases)] = record
                if path is not None:
                    # after each case: a run that is cut short leaves what it has measured
                    save(path, result)
    except (builds.Unusable, Ended) as reason:
        print(f"--base: {reason}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print(f"\nstopped: {len(records)} of {len(cases)} cases are measured")
        if records:
            _end(options, result, path)
        return INTERRUPTED
    return _end(options, result, path)


def command_line(options: argparse.Namespace) -> str:
    """The command that repeats this run, but for where its results go."""
    words = [PROGRAM]
    for name, value in vars(options).items():
        flag = (
            f"-{name.upper()}" if name in SIZES else "--pass" if name == "passes" else f"--{name}"
        )
        left_out = name in ("json", "plot", "list", "again") or value in (
            None,
            False,
            "auto",
            "cpu",
        )
        if name == "memory":
            words += [] if value else ["--no-memory"]
        elif name == "threads" and options.device == "cuda" or left_out:
            continue
        elif value is True:
            words.append(flag)
        else:
            values = value if isinstance(value, list) else [value]
            words += [flag, *(f"'{v}'" if " " in str(v) else str(v) for v in values)]
    return " ".join(words)


def _listed(case: Case) -> str:
    sizes = " ".join(f"{name.upper()}={value}" for name, value in vars(case.sizes).items())
    baselines = "; ".join(baseline.name for baseline in case.baselines)
    return f"{case.name:58s} {case.group:10s} {sizes:32s} {baselines}"


def _head(options: argparse.Namespace, environment: dict) -> dict:
    """What every result begins with."""
    return {
        "command": command_line(options),
        "date": date.today().isoformat(),
        "device_type": options.device,
        "environment": environment,
    }


def _part(options: argparse.Namespace) -> bool:
    """Whether it is less than the whole table."""
    chosen = named(options) or options.dtype or options.peer or options.passes or options.base
    return bool(chosen or options.backend != "auto")


def _whole_gpu(options: argparse.Namespace) -> bool:
    """Whether each case is measured in a process of its own, and again with what compiles."""
    return options.device == "cuda" and not (_part(options) or options.quick)


def _path(options: argparse.Namespace, environment: dict) -> Path | None:
    """Where the result goes; None: a part of the table is not kept unless it is asked for."""
    if options.json is not None:
        return options.json
    if not _part(options) and IN_CHECKOUT:
        return results_path(environment)
    return None


def _end(options: argparse.Namespace, result: dict, path: Path | None) -> int:
    """Says what came out and where it is; the exit status."""
    records = result["cases"]
    if options.device == "cuda" and not options.base:
        print("\n".join(["", *gpu_report.section(result)]))
    text = summary(records)
    if text is not None:
        print(text)
    if options.plot is not None:
        from .harness.plot import draw  # its packages are optional

        print("drew " + ", ".join(file.name for file in draw(result, options.plot)))
    if path is not None:
        print(f"wrote {path.name}")
    failed = [record["name"] for record in records if "failed" in record]
    failed += [r["name"] for r in records if "failed" in r.get("bfloat16", {})]
    if failed:
        print("FAILED: " + ", ".join(failed))
    return 1 if failed else 0


def _warn_of_load(environment: dict) -> None:
    load = environment.get("load", 0.0)  # which a GPU has not
    if load > 0.5:
        print(f"warning: the machine is not idle (load {load})")


@contextmanager
def _on_gpu(options: argparse.Namespace, cases: list[Case]) -> Iterator[tuple[dict, Measure]]:
    """The head of the result, and how a case is measured."""
    start = time.monotonic()
    environment = describe_gpu()
    print(
        f"{environment['device']} ({environment['capability']}), driver {environment['driver']}, "
        f"torch {torch.__version__}, commit {environment['commit']}"
    )
    if environment["backend"] == "reference":
        print(f"warning: ours is the dense reference: {ck.backends()['triton'].reason}")
    gemm = gpu_instruments.gemm_flops("cuda")
    print(f"bfloat16 matrix product of 8192^3: {gemm / 1e12:.0f} TFLOP/s", flush=True)
    budget = gpu_measure.QUICK_BUDGET if options.quick else gpu_measure.FULL_BUDGET

    def measure(case: Case, done: int) -> dict:
        print(f"[{done + 1}/{len(cases)}]", end=" ")
        return gpu_measure.measure(case, "cuda", gemm, budget=budget)

    def measure_alone(case: Case, done: int) -> dict | None:
        left = GPU_SECONDS - (time.monotonic() - start)
        again = done >= len(cases)
        compiles = any(baseline.compiles for baseline in case.baselines)
        if again and (left < GPU_CASE_SECONDS or not compiles):
            return None
        print(f"[{done % len(cases) + 1}/{len(cases)}]", end=" ", flush=True)
        if left <= 0:
            record = gpu_measure.measure(case, "cuda", gemm, may_begin=False)
        else:
            seconds = min(left, GPU_CASE_SECONDS)
            record = alone.measure(case, seconds, gemm=gemm, budget=budget, may_compile=again)
        return None if again and "failed" in record else record

    head = _head(options, environment) | {"gemm_tflops": gemm / 1e12}
    if not _whole_gpu(options):
        yield head, measure
        return
    with closing(gpu_alone.Alone()) as alone:
        yield head, measure_alone


@contextmanager
def _on_cpu(options: argparse.Namespace, cases: list[Case]) -> Iterator[tuple[dict, Measure]]:
    """The head of the result, and how a case is measured."""
    with_memory, reason = options.memory, memory.unsupported()
    if with_memory and reason:
        print(f"no peak memory: {reason}")
        with_memory = False
    torch.set_num_threads(options.threads)
    environment = describe(options.threads)
    print(
        f"{environment['device']}, {environment['capability']}, {options.threads} threads, "
        f"torch {torch.__version__}, commit {environment['commit']}"
    )
    if environment["backend"] == "reference":
        print(f"warning: ours is the dense reference: {ck.backends()['cpu'].reason}")
    _warn_of_load(environment)
    used = {case.dtype for case in cases} | {torch.float32, torch.bfloat16}
    gemm = {name: gemm_flops(dtype) for name, dtype in DTYPES.items() if dtype in used}
    print("GEMM rate: " + ", ".join(f"{n} {rate / 1e9:.0f} GFLOP/s" for n, rate in gemm.items()))
    print(HEAD, flush=True)
    effort = cpu_measure.QUICK if options.quick else cpu_measure.FULL

    def measure(case: Case, done: int) -> dict:
        record = cpu_measure.measure(
            case,
            gemm,
            options.threads,
            effort=effort,
            with_memory=with_memory,
            count=f"[{done + 1}/{len(cases)}] ",
        )
        limit = MEMORY_LIMIT_MB if case.bounded else None
        print("\n".join(rows(record, limit)), flush=True)
        return record

    head = _head(options, environment) | {
        "gemm_gflops": {name: rate / 1e9 for name, rate in gemm.items()},
        "memory_limit_mb": MEMORY_LIMIT_MB,
    }
    yield head, measure


def _on_grid(options: argparse.Namespace, cases: list[Case]) -> int:
    """The run of the grid; the exit status."""
    torch.set_num_threads(options.threads)
    environment = describe(options.threads, ())
    environment |= {"isa": grid_run.isa(environment)}
    part = options.quick or options.peer or options.passes or options.backend != "auto"
    path = options.json
    if path is None and IN_CHECKOUT and not part:
        path = grid_run.result_path(environment)
    try:
        run = grid_run.Run(cases, path, _head(options, environment), again=options.again)
    except ValueError as reason:
        print(f"--grid: {reason}", file=sys.stderr)
        return UNUSABLE
    print(", ".join(grid_run.identity(environment)) + f", commit {environment['commit']}")
    _warn_of_load(environment)
    if run.skipped:
        print(f"{run.skipped} of {len(cases)} points are in {path.name}")
    effort = grid_point.QUICK if options.quick else grid_point.FULL
    seconds = None if options.minutes is None else 60.0 * options.minutes
    records: list[dict] = []
    try:
        for record, rest in run.measure(effort, seconds):
            records.append(record)
            print(grid_run.row(record, rest), flush=True)
    except KeyboardInterrupt:
        print(f"\nstopped: {len(records)} of {len(run.left)} points are measured")
        status = INTERRUPTED
    else:
        print(f"{len(records)} of {len(run.left)} points are measured")
        status = int(any("failed" in record for record in records))
    print(grid_run.told(run.result["points"]))
    if options.plot is not None and run.result["points"]:
        from .grid.plot import draw  # its packages are optional

        print("drew " + ", ".join(file.name for file in draw(run.result, options.plot)))
    if path is not None and records:
        print(f"wrote {path.name}")
    return status


@contextmanager
def _against_base(options: argparse.Namespace, cases: list[Case]) -> Iterator[tuple[dict, Measure]]:
    """The head of the result, and how a case is measured, on two builds that work meanwhile."""
    base = builds.find(options.base)
    on_gpu = options.device == "cuda"
    environment = describe_gpu() if on_gpu else describe(options.threads, ())
    settings = options.device, options.threads
    with (
        closing(Worker(builds.current(), *settings)) as ours,
        closing(Worker(base, *settings)) as theirs,
    ):
        threads = "" if on_gpu else f", {options.threads} threads"
        print(f"{environment['device']}{threads}, torch {torch.__version__}")
        _warn_of_load(environment)
        for name, worker in (("ours", ours), ("base", theirs)):
            print(f"{name}: {worker.build.name}, contrastive_kernels {worker.version}")
            if worker.reason is not None:
                print(f"warning: {name} is the dense reference: {worker.reason}")
        print(compare.HEAD, flush=True)
        effort = cpu_measure.QUICK if options.quick else cpu_measure.FULL

        def measure(case: Case, done: int) -> dict:
            count = f"[{done + 1}/{len(cases)}] "
            record = compare.measure(case, ours, theirs, effort, count)
            print(compare.row(record), flush=True)
            return record

        head = _head(options, environment)
        yield head | {"base": {"commit": base.name, "version": theirs.version}}, measure
