"""What each backend needs, whether it is usable here, and why not.

Loads the compiled extension, which registers its ops with torch. Imported once, with the package.
"""

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

_REBUILD = "pip install --no-build-isolation -e ."
_LATER = "not part of this version"
_REPORT = Path(__file__).with_name("_build_report.json")


class Backend(NamedTuple):
    """One backend: whether it was built, whether it runs here, on what, and why not."""

    built: bool
    usable: bool
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    reason: str | None


def _build_report() -> dict[str, Any] | None:
    """What setup.py wrote down about the build: keys built, reason, torch. None if never built."""
    try:
        return json.loads(_REPORT.read_text())
    except (OSError, ValueError):
        return None


def _load_cpu() -> str | None:
    """Load the extension; return why it cannot be used, or None."""
    report = _build_report()
    if report is None:
        return f"the extension was never built: {_REBUILD}"
    if not report["built"]:
        return f"the extension was not built: {report['reason']}"
    # Checked before loading: a library built against another torch may crash instead of failing.
    if report["torch"] != torch.__version__:
        return (
            f"the extension was built against torch {report['torch']}, but torch "
            f"{torch.__version__} is running: {_REBUILD}"
        )
    try:
        importlib.import_module("contrastive_kernels._cpu")
    except ImportError as error:
        return f"the extension was built but cannot be loaded: {error}"
    return None


# A constant, so that torch.compile can trace the dispatch that reads it.
CPU_ERROR: str | None = _load_cpu()


def unusable_reason(name: str, device: str) -> str | None:
    """Why backend `name` cannot run on tensors of a device type, every reason; None if it can."""
    if name == "reference":
        return None
    if name != "cpu":
        return _LATER
    wrong_device = None if device == "cpu" else "it takes cpu tensors only"
    return "; ".join(reason for reason in (CPU_ERROR, wrong_device) if reason) or None


def backends() -> dict[str, Backend]:
    """Report every backend: name -> `Backend(built, usable, devices, dtypes, reason)`.

    `devices` are torch device types and `dtypes` the input dtypes the backend takes; `reason` says
    why it is not usable and is None where it is.
    """
    report = _build_report()
    half = (torch.float16, torch.bfloat16)
    full = (torch.float32, torch.float64)
    return {
        "reference": Backend(True, True, ("cpu", "cuda"), half + full, None),
        "cpu": Backend(
            built=report is not None and report["built"],
            usable=CPU_ERROR is None,
            devices=("cpu",),
            dtypes=half + full,
            reason=CPU_ERROR,
        ),
        "triton": Backend(False, False, ("cuda",), (), _LATER),
        "cuda": Backend(False, False, ("cuda",), (), _LATER),
    }
