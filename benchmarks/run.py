"""Measures the cases and writes the result as JSON: python -m benchmarks.run --help"""

import argparse
import sys
import time
from datetime import date
from pathlib import Path

import torch

import contrastive_kernels as ck

from . import gpu_instruments, gpu_measure, gpu_report, memory
from .case import Case
from .cases import BFLOAT16_AT_MOST, CASES, MEMORY_CASES, MEMORY_LIMIT_MB
from .check import PEER_FLOAT32, TOLERANCE, checked, checked_peers
from .console import Progress, judged, line
from .environment import describe, describe_gpu, results_path, save
from .gpu_cases import GPU_CASES
from .inputs import Sizes
from .measure import Timing, gemm_flops, interleave

FULL_BUDGET, QUICK_BUDGET = 15.0, 0.3
# Seconds into a run on a GPU after which no peer is compiled, and no case begins.
COMPILE_UNTIL, CASES_UNTIL = 110.0, 200.0
OURS_BFLOAT16 = "ours, bfloat16"


def measure_speed(case: Case, quick: bool, gemm: dict[str, float]) -> dict:
    """Checks, then times a case and its peers; the JSON record of the case."""
    sizes = case.sizes.quick() if quick else case.sizes
    record = {"name": case.name, "group": case.group, "sizes": vars(sizes)}
    record |= {"frozen": case.frozen, "backward": case.backward}
    print(f"{case.name}  N={sizes.n} M={sizes.m} D={sizes.d} K={sizes.k}")
    progress = Progress(case.name)
    progress("float64 oracle")
    tensors = case.tensors(sizes)
    truth = case.oracle(tensors, case.options, case.backward)
    step, wrong = checked(case, case.loss, tensors, truth, TOLERANCE[torch.float32])
    if wrong:
        progress.close()
        print(f"  FAILED: {wrong}")
        return record | {"failed": wrong}
    record["peers"], steps = checked_peers(
        case, tensors, truth, PEER_FLOAT32, progress, bounded=not quick
    )
    steps = {memory.OURS: step} | steps
    if case.group == "large":
        progress("float64 oracle, bfloat16")
        rounded = case.tensors(sizes, torch.bfloat16)
        truth = case.oracle(rounded, case.options, case.backward)
        step, wrong = checked(case, case.loss, rounded, truth, TOLERANCE[torch.bfloat16])
        if wrong:
            record["bfloat16"] = {"failed": wrong}
        else:
            record["bfloat16"] = {"at_most": None if quick else BFLOAT16_AT_MOST}
            steps[OURS_BFLOAT16] = step
    timings = interleave(steps, QUICK_BUDGET if quick else FULL_BUDGET, progress)
    progress.close()
    return add_timings(record, case, sizes, timings, gemm)


def add_timings(
    record: dict, case: Case, sizes: Sizes, timings: dict[str, Timing], gemm: dict[str, float]
) -> dict:
    """Puts the timings and their ratios in the record, and prints them."""

    def entry(name: str, dtype: str) -> dict:
        result = {"milliseconds": timings[name]._asdict()}
        if case.flops is not None:
            rate = case.flops(sizes) / (1e-3 * timings[name].median)
            result |= {"gflops": rate / 1e9, "gemm_fraction": rate / gemm[dtype]}
        return result

    def note(result: dict) -> str:
        if case.flops is None:
            return ""
        return f"{result['gflops']:.0f} GFLOP/s, {result['gemm_fraction']:.0%} of GEMM"

    ours = timings[memory.OURS]
    record["ours"] = entry(memory.OURS, "float32")
    line(memory.OURS, ours, note(record["ours"]))
    if OURS_BFLOAT16 in timings:
        timing, result = timings[OURS_BFLOAT16], record["bfloat16"]
        result |= entry(OURS_BFLOAT16, "bfloat16") | {"ratio": timing.median / ours.median}
        comparison = judged(result["ratio"], result["at_most"])
        line(OURS_BFLOAT16, timing, f"{comparison} of float32; {note(result)}")
    elif "bfloat16" in record:
        print(f"  {OURS_BFLOAT16:40s} FAILED: {record['bfloat16']['failed']}")
    for peer in record["peers"]:
        if peer["name"] not in timings:
            print(f"  {peer['name']:40s} {peer['reason']}")
            continue
        timing = timings[peer["name"]]
        peer["milliseconds"] = timing._asdict()
        peer["ratio"] = ours.median / timing.median
        line(peer["name"], timing, judged(peer["ratio"], peer["at_most"]))
    return record


def measure_memory(case: Case, quick: bool, threads: int) -> dict:
    """Peak memory of the case in both dtypes, and of its peers: {contender: {"mb" or "reason"}}."""
    results = {}
    contenders = [(memory.OURS, "float32"), (memory.OURS, "bfloat16")]
    contenders += [(rival.peer.name, "float32") for rival in case.rivals]
    progress = Progress(f"{case.name}, memory")
    for contender, dtype in contenders:
        progress(f"{contender}, {dtype}")
        result = memory.measure(case, contender, dtype, quick, threads)
        name = OURS_BFLOAT16 if dtype == "bfloat16" else contender
        results[name] = result
        progress.close()
        if "reason" in result:
            print(f"  {name:40s} no peak memory: {result['reason']}")
            continue
        limit = ""
        if contender == memory.OURS:
            met = "met" if result["mb"] <= MEMORY_LIMIT_MB else "NOT MET"
            limit = f"(at most {MEMORY_LIMIT_MB}: {met})"
        print(f"  {name:40s} {result['mb']:10.1f} MB peak  {limit}", flush=True)
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Time, and peak memory, of the losses beside their peers on this machine.",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu by default")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this")
    parser.add_argument("--group", action="append", metavar="NAME", help="only cases of this group")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument(
        "--memory", action="store_true", help="measure peak memory as well; always done on a GPU"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on a CPU (2)")
    parser.add_argument(
        "--json", type=Path, help="result file; without it only a full run writes one"
    )
    options = parser.parse_args()
    cases = GPU_CASES if options.device == "cuda" else CASES
    groups = sorted({case.group for case in cases.values()})
    for name in options.group or ():
        if name not in groups:
            parser.error(f"--group must be one of {', '.join(groups)}, got {name}")
    for name in options.case or ():
        if name not in cases:
            parser.error(f"--case must be one of {', '.join(cases)}, got {name}")
    return options


def command_line(options: argparse.Namespace) -> str:
    """The command that repeats this run."""
    words = ["python -m benchmarks.run"]
    on_gpu = options.device == "cuda"
    words += ["--device cuda"] if on_gpu else [f"--threads {options.threads}"]
    words += ["--quick"] if options.quick else []
    words += ["--memory"] if options.memory else []
    words += [f"--group {name}" for name in options.group or ()]
    words += [f"--case {name}" for name in options.case or ()]
    return " ".join(words)


def main() -> int:
    options = arguments()
    cases = GPU_CASES if options.device == "cuda" else CASES
    if options.list:
        print("\n".join(cases))
        return 0
    chosen = [cases[name] for name in options.case or cases]
    chosen = [case for case in chosen if not options.group or case.group in options.group]
    return run_on_gpu(chosen, options) if options.device == "cuda" else run_on_cpu(chosen, options)


def head(options: argparse.Namespace, environment: dict) -> dict:
    """What every result begins with."""
    return {
        "command": command_line(options),
        "date": date.today().isoformat(),
        "device_type": options.device,
        "environment": environment,
    }


def path_of(options: argparse.Namespace, environment: dict) -> Path | None:
    """Where the result goes; None: a part of a run, or a quick one, is not kept."""
    if options.json is None and not (options.quick or options.case or options.group):
        return results_path(environment)
    return options.json


def finish(records: list[dict], path: Path | None) -> int:
    """Names the file and what failed; the exit status."""
    if path is not None:
        print(f"wrote {path.name}")
    failed = [record["name"] for record in records if "failed" in record]
    failed += [r["name"] for r in records if "failed" in r.get("bfloat16", {})]
    if failed:
        print("FAILED: " + ", ".join(failed))
    return 1 if failed else 0


def run_on_gpu(cases: list[Case], options: argparse.Namespace) -> int:
    start = time.monotonic()
    if not torch.cuda.is_available():
        print("--device cuda needs a GPU: torch.cuda.is_available() is False")
        return 1
    environment = describe_gpu()
    path = path_of(options, environment)
    print(
        f"{environment['device']} ({environment['capability']}), driver {environment['driver']}, "
        f"torch {torch.__version__}, commit {environment['commit']}"
    )
    if environment["backend"] == "reference":
        print(f"warning: ours is the dense reference: {ck.backends()['triton'].reason}")
    gemm = gpu_instruments.gemm_flops("cuda")
    print(f"bfloat16 matrix product of 8192^3: {gemm / 1e12:.0f} TFLOP/s", flush=True)
    records: list[dict] = []
    result = head(options, environment) | {"gemm_tflops": gemm / 1e12, "cases": records}
    for case in cases:
        elapsed = time.monotonic() - start
        print(f"[{elapsed:.0f} s]", end=" ")
        record = gpu_measure.measure(
            case,
            "cuda",
            gemm,
            quick=options.quick,
            may_compile=elapsed < COMPILE_UNTIL,
            may_begin=elapsed < CASES_UNTIL,
        )
        records.append(record)
        if path is not None:
            # after each case: a run that is cut short leaves what it has measured
            save(path, result)
    print("\n".join(["", *gpu_report.section(result)]))
    return finish(records, path)


def run_on_cpu(cases: list[Case], options: argparse.Namespace) -> int:
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
    if environment["load"] > 0.5:
        print(f"warning: the machine is not idle (load {environment['load']})")
    gemm = {name: gemm_flops(dtype) for name, dtype in memory.DTYPES.items()}
    print("GEMM rate: " + ", ".join(f"{n} {rate / 1e9:.0f} GFLOP/s" for n, rate in gemm.items()))
    records = []
    for case in cases:
        record = measure_speed(case, options.quick, gemm)
        if with_memory and case.name in MEMORY_CASES and "failed" not in record:
            record["memory"] = measure_memory(case, options.quick, options.threads)
        records.append(record)
    result = head(options, environment) | {
        "gemm_gflops": {name: rate / 1e9 for name, rate in gemm.items()},
        "memory_limit_mb": MEMORY_LIMIT_MB,
        "cases": records,
    }
    path = path_of(options, environment)
    if path is not None:
        save(path, result)
    return finish(records, path)


if __name__ == "__main__":
    sys.exit(main())
