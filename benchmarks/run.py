"""Measures the cases and writes the result as JSON: python -m benchmarks.run --help"""

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

import torch

import contrastive_kernels as ck
from benchmarks import memory
from benchmarks.cases import (
    BFLOAT16_AT_MOST,
    CASES,
    MEMORY_CASES,
    MEMORY_LIMIT_MB,
    Case,
)
from benchmarks.environment import describe, results_path
from benchmarks.inputs import Sizes
from benchmarks.measure import Step, Timing, error, gemm_flops, interleave
from benchmarks.oracle import Tensors, Truth
from benchmarks.peers import Loss, PeerUnavailable

FULL_BUDGET, QUICK_BUDGET = 40.0, 0.3
OURS_BFLOAT16 = "ours, bfloat16"


class Progress:
    """One line that is overwritten on a terminal, and left out elsewhere."""

    def __init__(self, title: str):
        self.title = title
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            seconds = time.perf_counter() - self.start
            line = f"{self.title}: {text}, {seconds:.0f} s"
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def judged(ratio: float, at_most: float | None) -> str:
    if at_most is None:
        return f"{ratio:.3f}"
    return f"{ratio:.3f} (at most {at_most:.2f}: {'met' if ratio <= at_most else 'NOT MET'})"


def line(name: str, timing: Timing, rest: str) -> None:
    spread = f"[{timing.p20:.2f} .. {timing.p80:.2f}]"
    print(f"  {name:40s} {timing.median:10.2f} ms  {spread:24s} {rest}", flush=True)


def checked(
    case: Case, loss: Loss, tensors: Tensors, truth: Truth, dtype: torch.dtype = torch.float32
) -> tuple[Step, str | None]:
    """The step of a loss, and why its value or gradients are wrong, or None."""
    step = Step(loss, tensors, case.options, case.backward)
    try:
        return step, error(step, truth, dtype)
    except (RuntimeError, TypeError, ValueError) as failure:
        return step, f"{type(failure).__name__}: {failure}"


def measure_speed(case: Case, quick: bool, gemm: dict[str, float]) -> dict:
    """Checks, then times a case and its peers; the JSON record of the case."""
    sizes = case.sizes.quick() if quick else case.sizes
    record = {"name": case.name, "group": case.group, "sizes": vars(sizes)}
    record |= {"frozen": case.frozen, "backward": case.backward, "peers": []}
    print(f"{case.name}  N={sizes.n} M={sizes.m} D={sizes.d} K={sizes.k}")
    progress = Progress(case.name)
    progress("float64 oracle")
    tensors = case.tensors(sizes)
    truth = case.oracle(tensors, case.options, case.backward)
    step, wrong = checked(case, case.loss, tensors, truth)
    if wrong:
        progress.close()
        print(f"  FAILED: {wrong}")
        return record | {"failed": wrong}
    steps = {memory.OURS: step}
    for rival in case.rivals:
        progress(f"checking {rival.peer.name}")
        # a bound is for the full size: a smoke run has none
        entry = {"name": rival.peer.name, "at_most": None if quick else rival.at_most}
        record["peers"].append(entry)
        try:
            step, wrong = checked(case, rival.peer.load(), tensors, truth)
        except PeerUnavailable as reason:
            entry["reason"] = str(reason)
            continue
        entry["version"] = rival.peer.version()
        if wrong:
            entry["reason"] = f"differs from float64: {wrong}"
        else:
            steps[rival.peer.name] = step
    if case.group == "large":
        progress("float64 oracle, bfloat16")
        rounded = case.tensors(sizes, torch.bfloat16)
        truth = case.oracle(rounded, case.options, case.backward)
        step, wrong = checked(case, case.loss, rounded, truth, torch.bfloat16)
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
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME", help="only this")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument(
        "--json", type=Path, help="result file; without it only a full run writes one"
    )
    return parser.parse_args()


def command_line(options: argparse.Namespace) -> str:
    """The command that repeats this run."""
    words = ["python -m benchmarks.run", f"--threads {options.threads}"]
    words += ["--quick"] if options.quick else []
    words += ["--memory"] if options.memory else []
    words += [f"--case {name}" for name in options.case or ()]
    return " ".join(words)


def main() -> int:
    options = arguments()
    if options.list:
        print("\n".join(CASES))
        return 0
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
    for case in (CASES[name] for name in options.case or CASES):
        record = measure_speed(case, options.quick, gemm)
        if with_memory and case.name in MEMORY_CASES and "failed" not in record:
            record["memory"] = measure_memory(case, options.quick, options.threads)
        records.append(record)
    result = {
        "command": command_line(options),
        "date": date.today().isoformat(),
        "environment": environment,
        "gemm_gflops": {name: rate / 1e9 for name, rate in gemm.items()},
        "memory_limit_mb": MEMORY_LIMIT_MB,
        "cases": records,
    }
    path = options.json
    if path is None and not options.quick and not options.case:
        path = results_path(environment)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path.name}")
    failed = [record["name"] for record in records if "failed" in record]
    failed += [r["name"] for r in records if "failed" in r.get("bfloat16", {})]
    if failed:
        print("FAILED: " + ", ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
