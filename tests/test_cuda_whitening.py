"""CUDA whitening: one block's algorithm on the CPU, the compiled kernels' resources, and a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from oracles import DOUBLE, randn

from contrastive_kernels import reference

backends = import_module("contrastive_kernels.backends")  # the name in the package is a function
ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
COMPILER = shutil.which("c++")
NVCC = shutil.which("nvcc")

HOST = r"""
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>
#include "whiten.h"

using namespace ck;

// One thread instead of a block's: bodies between two syncs run in one of three orders, which a
// race would show in the result, and copies are made as late as they may be.
struct Team {
  int order;
  std::vector<std::pair<float*, const float*>> pending;

  template <class Body>
  void for_each(int count, const Body& body) {
    const int step = count % 31 ? 31 : 1;
    for (int i = 0; i < count; ++i) {
      body(order == 0 ? i : order == 1 ? count - 1 - i : static_cast<int>(1L * i * step % count));
    }
  }
  void sync() {}
  void fetch(float* target, const float* source) {
    *target = std::numeric_limits<float>::quiet_NaN();
    pending.emplace_back(target, source);
  }
  void fetch_four(float* target, const float* source) {
    for (int e = 0; e < 4; ++e) fetch(target + e, source + e);
  }
  void arrive() {
    for (auto [target, source] : pending) *target = *source;
    pending.clear();
  }
};

// Shared memory of the stated size, of NaN, and canaries behind it.
struct Memory {
  std::vector<Four> data;
  size_t size;

  explicit Memory(int bytes) : data(bytes / 16 + 4), size(bytes / 4) {
    std::fill_n(begin(), 4 * data.size(), std::numeric_limits<float>::quiet_NaN());
    std::fill(begin() + size, begin() + 4 * data.size(), 7.0f);
  }
  float* begin() { return data[0].v; }
  bool intact() {
    return std::all_of(begin() + size, begin() + 4 * data.size(), [](float f) { return f == 7; });
  }
};

extern "C" bool forward(int order, int groups, int rows, int dim, int panel_rows, bool aligned,
                        float eps, const float* x, float* z, float* inverse, int* info) {
  const GroupShape shape{rows, dim, panel_rows, aligned};
  for (int g = 0; g < groups; ++g) {
    Memory memory(shared_bytes(dim, 1, panel_rows));
    Team team{order, {}};
    whiten_group(team, shape, eps, x + g * rows * dim, z + g * rows * dim, inverse + g * dim * dim,
                 info + g, memory.begin());
    if (!memory.intact() || !team.pending.empty()) return false;
  }
  return true;
}

extern "C" bool backward(int order, int groups, int rows, int dim, int panel_rows, bool aligned,
                         float eps, const float* grad, const float* z, const float* inverse,
                         float* dx) {
  const GroupShape shape{rows, dim, panel_rows, aligned};
  for (int g = 0; g < groups; ++g) {
    Memory memory(shared_bytes(dim, 2, panel_rows));
    Team team{order, {}};
    const int at = g * rows * dim;
    whiten_group_backward(team, shape, eps, grad + at, z + at, inverse + g * dim * dim, dx + at,
                          memory.begin());
    if (!memory.intact() || !team.pending.empty()) return false;
  }
  return true;
}

extern "C" int panel_rows(int rows, int dim, int matrices, int bytes) {
  return choose_panel_rows(rows, dim, matrices, bytes);
}

extern "C" int bytes(int dim, int matrices, int panel_rows) {
  return shared_bytes(dim, matrices, panel_rows);
}
"""


class Host:
    """The block's algorithm run by one thread on float32 CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for function in (library.forward, library.backward):
            function.restype = ctypes.c_bool

    def _call(self, function, shape, panel_rows, eps, order, tensors) -> None:
        dim = shape[2]
        aligned = dim % 4 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors[:2])
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        assert all(t.is_contiguous() for t in tensors)
        assert function(
            order, *shape, panel_rows, ctypes.c_bool(aligned), ctypes.c_float(eps), *pointers
        ), "shared memory overrun, or a copy that nobody waited for"

    def forward(self, x, eps=0.0, panel_rows=None, order=0):
        z, inverse = torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2], x.shape[2])
        info = torch.empty(x.shape[0], dtype=torch.int32)
        rows = panel_rows or x.shape[1] + x.shape[1] % 2
        self._call(self.library.forward, x.shape, rows, eps, order, [x, z, inverse, info])
        return z, inverse, info

    def backward(self, grad, z, inverse, eps=0.0, panel_rows=None, order=0):
        dx = torch.empty_like(z)
        rows = panel_rows or z.shape[1] + z.shape[1] % 2
        self._call(self.library.backward, z.shape, rows, eps, order, [grad, z, inverse, dx])
        return dx


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Host:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("whiten")
    (folder / "host.cpp").write_text(HOST)
    library = folder / "host.so"
    subprocess.run(
        [COMPILER, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
         f"-I{CSRC}", str(folder / "host.cpp"), "-o", str(library)],
        check=True,
    )  # fmt: skip
    return Host(ctypes.CDLL(str(library)))


def single(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, seed=seed, dtype=torch.float32)


def expected(x: torch.Tensor, upstream: torch.Tensor, eps: float):
    """Z, L^-1 and the gradient by autograd through the factorisation, in float64."""
    leaf = x.double().requires_grad_()
    z = reference.whiten(leaf, method="cholesky", eps=eps, iterations=1)
    (gradient,) = torch.autograd.grad(z, leaf, upstream.double())
    centered = x.double() - x.double().mean(1, keepdim=True)
    covariance = (1 - eps) * centered.mT @ centered / (x.shape[1] - 1)
    covariance = covariance + eps * torch.eye(x.shape[2], dtype=DOUBLE)
    inverse = torch.linalg.inv(torch.linalg.cholesky(covariance))
    return z.detach(), inverse, gradient


def assert_close(actual: torch.Tensor, exact: torch.Tensor, relative: float) -> None:
    """Every group within `relative` of the largest entry of its exact value."""
    error = (actual.double() - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2))
    assert (error <= relative).all(), error


# one group, primes, n = D + 1, D = 1, whole blocks, one more than that, the largest D
SHAPES = [
    (1, 3, 1), (3, 7, 5), (2, 9, 8), (3, 26, 12), (2, 37, 17), (1, 131, 61), (2, 128, 64),
    (1, 256, 128), (1, 400, 200), (1, 512, 256),
]  # fmt: skip


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_against_float64(host, shape, eps):
    x, upstream = single(*shape) + 3.0, single(*shape, seed=1)
    z, inverse, info = host.forward(x, eps)
    dx = host.backward(upstream, z, inverse, eps)
    exact_z, exact_inverse, exact_dx = expected(x, upstream, eps)
    # 1e-5 where n is twice D; the nearly singular covariances of n = D + 1 lose what they lose
    relative = 1e-5 if shape[1] > shape[2] + 2 else 2e-4
    assert info.tolist() == [0] * shape[0]
    assert_close(z, exact_z, relative)
    assert_close(inverse, exact_inverse, relative)
    assert_close(dx, exact_dx, relative)
    assert torch.equal(inverse, inverse.tril())


@pytest.mark.parametrize("shape", [(2, 64, 32), (1, 128, 64), (1, 256, 128), (1, 512, 256)])
def test_block_makes_the_covariance_the_identity(host, shape):
    z = host.forward(single(*shape) + 3.0)[0].double()
    identity = torch.eye(shape[2], dtype=DOUBLE).expand(shape[0], -1, -1)
    torch.testing.assert_close(z.mT @ z / (shape[1] - 1), identity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("panel_rows", [2, 10, 24])
def test_block_streams_its_rows_in_panels(host, panel_rows):
    x, upstream = single(2, 47, 19), single(2, 47, 19, seed=1)
    z, inverse, _ = host.forward(x, 0.1, panel_rows)
    dx = host.backward(upstream, z, inverse, 0.1, panel_rows)
    for actual, exact in zip((z, inverse, dx), expected(x, upstream, 0.1), strict=True):
        assert_close(actual, exact, 1e-5)


@pytest.mark.parametrize("panel_rows", [None, 8])
@pytest.mark.parametrize("shape", [(1, 47, 19), (1, 48, 24), (1, 70, 33)], ids=str)
def test_block_has_no_races(host, shape, panel_rows):
    """Bodies that read what another of the same phase writes would depend on their order."""
    x, upstream = single(*shape), single(*shape, seed=1)
    runs = []
    for order in range(3):
        z, inverse, _ = host.forward(x, 0.0, panel_rows, order)
        runs.append((z, inverse, host.backward(upstream, z, inverse, 0.0, panel_rows, order)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_block_takes_pointers_of_any_alignment(host):
    storage, upstream = single(1 + 2 * 20 * 8), single(2, 20, 8, seed=1)
    x = storage[1:].view(2, 20, 8)
    assert x.data_ptr() % 16 != 0
    z, inverse, _ = host.forward(x)
    exact_z, _, exact_dx = expected(x, upstream, 0.0)
    assert_close(z, exact_z, 1e-5)
    shifted = torch.cat((torch.zeros(1), upstream.flatten()))[1:].view(2, 20, 8)
    assert_close(host.backward(shifted, z, inverse), exact_dx, 1e-5)


def test_block_backward_centres_any_z(host):
    """As the formula says, also where Z does not have the mean zero that whitening gives it."""
    grad, z = single(2, 23, 9), single(2, 23, 9, seed=1) + 1.0
    inverse = single(2, 9, 9, seed=2).tril()
    g, y, w = grad.double(), z.double(), inverse.double()
    product = g.mT @ y
    mirrored = product.tril() + product.tril(-1).mT
    centered = (g - 0.9 / 22 * y @ mirrored) @ w
    assert_close(
        host.backward(grad, z, inverse, 0.1), centered - centered.mean(1, keepdim=True), 1e-5
    )


def spoil(x: torch.Tensor, defect: str, group: int) -> None:
    if defect == "equal columns":
        x[group, :, 2] = x[group, :, 0]
    elif defect == "constant feature":
        x[group, :, 3] = 0.7
    elif defect == "equal rows":
        x[group, 3:] = x[group, 2]
    else:
        x[group, 5, -1] = float(defect)


DEFECTS = [
    ("equal columns", 1), ("constant feature", 1), ("equal rows", 1), ("nan", 2), ("inf", 2),
    ("-inf", 2), ("1e30", 2),
]  # fmt: skip


@pytest.mark.parametrize(("defect", "code"), DEFECTS)
def test_block_reports_a_failed_group_and_leaves_the_others(host, defect, code):
    x = single(3, 40, 12)
    clean = host.forward(x)
    spoil(x, defect, 1)
    z, inverse, info = host.forward(x)
    assert info.tolist() == [0, code, 0]
    assert z[1].isnan().all() and inverse[1].isnan().all()
    for actual, whole in zip((z, inverse), clean[:2], strict=True):
        assert torch.equal(actual[::2], whole[::2])
    dx = host.backward(single(3, 40, 12, seed=1), z, inverse)
    assert dx[1].isnan().all() and dx[::2].isfinite().all()


def test_singular_group_is_cured_by_shrinkage(host):
    x = single(1, 40, 12)
    spoil(x, "equal columns", 0)
    z, inverse, info = host.forward(x, 0.1)
    assert info.tolist() == [0]
    assert_close(z, expected(x, x, 0.1)[0], 1e-5)


@pytest.mark.parametrize("dim", [1, 8, 63, 64, 100, 128, 192, 256])
@pytest.mark.parametrize("kibibytes", [40, 55, 163, 227])
@pytest.mark.parametrize("matrices", [1, 2])
def test_panels_fit_and_cover_the_rows(host, dim, kibibytes, matrices):
    limit = 1024 * kibibytes
    for rows in (2, 3, 128, 257, 1000, 4096):
        panel = host.library.panel_rows(rows, dim, matrices, limit)
        if panel == 0:
            assert host.library.bytes(dim, matrices, 2) > limit
            continue
        assert panel % 2 == 0
        assert host.library.bytes(dim, matrices, panel) <= limit
        panels = -(-rows // panel)
        assert panel < -(-rows // panels) + 2, "panels as even as can be"
        if panels > 1:
            larger = -(-rows // (panels - 1))
            assert host.library.bytes(dim, matrices, larger + larger % 2) > limit


def test_groups_of_the_common_sizes_stay_in_shared_memory(host):
    """128 x 64, four blocks to a multiprocessor of 228 KB, and 256 x 128, one block."""
    assert host.library.panel_rows(128, 64, 1, 228 * 256 - 1024) == 128
    assert host.library.panel_rows(256, 128, 1, 227 * 1024) == 256


@pytest.mark.skipif(NVCC is None, reason="no CUDA compiler")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_kernels_compile_without_spills(architecture, tmp_path):
    done = subprocess.run(
        [NVCC, "-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-cubin",
         "-Werror", "all-warnings", "-o", str(tmp_path / "whiten.cubin"),
         str(CSRC / "cuda" / "whiten.cu")],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert frames == [("0", "0", "0")] * 4, done.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 4 and all(64 < count <= 128 for count in registers), registers
    assert " smem" not in done.stderr, "shared memory beyond what the launcher counts"


needs_module = pytest.mark.skipif(
    backends.CUDA_ERROR is not None, reason=f"no CUDA extension: {backends.CUDA_ERROR}"
)


def test_module_is_built_where_nvcc_is():
    if NVCC is None or "CK_SKIP_BUILD" in (backends.CUDA_ERROR or ""):
        pytest.skip("no CUDA compiler, or left out on request")
    assert backends.CUDA_ERROR is None


@needs_module
def test_module_needs_neither_torch_nor_a_driver():
    """It loads alone in a fresh process, and without a GPU its functions say what is missing."""
    path = import_module("contrastive_kernels._cuda").__file__
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_cuda', {path!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.ARCHITECTURES)\n"
        "try:\n"
        "    module.whiten_fits(0, 64)\n"
        "    print('usable')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    architectures, answer = done.stdout.strip().split("\n")
    assert {"80", "90"} <= {name.split("-")[0] for name in architectures.split(",")}
    if torch.cuda.is_available():
        assert answer == "usable"
    else:
        assert answer.startswith("cudaDeviceGetAttribute: ")
