"""A stand-in for the CUDA driver, so that Triton's own launcher runs on a machine without a GPU.

Run as a program with names of cases: takes their value and gradients on CPU tensors, twice, with
every kernel compiled, loaded, bound and launched as on an H200, but never executed. Prints a line
of JSON for each.
"""

from benchmarks.gpu import stand_in  # noqa: F401, I001  first of all

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from launches import ARCHITECTURE, step

# The driver's functions that give a result or can refuse; every other one returns success. The
# attributes are shared memory of a program, registers, multiprocessors and size of a warp.
SOURCE = r"""
#include <stddef.h>
static int context;
static long launches;
typedef struct {
  unsigned x, y, z, block_x, block_y, block_z, shared; void *stream, *attributes; unsigned count;
} Config;
long stand_in_launches(void) { return launches; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuCtxGetCurrent(void **c) { *c = &context; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &context; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "refused by the stand-in driver"; return 0; }
int cuModuleLoadData(void **m, const char *image) {
  *m = &context;
  return image[1] == 'E' && image[2] == 'L' && image[3] == 'F' ? 0 : 200;
}
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = &context; return 0; }
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
  if (c->x == 0 || c->x > 2147483647u || c->y > 65535 || c->z > 65535) return 1;
  return c->shared > 232448 || c->block_x > 1024 ? 1 : 0;
}
"""


def build(folder: Path) -> None:
    """Builds libcuda.so.1 there, with every function that Triton's driver names."""
    import triton.backends.nvidia as nvidia

    sources = Path(nvidia.__file__).parent
    text = "".join((sources / name).read_text() for name in ("driver.c", "driver.py"))
    names = set(re.findall(r"\b(cu[A-Z][A-Za-z0-9]*)(?=\(|[;,)])", text))
    made = set(re.findall(r"\bint (cu\w+)\(", SOURCE))
    rest = "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(names - made))
    (folder / "libcuda.c").write_text(SOURCE + rest)
    command = ["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1"]
    subprocess.run([*command, "libcuda.c"], cwd=folder, check=True)


def activate(folder: Path) -> None:
    """Makes it what Triton launches on."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # found by its name wherever it is asked for later
    torch._C  # noqa: B018  loaded before, so that it keeps to its own libraries
    import ctypes

    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    import triton
    from triton.backends.nvidia import driver

    class Driver(driver.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher

        def get_device_capability(self, device=0):
            return divmod(ARCHITECTURE, 10)

        def get_current_device(self):
            return 0

        def set_current_device(self, device):
            pass

        def get_current_stream(self, device=0):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        build(folder)
        activate(folder)
        import ctypes

        from contrastive_kernels.triton import configs, engine, launching
        from contrastive_kernels.triton.compile import PROCESSORS

        launched = ctypes.CDLL("libcuda.so.1").stand_in_launches
        launched.restype = ctypes.c_long
        asked, bound = [], []
        launch, bind = engine.launch, launching._bound

        def counted(kernel, *arguments, **options):
            asked.append(kernel.fn.__name__)
            launch(kernel, *arguments, **options)

        def counted_bind(kernel, *arguments):
            bound.append(kernel.fn.__name__)
            return bind(kernel, *arguments)

        hopper = configs.Properties(ARCHITECTURE, PROCESSORS)
        with (
            patch.object(configs, "properties", lambda device: hopper),
            patch.object(engine, "launch", counted),
            patch.object(launching, "_bound", counted_bind),
        ):
            for name in names:
                asked.clear()
                before = launched()
                step(name, torch.bfloat16)
                found = {"name": name, "asked": list(asked), "launched": launched() - before}
                bound.clear()
                before = launched()
                step(name, torch.bfloat16)
                found |= {"again": launched() - before, "bound again": list(bound)}
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
