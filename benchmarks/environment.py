"""On what, and with what, a result was measured."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import contrastive_kernels as ck

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def processor() -> str:
    """The name of the processor, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The short hash of the checkout, "-dirty" with uncommitted changes to tracked files."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def backend() -> str:
    """The backend that "auto" takes for CPU tensors."""
    return "cpu" if ck.backends()["cpu"].usable else "reference"


def describe(threads: int) -> dict:
    """Device, threads, load, backend and versions, for the JSON."""
    return {
        "device": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "backend": backend(),
        "versions": {
            "contrastive_kernels": ck.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "lightly": _installed("lightly"),
            "open_clip_torch": _installed("open_clip_torch"),
            "pytorch-metric-learning": _installed("pytorch-metric-learning"),
        },
        "commit": commit(),
    }


def results_path(environment: dict) -> Path:
    """benchmarks/results/<device>-<threads>-threads.json"""
    name = f"{environment['device']} {environment['threads']} threads"
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
