"""On what, and with what, a result was measured, and where it is kept."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import contrastive_kernels as ck

from .paths import RESULTS, ROOT

PACKAGES = (
    "lightly", "open_clip_torch", "pytorch-metric-learning", "sentence-transformers",
    "info-nce-pytorch", "pykeops",
)  # fmt: skip


def processor() -> str:
    """The name of the processor, as the system tells it; with family and model where it has them,
    since a cloud's "AMD EPYC" may be of several generations."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        first = ""
    pairs = (line.partition(":") for line in first.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    name = fields["model name"]
    if "cpu family" in fields:
        name += f", family {fields['cpu family']} model {fields['model']}"
    return name


def commit_of(checkout: Path) -> str | None:
    """The short hash of a checkout, "-dirty" with uncommitted changes to tracked files; None of
    another folder."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """That of the code that runs; in a copy without .git the variable CK_COMMIT names it."""
    return commit_of(ROOT) or os.environ.get("CK_COMMIT", "unknown")


def _installed(*distributions: str) -> dict[str, str]:
    """The versions of those that are installed."""
    versions = {}
    for name in distributions:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def backend(name: str) -> str:
    """The backend that "auto" takes on a device whose fused backend is `name`."""
    return name if ck.backends()[name].usable else "reference"


def _driver() -> str:
    """The version of the GPU's driver, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip() if done.stdout else "unknown"


def describe_gpu() -> dict:
    """GPU, driver, backend and versions, for the JSON."""
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "capability": f"sm_{major}{minor}",
        "driver": _driver(),
        "backend": backend("triton"),
        "versions": {
            "contrastive_kernels": ck.__version__,
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "python": platform.python_version(),
            **_installed("triton", "inf_cl", "siglip-kernel"),
        },
        "commit": commit(),
    }


def describe(threads: int, packages: Iterable[str] = PACKAGES) -> dict:
    """Device, threads, load, backend and versions, of these packages too, for the JSON."""
    return {
        "device": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "backend": backend("cpu"),
        "versions": {
            "contrastive_kernels": ck.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **_installed(*packages),
        },
        "commit": commit(),
    }


def results_path(environment: dict) -> Path:
    """benchmarks/results/<device>[-<threads>-threads].json"""
    name = environment["device"]
    if "threads" in environment:
        name += f" {environment['threads']} threads"
    return RESULTS / file_name(name)


def file_name(text: str) -> str:
    """Of a JSON that is named by what was measured."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") + ".json"


def save(path: Path, result: dict) -> None:
    """Writes a result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)
