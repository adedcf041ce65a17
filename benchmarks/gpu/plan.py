"""What `make gpu` does, in its order, and how long each step may take; nothing here imports torch.

What proves most comes first. A step that ends early leaves its time to the last one, the tests, of
which as many run as fit.
"""

import os
import shutil
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

TOTAL_SECONDS = 540.0
# From the end of the build on: by then every family of kernels has been seen.
SMOKE_SECONDS = 90.0
# A step that is asked to stop gets so long to write what it knows; a part of its own time.
GRACE_SECONDS = 15.0
SANITIZER = "compute-sanitizer"
WORKERS = 8

# Seconds that are expected, for an H200 with 16 cores: a process until it can compute, a kernel of
# Triton with its launcher, a case beside its baselines, and the build.
START, KERNEL, CASE, BUILD = 9.0, 0.8, 5.5, 70.0
SANITIZED_START = 15.0

# What the tests of a GPU are, those that show most first. The rest does not depend on the device.
TESTS = (
    "tests/kernels/test_triton.py", "tests/kernels/test_few.py", "tests/kernels/test_capture.py",
    "tests/whitening", "tests/ops", "tests/losses",
    "tests/reference", "tests/bench/test_bench_gpu.py", "tests/integrations",
)  # fmt: skip
# Of the processor alone, or compiled ahead of time for every GPU, which takes minutes.
LEFT_OUT = (
    "tests/bench", "tests/distributed", "tests/package", "tests/site",
    "tests/kernels/test_added.py", "tests/kernels/test_fold.py", "tests/kernels/test_hopper.py",
    "tests/kernels/test_interpreted.py", "tests/kernels/test_launches.py",
    "tests/kernels/test_products.py", "tests/kernels/test_real_tiles.py",
    "tests/kernels/test_triton_compile.py", "tests/whitening/test_whiten_block.py",
)  # fmt: skip


class Tuned(NamedTuple):
    """The tiles that the short run of `tune` tries."""

    schedule: str
    dim: int


TUNED = Tuned("attend", 128)
TUNE_SECONDS = 10


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: also that of its log, name.log.
        seconds: how long it may take, GRACE_SECONDS included; the last one takes what is left too.
        result: the file, beside the log, that it writes as it goes on.
        environment: variables set beside those of this process.
    """

    name: str
    command: list[str]
    seconds: float
    result: str
    environment: dict[str, str] = field(default_factory=dict)


def steps(out: Path) -> list[Step]:
    """Every step, with this interpreter; the results lie in `out`."""
    python = sys.executable
    smoke = [python, "-m", "benchmarks.gpu.smoke"]
    package = [python, "-m", "contrastive_kernels"]
    bench = [*package, "bench", "--device", "cuda", "--json", str(out / "benchmarks.json")]
    build = [python, "setup.py", "build_ext", "--inplace"]
    short = ["--schedule", TUNED.schedule, "--dim", str(TUNED.dim), "--seconds", str(TUNE_SECONDS)]
    tune = [*package, "tune", *short, "--json", str(out / "tune.json")]
    return [
        Step("build", build, 150.0, "build.log", {"CK_FORCE_BUILD": "1"}),
        Step("smoke", [*smoke, "--out", str(out / "smoke.jsonl")], SMOKE_SECONDS, "smoke.jsonl"),
        Step("benchmarks", bench, 185.0, "benchmarks.json"),
        *sanitized(smoke, out),
        Step("tune", tune, TUNE_SECONDS + 15.0, "tune.json"),
        Step("tests", tests(python, out), 15.0, "tests.log", {"CK_TEST_DEVICE": "cuda"}),
    ]


def sanitized(smoke: list[str], out: Path) -> list[Step]:
    """The smoke set under the tools of a sanitizer, where there is one.

    racecheck takes Triton's reductions for races: it sees whitening alone.
    """
    tool = shutil.which(SANITIZER)
    if tool is None:
        return []
    half = [*smoke, "--here", "--dtype", "bfloat16", "--dim", "64", "768"]
    floats = ["--dtype", "float32", "--dim", "64", "128"]
    whitening = [*smoke, "--here", *floats, "--family", "whitening"]
    # the caching allocator would hide accesses beyond a tensor
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    made = []
    for name, command, seconds in (
        ("memcheck", half, 30.0),
        ("initcheck", half, 25.0),
        ("racecheck", whitening, 20.0),
    ):
        result = f"{name}.txt"
        checked = [tool, "--tool", name, "--error-exitcode", "9", "--log-file", str(out / result)]
        made.append(Step(name, [*checked, *command], seconds, result, environment))
    return made


def tests(python: str, out: Path) -> list[str]:
    """The tests, in as many workers as there are; without pytest-xdist in one process."""
    workers = ["-n", str(WORKERS)] if find_spec("xdist") else []
    ignored = [f"--ignore={path}" for path in LEFT_OUT if not covered(path)]
    options = ["-v", "--tb=short", "-rf", "--durations=20", f"--junitxml={out / 'tests.xml'}"]
    return [python, "-m", "pytest", *options, *workers, *ignored, *TESTS]


def covered(path: str) -> bool:
    """Whether it is a folder of which a part is among the tests."""
    return any(name.startswith(path + os.sep) for name in TESTS)


def expected(steps: list[Step], counts: dict) -> dict[str, tuple[int, float]]:
    """(kernels that are compiled, seconds) of each step, from what `count` counted; the tests take
    what is left. The processes of the smoke set compile side by side."""
    cases = counts["cases"].values()
    longest = max(counts["smoke"].values())
    tried = min(counts["tune"], round(TUNE_SECONDS / KERNEL))
    found = {
        "build": (0, BUILD),
        "smoke": (sum(counts["smoke"].values()), START + KERNEL * longest),
        "benchmarks": (sum(cases), START + sum(CASE + KERNEL * kernels for kernels in cases)),
        "memcheck": (0, SANITIZED_START),
        "initcheck": (0, SANITIZED_START),
        "racecheck": (0, SANITIZED_START),
        "tune": (tried, START + TUNE_SECONDS),
    }
    found = {step.name: found[step.name] for step in steps if step.name in found}
    spent = sum(seconds for _, seconds in found.values())
    return found | {"tests": (0, TOTAL_SECONDS - spent)}
