"""What each backend needs, whether it is usable here, and why not; what each of them can do.

Loads the compiled extensions, which know no torch. Imported once, with the package.
"""

import ctypes
import importlib
import json
import os
import sys
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import engines
from .autograd import in_forward_mode, in_transform

# Nothing but the dense reference, to tell whether a kernel is at fault.
DISABLED: str | None = "CK_DISABLE=1 is set" if os.environ.get("CK_DISABLE", "0") == "1" else None
_BUILT_WITH = {"_cpu": "from a wheel or with GCC or Clang at hand", "_cuda": "with nvcc at hand"}
_THREADS = ("parallel_for", "get_num_threads", "get_thread_idx")
TRITON_AT_LEAST = (3, 6)
_REPORT = Path(__file__).with_name("_build_report.json")


class Backend(NamedTuple):
    """One backend: whether it was built, whether it runs here, on what, and why not.

    `engines`: of a backend that has more than one, why each takes no sweep here, or None; a call
    uses the first that takes it.
    """

    built: bool
    usable: bool
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    reason: str | None
    engines: Mapping[str, str | None] = MappingProxyType({})


def _build_report(extension: str) -> dict[str, Any] | None:
    """What setup.py wrote down about `_cpu` or `_cuda` (built, reason).

    None if it was never built.
    """
    try:
        return json.loads(_REPORT.read_text())[extension]
    except (OSError, ValueError, KeyError):
        return None


def _load(extension: str) -> str | None:
    """Load an extension; return why it cannot be used, or None."""
    if DISABLED is not None:
        return DISABLED
    report = _build_report(extension)
    cure = f"install contrastive_kernels again, {_BUILT_WITH[extension]}"
    if report is None:
        return f"the extension was never built: {cure}"
    if not report["built"]:
        return f"the extension was not built: {cure}; what failed: {report['reason']}"
    try:
        loaded = importlib.import_module(f".{extension}", __package__)
    except ImportError as error:
        return f"the extension was built but cannot be loaded: {error}"
    return _start(loaded) if extension == "_cpu" else None


def _start(extension: ModuleType) -> str | None:
    """Let the CPU engine run on torch's own threads; return why it cannot, or None."""
    library = ctypes.CDLL(torch._C.__file__)  # which finds what it is linked to as well
    try:
        functions = [getattr(library, f"torch_{name}") for name in _THREADS]
    except AttributeError as error:
        return f"torch 2.10 or newer is needed, found {torch.__version__}: {error}"
    addresses = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    extension.start(torch.backends.cpu.get_cpu_capability(), *addresses)
    return None


def _find_triton() -> str | None:
    """Why Triton cannot be used, or None; it is not imported before it is needed."""
    if DISABLED is not None:
        return DISABLED
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "triton is not installed: pip install triton"
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < TRITON_AT_LEAST:
        return f"triton {'.'.join(map(str, TRITON_AT_LEAST))} or newer is needed, found {version}"
    return None


# Constants, so that torch.compile can trace the dispatch that reads them.
CPU_ERROR: str | None = _load("_cpu")
# whether products of bfloat16 features are taken by instructions of their own
CPU_BFLOAT16: bool = CPU_ERROR is None and sys.modules[f"{__package__}._cpu"].bfloat16() is not None
CUDA_ERROR: str | None = _load("_cuda")
TRITON_ERROR: str | None = _find_triton()
# Triton's interpreter runs kernels on CPU tensors; it reads this variable when it is imported.
INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"
# N M D up to which sweeps of Triton are few launches rather than few products: these take a GPU
# no longer than a launch takes a CPU. The interpreter goes the way of many.
LAUNCH_BOUND = 2**31
FEW_PRODUCTS = 0 if INTERPRETED else LAUNCH_BOUND


def unusable_reason(name: str, device: str) -> str | None:
    """Why backend `name` cannot run on tensors of a device type, every reason; None if it can."""
    if name == "reference":
        return None
    wrong_device = None
    if name == "cpu":
        error = CPU_ERROR
        if device != "cpu":
            wrong_device = "it takes cpu tensors only"
    elif name == "triton":
        error = TRITON_ERROR
        if device not in _triton_devices():
            wrong_device = "it takes cuda tensors, and cpu tensors only with TRITON_INTERPRET=1 set"
    else:
        error = CUDA_ERROR or _no_gpu()
        if device != "cuda":
            wrong_device = "it takes cuda tensors only"
    return "; ".join(filter(None, (error, wrong_device))) or None


def runs_dense(backend: str) -> bool:
    """Whether a named backend means the dense reference: "auto" does in forward mode, which no
    kernel has, and where engines are disabled."""
    if backend == "auto":
        return DISABLED is not None or in_forward_mode()
    return backend == "reference"


def resolve_backend(
    backend: str, device: torch.device, kernels: tuple[str, ...] = ("cpu", "triton")
) -> str:
    """The backend that runs on `device`: the fastest usable one for "auto", in forward mode the
    reference; else the one named.

    An explicit name never falls back. `kernels`: the backends that the operation has kernels of.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend cannot run here; the message lists every reason.
    """
    if device.type == "meta":
        raise ValueError("tensors must have numbers, got tensors on the meta device")
    if backend == "auto":
        preferred = "cpu" if device.type == "cpu" else "triton"
        usable = unusable_reason(preferred, device.type) is None
        if not usable and not torch.compiler.is_compiling():
            _warn_dense(preferred, device.type)
        return preferred if usable and not runs_dense("auto") else "reference"
    if backend == "reference":
        return "reference"
    if backend not in ("cpu", "triton", "cuda"):
        raise ValueError(
            'backend must be "auto", "reference", "cpu", "triton" or "cuda", got ' + repr(backend)
        )
    reason = unusable_reason(backend, device.type)
    if backend not in kernels:
        reason = "; ".join(filter(None, ("it has no kernels for this operation", reason)))
    if reason is not None:
        raise RuntimeError(f'backend="{backend}" cannot run on {device.type} tensors: {reason}')
    return backend


@lru_cache
def _warn_dense(preferred: str, device: str) -> None:
    """Says once that a loss runs dense, and why."""
    warnings.warn(
        f"contrastive_kernels runs dense on {device}, with the whole similarity matrix: "
        f"backend {preferred!r} cannot be used: {unusable_reason(preferred, device)}",
        stacklevel=4,
    )


def resident_dim(x_dtype: torch.dtype, y_dtype: torch.dtype) -> int:
    """The longest vectors of which the Triton kernels hold a gradient at once: those of longer ones
    go through stored parts of dL/dz."""
    single = x_dtype != y_dtype or x_dtype == torch.float32
    return 128 if single else 256


def can_attend(backend: str, x: Tensor, keys_dtype: torch.dtype, frozen: bool) -> bool:
    """Whether the forward sweep may bring the gradient of the queries x too, where the keys are
    frozen or not. Within a transform it is not to be seen what is frozen."""
    if backend == "reference" or in_transform():
        return False
    return frozen if backend == "cpu" else x.shape[1] <= resident_dim(x.dtype, keys_dtype)


def rounds_weights(backend: str, x_dtype: torch.dtype, keys_dtype: torch.dtype) -> bool:
    """Whether "cpu" rounds what it multiplies features with, since products are of bfloat16."""
    return backend == "cpu" and CPU_BFLOAT16 and x_dtype == keys_dtype == torch.bfloat16


def are_few(rows: int, keys: int, dim: int) -> bool:
    """Whether a sweep of Triton is so small that a launch counts for more than its products."""
    return rows * keys * dim <= FEW_PRODUCTS


def can_join(backend: str) -> bool:
    """Whether a symmetric matrix may be that of two tensors, one after the other."""
    return backend == "cpu"


def can_align(backend: str) -> bool:
    """Whether a sweep may give the logits of the rows that belong together."""
    return backend in ("cpu", "triton")


def check_aligned(rows: int, keys: int, keep: Tensor | None, *, equal: bool = False) -> None:
    """Raise unless each row can belong to a key of the same number."""
    if keep is not None or (rows != keys if equal else rows > keys):
        raise ValueError("aligned rows take y (M, D) of as many rows or more, and no keep ids")


def check_ends(ends: list[int], size: int) -> None:
    """Raise unless these are ends of prefixes of `size` features, ascending, the last one all."""
    before = [0, *ends[:-1]]
    if not ends or any(a >= b for a, b in zip(before, ends, strict=True)) or ends[-1] != size:
        raise ValueError(f"ends must ascend from above 0 to D = {size}, got {ends}")


def float32_products(device: str) -> str:
    """What torch makes of products of float32 matrices there: "tf32", "bf16" or, exact, another."""
    # the one setting that the older ones also write, and that can be read after any of them
    settings: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    try:
        return settings.matmul.fp32_precision
    except AttributeError:  # torch < 2.9
        exact = device != "cuda" or torch.get_float32_matmul_precision() == "highest"
        return "ieee" if exact else "tf32"


# what torch.compiler.assume_constant_result does, which imports all of the compiler
float32_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def product_rounding(backend: str, x: Tensor, y: Tensor) -> float:
    """eps of the type that a backend rounds features x and y to where it multiplies float32."""
    half = x.dtype == y.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if backend == "cpu" or x.dtype == torch.float64 or (backend == "triton" and half):
        return 0.0
    precision = float32_products("cuda" if backend == "triton" else x.device.type)
    return {"tf32": 2.0**-10, "bf16": 2.0**-7}.get(precision, 0.0)


def can_sum(backend: str) -> bool:
    """Whether a softplus sweep can sum over the rows, which brings every gradient forward."""
    return backend == "triton" and not in_transform()


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "there is no GPU here"


def _without_hopper() -> str | None:
    """Why the engine for Hopper takes no sweeps on the current GPU."""
    if TRITON_ERROR is not None or torch.cuda.device_count() == 0:
        return TRITON_ERROR or "there is no GPU here"
    device = torch.device("cuda", torch.cuda.current_device())
    if not engines.is_hopper(device):
        return f"it is for GPUs of compute capability {engines.HOPPER[0]}.{engines.HOPPER[1]}"
    return engines.without_hopper(device)


def _triton_devices() -> tuple[str, ...]:
    return ("cuda", "cpu") if INTERPRETED else ("cuda",)


def backends() -> dict[str, Backend]:
    """Report every backend: name -> `Backend(built, usable, devices, dtypes, reason)`.

    `devices` are torch device types and `dtypes` the input dtypes the backend takes; `reason` says
    why it is not usable and is None where it is. `backends()["triton"].engines` says why the engine
    for Hopper takes no sweeps on the current GPU; what it has no kernels of is the other's.
    """
    cpu, cuda = _build_report("_cpu"), _build_report("_cuda")
    half = (torch.float16, torch.bfloat16)
    full = (torch.float32, torch.float64)
    return {
        "reference": Backend(True, True, ("cpu", "cuda"), half + full, None),
        "cpu": Backend(
            built=cpu is not None and cpu["built"],
            usable=CPU_ERROR is None,
            devices=("cpu",),
            dtypes=half + full,
            reason=CPU_ERROR,
        ),
        "triton": Backend(
            built=TRITON_ERROR is None,
            usable=TRITON_ERROR is None and (INTERPRETED or _no_gpu() is None),
            devices=_triton_devices(),
            dtypes=half + full,
            reason=TRITON_ERROR or (None if INTERPRETED else _no_gpu()),
            engines={
                "hopper": _without_hopper(),
                "triton": TRITON_ERROR or (None if INTERPRETED else _no_gpu()),
            },
        ),
        "cuda": Backend(
            built=cuda is not None and cuda["built"],
            usable=(CUDA_ERROR or _no_gpu()) is None,
            devices=("cuda",),
            dtypes=(torch.float32,),
            reason=CUDA_ERROR or _no_gpu(),
        ),
    }
