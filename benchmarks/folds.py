"""The nearest, the late and the nested against other packages: each ratio and its bound.

`python -m benchmarks.folds` measures all in about five minutes and keeps it in
benchmarks/results/folds/, from which `make report` makes the table of docs/measured.md. Time and
memory are those of `bench`: checked against float64 first, then interleaved, medians; memory is the
peak beyond inputs and gradients. faiss-cpu and pylate are measured where they are installed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

import contrastive_kernels as ck

from .baselines.loading import Unavailable
from .cases.inputs import Sizes
from .cases.table import CASES, MEMORY_LIMIT_MB
from .harness import memory
from .harness.console import Progress
from .harness.environment import PACKAGES, describe, results_path, save
from .harness.implementations import OURS
from .harness.measure import Effort, measure
from .harness.paths import RESULTS
from .harness.timing import interleave
from .rank_files import measured as measured_on_ranks

FOLDER = RESULTS / "folds"
WIDTHS = (768, 512, 256, 128, 64)


class Row(NamedTuple):
    """A line of the table. unit: "time" or "memory", the share of the other's; or "MB"."""

    case: str
    against: str
    unit: str
    value: float | str  # a reason: it could not be measured
    at_most: float


class Contest(NamedTuple):
    """A case of the table of cases, at its own size or another, and how much of the baseline's
    memory ours may take."""

    case: str
    title: str
    sizes: Sizes | None = None
    memory: float | None = None
    rounds: int = 5


CONTESTS = {
    "top_k": Contest(
        "top_k", "top_k, 4,096 queries x 1,000,000 keys, k=16", Sizes(4096, 1_000_000), rounds=2
    ),
    "hard_negatives": Contest(
        "sentence_transformers.mine_hard_negatives", "mine_hard_negatives, 10,000 x 100,000",
        memory=0.1, rounds=2,
    ),
    "late_interaction": Contest(
        "late_interaction", "max_sim loss, 32 x 32 tokens, 64 x 180", memory=0.1
    ),
    "multi_vector": Contest(
        "sentence_transformers.MultiVectorMultipleNegativesRankingLoss",
        "the same, as MultiVectorMultipleNegativesRankingLoss", memory=0.1,
    ),
    "nested": Contest("sentence_transformers.MatryoshkaLoss", "nested (768, 512, 256, 128, 64)"),
}  # fmt: skip


def contest(which: Contest, threads: int, quick: bool) -> Iterator[Row]:
    case = CASES[which.case]
    if which.sizes is not None:
        case = replace(case, sizes=which.sizes)
    if quick:
        case = replace(case, sizes=case.sizes.quick())
    effort = Effort(0.0, which.rounds)
    rates = {str(case.dtype).removeprefix("torch."): 1.0}  # nobody asks
    found = measure(case, rates, threads, effort=effort, with_memory=which.memory is not None)
    for record, baseline in zip(found.get("peers", []), case.baselines, strict=False):
        if baseline.at_most is not None:
            ratio = record.get("ratio", record.get("reason"))
            yield Row(which.title, baseline.name, "time", ratio, baseline.at_most)
            if which.memory is not None:
                both = [found["memory"].get(name, {}) for name in (OURS, baseline.name)]
                mb = [each.get("mb") for each in both]
                share = mb[0] / mb[1] if all(mb) else both[1].get("reason", "not measured")
                yield Row(which.title, baseline.name, "memory", share, which.memory)
    if "failed" in found:
        yield Row(which.title, "float64", "time", found["failed"], 0.0)


def nested_beside_one(threads: int, quick: bool) -> Iterator[Row]:
    """All prefixes beside the longest alone."""
    case = CASES["sentence_transformers.MatryoshkaLoss"]
    tensors = replace(case, sizes=case.sizes.quick() if quick else case.sizes).tensors()
    steps = {
        name: case.step(lambda anchor, positive, d=dims: ck.mnrl(anchor, positive, dims=d), tensors)
        for name, dims in (("nested", WIDTHS), ("alone", None))
    }
    times = interleave(steps, 10.0, lambda _: None)
    ratio = times["nested"].median / times["alone"].median
    yield Row(CONTESTS["nested"].title, "ours at D=768 alone", "time", ratio, 1.35)


def many_documents(threads: int, quick: bool) -> Iterator[Row]:
    """256 documents of 512 tokens, which the workspace alone has to serve."""
    title = "max_sim loss, 32 x 32 tokens, 256 x 512"
    reason = memory.unsupported()
    value = reason or memory.apart(None, _peak_of_many, threads, quick)
    if isinstance(value, dict):
        value = value.get("mb", value.get("reason"))
    yield Row(title, "inputs and gradients", "MB", value, MEMORY_LIMIT_MB)


def _peak_of_many(threads: int, quick: bool) -> dict:
    torch.set_num_threads(threads)
    case = replace(CASES["late_interaction"], sizes=Sizes(2, 2) if quick else Sizes(32, 256, k=8))
    generator = torch.Generator().manual_seed(0)
    shapes = {"queries": (case.sizes.n, 32), "documents": (case.sizes.n, case.sizes.k, 512)}
    tensors = {
        name: torch.randn(*shape, case.sizes.d, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }
    ck.mnrl(*torch.randn(2, 8, 4, requires_grad=True)).backward()  # what is imported late
    return {"mb": memory.peak_of(case.step(case.under_test, tensors))}


def files(threads: int, quick: bool) -> Iterator[Row]:
    """Negatives in a file over two ranks."""
    rows = 2**14 if quick else 2**24
    title = f"{rows:,} negatives in a file over 2 ranks"
    with tempfile.TemporaryDirectory() as folder:
        found = measured_on_ranks(rows, 2, 3, Path(folder))
    yield Row(title, "one rank", "time", found["wall"], 0.6)
    yield Row(title, "one rank", "reading", found["read"], 0.51)


Measured = Callable[[int, bool], Iterator[Row]]
PARTS: dict[str, Measured] = {
    name: lambda threads, quick, which=which: contest(which, threads, quick)
    for name, which in CONTESTS.items()
} | {"nested_alone": nested_beside_one, "many_documents": many_documents, "files": files}


def told(row: Row) -> str:
    """One line, as it is printed."""
    if isinstance(row.value, str):
        return f"{row.case:60} {row.against:32} {row.unit:8} {row.value}"
    verdict = "" if row.value <= row.at_most else "  MISSED"
    return (
        f"{row.case:60} {row.against:32} {row.unit:8} {row.value:8.3f} of {row.at_most:g}{verdict}"
    )


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.folds", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--case", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    environment = describe(options.threads, (*PACKAGES, "faiss-cpu", "pylate"))
    result: dict = {
        "command": "python -m benchmarks.folds", "date": date.today().isoformat(),
        "environment": environment, "rows": [],
    }  # fmt: skip
    for name in options.case:
        progress = Progress(name)
        try:
            rows = list(PARTS[name](options.threads, options.quick))
        except Unavailable as reason:
            rows = [Row(name, "", "time", str(reason), 0.0)]
        progress.close()
        for row in rows:
            print(told(row), flush=True)
            result["rows"].append(row._asdict())
    if not options.quick and len(options.case) == len(PARTS):
        save(FOLDER / results_path(environment).name, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
