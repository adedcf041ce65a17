"""CUDA whitening: the compiled kernels' resources, the module, and on a GPU the results."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from oracles import DOUBLE, randn

import contrastive_kernels as ck
from contrastive_kernels import reference

backends = import_module("contrastive_kernels.backends")  # the name in the package is a function
SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "whiten.cu"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="no CUDA compiler")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_kernels_compile_without_spills(architecture, tmp_path):
    done = subprocess.run(
        [NVCC, "-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-cubin",
         "-Werror", "all-warnings", "-o", str(tmp_path / "whiten.cubin"),
         str(SOURCE)],
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


needs_gpu = pytest.mark.skipif(
    backends.CUDA_ERROR is not None or not torch.cuda.is_available(),
    reason=backends.CUDA_ERROR or "there is no GPU here",
)


@pytest.fixture
def cuda():
    return import_module("contrastive_kernels.whitening.cuda")


def on_gpu(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, seed=seed, dtype=torch.float32).cuda()


def both(cuda, x: torch.Tensor, upstream: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    z, inverse, info = cuda.whiten_cholesky(x, eps)
    return z, inverse, info, cuda.whiten_cholesky_backward(upstream, z, inverse, eps)


# small and large blocks; whole, streamed, and beyond one multiprocessor's memory; odd sizes
SHAPES = [
    (1, 3, 1), (300, 13, 5), (3, 67, 33), (512, 128, 64), (5, 1000, 64), (64, 256, 128),
    (2, 131, 65), (3, 400, 200), (2, 4096, 256),
]  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_against_float64(cuda, shape, eps):
    x, upstream = on_gpu(*shape) + 3.0, on_gpu(*shape, seed=1)
    if not cuda.supports(x):
        pytest.skip("beyond this GPU's shared memory")
    z, inverse, info, dx = both(cuda, x, upstream, eps)
    leaf = x.double().requires_grad_()
    exact_z = reference.whiten(leaf, method="cholesky", eps=eps, iterations=1)
    (exact_dx,) = torch.autograd.grad(exact_z, leaf, upstream.double())
    assert not info.any()
    for actual, exact in ((z, exact_z), (dx, exact_dx)):
        error = (actual - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2))
        assert (error <= 1e-5).all(), error.max()
    assert torch.equal(inverse, inverse.tril())
    covariance = torch.cov((x[0].double() @ inverse[0].double().mT).mT)
    if eps == 0:
        identity = torch.eye(shape[2], dtype=DOUBLE, device="cuda")
        torch.testing.assert_close(covariance.view_as(identity), identity, rtol=0, atol=1e-5)


@needs_gpu
def test_kernels_take_pointers_of_any_alignment(cuda):
    x = on_gpu(1 + 2 * 40 * 16)[1:].view(2, 40, 16)
    upstream = on_gpu(2, 40, 16, seed=1)
    aligned = both(cuda, x.clone(), upstream, 0.0)
    assert x.data_ptr() % 16 != 0
    for actual, wanted in zip(both(cuda, x, upstream, 0.0), aligned, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


@needs_gpu
def test_kernels_report_a_failed_group_and_leave_the_others(cuda):
    x, upstream = on_gpu(4, 40, 12), on_gpu(4, 40, 12, seed=1)
    clean = both(cuda, x, upstream, 0.0)
    x[1, :, 2] = x[1, :, 0]
    x[3, 0, 0] = torch.nan
    spoilt = both(cuda, x, upstream, 0.0)
    z, inverse, info, dx = spoilt
    assert info.tolist() == [0, 1, 0, 2]
    for actual, whole in zip(spoilt, clean, strict=True):
        assert torch.equal(actual[::2], whole[::2])
    assert z[1::2].isnan().all() and inverse[1::2].isnan().all()
    assert dx[1::2].count_nonzero() == 0


@needs_gpu
@pytest.mark.parametrize("dim", [5, 33, 100])
def test_kernels_refuse_a_row_twice(cuda, dim):
    """n = D + 1: the last pivot is rounding of any size, and the variances of the result show it.
    Small blocks and large ones."""
    x, upstream = on_gpu(400, dim + 1, dim), on_gpu(400, dim + 1, dim, seed=1)
    x[:, 0] = x[:, dim // 2 + 1]
    z, inverse, info, dx = both(cuda, x, upstream, 0.0)
    assert (info == 1).all(), info.bincount()
    assert z.isnan().all() and inverse.isnan().all() and dx.count_nonzero() == 0


@needs_gpu
@pytest.mark.parametrize("rows", [40, 20000])
def test_kernels_refuse_constant_features(cuda, rows):
    """Their variance is what rounding leaves of the mean; 20000 rows come in panels."""
    constants = torch.tensor([0.0, 0.7, -1 / 3, 1000.3, 3.3e6], device="cuda")
    x = on_gpu(len(constants), rows, 12)
    x[:, :, 3] = constants[:, None]
    assert cuda.whiten_cholesky(x, 0.0)[2].tolist() == [1] * len(constants)


@needs_gpu
@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(64, 128, 64), (8, 256, 128), (3, 512, 256)], ids=str)
def test_two_runs_give_equal_bits(cuda, shape):
    x, upstream = on_gpu(*shape), on_gpu(*shape, seed=1)
    if not cuda.supports(x):
        pytest.skip("beyond this GPU's shared memory")
    first, second = both(cuda, x, upstream, 0.0), both(cuda, x, upstream, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
def test_kernels_can_be_captured_in_a_graph(cuda):
    x, upstream = on_gpu(8, 128, 64), on_gpu(8, 128, 64, seed=1)
    both(cuda, x, upstream, 0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(cuda, x, upstream, 0.0)
    x.copy_(on_gpu(8, 128, 64, seed=2))
    graph.replay()
    for actual, wanted in zip(captured, both(cuda, x, upstream, 0.0), strict=True):
        assert torch.equal(actual, wanted)


@needs_gpu
def test_kernels_run_on_the_current_stream(cuda):
    x, upstream = on_gpu(64, 128, 64), on_gpu(64, 128, 64, seed=1)
    wanted = both(cuda, x, upstream, 0.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)  # the kernels must wait for the copy behind it
        late.copy_(x)
        results = both(cuda, late, upstream, 0.0)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


@needs_gpu
def test_bfloat16_groups_with_strides():
    x = on_gpu(64, 8, 24).bfloat16().transpose(0, 1).requires_grad_()
    upstream = on_gpu(8, 64, 24, seed=1)
    z = ck.whiten(x)
    (gradient,) = torch.autograd.grad(z, x, upstream)
    leaf = x.detach().double().requires_grad_()
    exact = ck.whiten(leaf, backend="reference")
    (wanted,) = torch.autograd.grad(exact, leaf, upstream.double())
    torch.testing.assert_close(z.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())
    torch.testing.assert_close(gradient, wanted.bfloat16(), rtol=2**-7, atol=1e-5)


@needs_module
def test_supports_names_what_the_kernels_take(cuda, monkeypatch):
    monkeypatch.setattr(cuda, "_fits", lambda device, dim: dim <= 256)
    assert not cuda.supports(torch.empty(2, 8, 4, device="cpu"))
    if torch.cuda.is_available():
        x = on_gpu(2, 8, 4)
        assert cuda.supports(x)
        for other in (x.double(), x.bfloat16(), x.mT, x[:0], on_gpu(1, 2, 257)):
            assert not cuda.supports(other)
