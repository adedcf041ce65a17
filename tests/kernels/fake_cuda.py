"""A stand-in for the CUDA driver, so that Triton's own launcher runs on a machine without a GPU.

Run as a program with names of cases: takes their value and gradients on CPU tensors, twice, and
once more as tensors of a second device, with every kernel compiled, loaded, bound and launched as
on an H200, but never executed. Prints a line of JSON for each; for `info_nce:1024` one of what
launches with so many rows take the host.
"""

from benchmarks.gpu import stand_in  # noqa: F401, I001  first of all

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from launches import ARCHITECTURE, BATCHES, step
from triton.backends.nvidia import driver

import contrastive_kernels as ck
from contrastive_kernels import triton as operators
from contrastive_kernels.triton import configs, engine, launching
from contrastive_kernels.triton.compile import PROCESSORS

STEPS = 300  # whose shortest launches count

# The driver's functions that give a result or can refuse; every other one returns success. The
# attributes are shared memory of a program, registers, multiprocessors and size of a warp.
SOURCE = r"""
#include <stddef.h>
static int context, current, kernels[2];
static long launches;
typedef struct {
  unsigned x, y, z, block_x, block_y, block_z, shared; void *stream, *attributes; unsigned count;
} Config;
long stand_in_launches(void) { return launches; }
void stand_in_device(int device) { current = device; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuCtxGetCurrent(void **c) { *c = &context; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &context; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "refused by the stand-in driver"; return 0; }
int cuModuleLoadData(void **m, const char *image) {
  *m = &context;
  return image[1] == 'E' && image[2] == 'L' && image[3] == 'F' ? 0 : 200;
}
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = &kernels[current]; return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = a == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(unsigned long long *v, int a, unsigned long long p) {
  *v = p;
  return 0;
}
int cuDeviceGetAttribute(int *v, int a, int d) {
  *v = a == 97 ? 232448 : a == 81 ? 233472 : a == 82 ? 65536 : a == 16 ? 132 : a == 10 ? 32 : 0;
  return 0;
}
int cuLaunchKernelEx(const Config *c, void *f, void **arguments, void **extra) {
  ++launches;
  if (f != &kernels[current] || c->stream != (void *)(100L + current)) return 1;
  if (c->x == 0 || c->x > 2147483647u || c->y > 65535 || c->z > 65535) return 1;
  return c->shared > 232448 || c->block_x > 1024 ? 1 : 0;
}
"""


def build(folder: Path) -> None:
    """Builds libcuda.so.1 there, with every function that Triton's driver names."""
    sources = Path(driver.__file__).parent
    text = "".join((sources / name).read_text() for name in ("driver.c", "driver.py"))
    names = set(re.findall(r"\b(cu[A-Z][A-Za-z0-9]*)(?=\(|[;,)])", text))
    made = set(re.findall(r"\bint (cu\w+)\(", SOURCE))
    rest = "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(names - made))
    (folder / "libcuda.c").write_text(SOURCE + rest)
    command = ["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1"]
    subprocess.run([*command, "libcuda.c"], cwd=folder, check=True)


class Driver(driver.CudaDriver):
    """Of two devices, the first of which is current at first."""

    def __init__(self, library: ctypes.CDLL):
        self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
        self.library, self.device = library, 0

    def get_device_capability(self, device=0):
        return divmod(ARCHITECTURE, 10)

    def get_current_device(self):
        return self.device

    def set_current_device(self, device):
        self.device = device
        self.library.stand_in_device(device)

    def get_current_stream(self, device=0):
        return 100 + device

    def get_active_torch_device(self):
        return torch.device("cpu")


def activate(folder: Path) -> Driver:
    """Makes it what Triton launches on."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # found by its name wherever it is asked for later; torch keeps to its own libraries
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    library.stand_in_launches.restype = ctypes.c_long
    made = Driver(library)
    triton.runtime.driver.set_active(made)
    return made


class Launches(NamedTuple):
    """The kernels that host code asked for, and those of them that Triton bound."""

    asked: list[str]
    bound: list[str]


@contextmanager
def watched(active: Driver, device: int = 0) -> Iterator[Launches]:
    """What is launched within it, of tensors of a device; the first is current."""
    found = Launches([], [])
    launch, bind = engine.launch, launching._bound

    def counted(kernel, *arguments, **options):
        found.asked.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    def counted_bind(kernel, *arguments):
        found.bound.append(kernel.fn.__name__)
        return bind(kernel, *arguments)

    @contextmanager
    def device_of(_):
        active.set_current_device(device)
        yield
        active.set_current_device(0)

    with (
        patch.object(engine, "launch", counted),
        patch.object(launching, "_bound", counted_bind),
        patch.object(operators, "device_of", device_of),
    ):
        yield found


def of_case(active: Driver, name: str) -> dict:
    found: dict = {"name": name}
    for which, device in (("first", 0), ("again", 0), ("on another", 1)):
        before = active.library.stand_in_launches()
        with watched(active, device) as seen:
            step(name, torch.bfloat16)
        launched = active.library.stand_in_launches() - before
        found[which] = {"asked": seen.asked, "bound": seen.bound, "launched": launched}
    return found


def functions(run: Callable[[], object]) -> dict[str, int]:
    """How many functions of Python and of C a launch of each kernel calls, at most."""
    counts: dict[str, int] = {}
    kernel, count = "", 0

    def seen(frame, event, _):
        nonlocal kernel, count
        if frame.f_code is launching.launch.__code__ and event == "call":
            kernel, count = frame.f_locals["kernel"].fn.__name__, 0
        elif frame.f_code is launching.launch.__code__ and event == "return":
            counts[kernel], kernel = max(count, counts.get(kernel, 0)), ""
        elif kernel and event in ("call", "c_call"):
            count += 1

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counts


def times(run: Callable[[], object]) -> dict[str, float]:
    """Microseconds of the shortest launch of each kernel."""
    found: dict[str, float] = {}
    launch = engine.launch

    def timed(kernel, *arguments, **options):
        start = time.perf_counter()
        launch(kernel, *arguments, **options)
        took, name = 1e6 * (time.perf_counter() - start), kernel.fn.__name__
        found[name] = min(found.get(name, took), took)

    with patch.object(engine, "launch", timed):
        for _ in range(STEPS):
            run()
    return found


def of_batch(loss: str) -> dict:
    """What launches of kernels that are kept take the host."""
    x, y = (torch.randn(1024, 128).bfloat16().requires_grad_() for _ in range(2))

    def run() -> None:
        getattr(ck, loss)(x, y, *BATCHES[loss], backend="triton").backward()

    run()
    return {"loss": loss, "functions": functions(run), "microseconds": times(run)}


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        build(folder)
        active = activate(folder)
        hopper = configs.Properties(ARCHITECTURE, PROCESSORS)
        with patch.object(configs, "properties", lambda device: hopper):
            for name in names:
                loss, _, rows = name.partition(":")
                found = of_batch(loss) if rows else of_case(active, name)
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
