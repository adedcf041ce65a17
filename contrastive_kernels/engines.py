"""Whether the engine for Hopper takes the sweeps that it has kernels of, and why not.

CK_HOPPER=1: it does; 0: it does not. Not set: where its check has passed on such a GPU, with this
version of Triton and these kernels, which is recorded. check: that check is made at the first call.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

HOPPER = (9, 0)  # the compute capability
RECORD = Path(__file__).with_name("hopper_checks.json")
# What its code is made of.
SOURCES = (
    "backward", "engine", "folds", "forward", "gradient", "hopper", "hopper_sweep", "packing",
    "sweep", "tiles",
)  # fmt: skip
CURE = "python -m contrastive_kernels info --check --record checks it, CK_HOPPER=1 takes it anyway"

# What the check of this process has found, by device: a fault, or None.
checked: dict[torch.device, str | None] = {}
_forced: ContextVar[bool | None] = ContextVar("forced", default=None)


def without_hopper(device: torch.device) -> str | None:
    """Why sweeps of a GPU of its kind are not for the engine for Hopper; None where they are."""
    forced, asked = _forced.get(), os.environ.get("CK_HOPPER")
    if forced is not None or asked in ("0", "1"):
        taken = asked == "1" if forced is None else forced
        return None if taken else "CK_HOPPER=0 is set"
    if device in checked:
        fault = checked[device]
        return fault and f"its check has failed: {fault}"
    if asked == "check":
        return "its check comes with the first call"
    if device.type == "cuda" and _recorded(device):
        return None
    return f"no check of it is recorded: {CURE}"


def is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == HOPPER


def wants_check(device: torch.device) -> bool:
    """Whether the check is to be made at this call: it waits for the GPU."""
    asked = os.environ.get("CK_HOPPER") == "check" and _forced.get() is None
    if not asked or device in checked or device.type != "cuda" or not is_hopper(device):
        return False
    return not torch.cuda.is_current_stream_capturing()


@contextmanager
def forced(taken: bool) -> Iterator[None]:
    """Sweeps within it are for the engine for Hopper, or not, whatever is set."""
    token = _forced.set(taken)
    try:
        yield
    finally:
        _forced.reset(token)


def record(device: torch.device) -> None:
    """Keeps that the check has passed on this kind of GPU."""
    RECORD.write_text(json.dumps([*_records(), _proof(device)]) + "\n")
    _recorded.cache_clear()


@cache
def _recorded(device: torch.device) -> bool:
    return _proof(device) in _records()


def _records() -> list[dict[str, str]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else []


def _proof(device: torch.device) -> dict[str, str]:
    gpu = torch.cuda.get_device_name(device)
    folder = Path(__file__).with_name("triton")
    code = hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in SOURCES))
    return {"gpu": gpu, "triton": metadata.version("triton"), "code": code.hexdigest()[:16]}
