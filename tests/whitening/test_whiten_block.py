"""One block's whitening, csrc/cuda/whiten_group.h, run on the CPU against float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from oracles import DOUBLE, randn

from contrastive_kernels import reference

SOURCE = Path(__file__).with_name("whiten_block.cpp")
HEADERS = SOURCE.parents[2] / "csrc" / "cuda"
COMPILER = shutil.which("c++")


class Host:
    """The block's algorithm run by host threads, on float32 CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for function in (library.forward, library.backward):
            function.restype = ctypes.c_bool

    def _call(self, function, shape, panel_rows, eps, threads, tensors) -> None:
        dim = shape[2]
        aligned = dim % 4 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        assert all(t.is_contiguous() for t in tensors)
        assert function(
            threads, *shape, panel_rows, ctypes.c_bool(aligned), ctypes.c_float(eps), *pointers
        ), "shared memory overrun, or a copy that nobody waited for"

    def forward(self, x, eps=0.0, panel_rows=None, threads=1):
        z, inverse = torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2], x.shape[2])
        info = torch.empty(x.shape[0], dtype=torch.int32)
        rows = panel_rows or x.shape[1] + x.shape[1] % 2
        self._call(self.library.forward, x.shape, rows, eps, threads, [x, z, inverse, info])
        return z, inverse, info

    def backward(self, grad, z, inverse, eps=0.0, panel_rows=None, threads=1):
        dx = torch.empty_like(z)
        rows = panel_rows or z.shape[1] + z.shape[1] % 2
        self._call(self.library.backward, z.shape, rows, eps, threads, [grad, z, inverse, dx])
        return dx


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Host:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("whiten")
    library = folder / "host.so"
    subprocess.run(
        [COMPILER, "-std=c++20", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror", "-shared",
         "-fPIC", f"-I{HEADERS}", str(SOURCE), "-o", str(library)],
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


@pytest.mark.parametrize("threads", [-3, 3, -32, 32])
@pytest.mark.parametrize("panel_rows", [None, 8])
@pytest.mark.parametrize("shape", [(1, 29, 12), (1, 30, 17)], ids=str)
def test_block_of_many_threads_gives_the_bits_of_one(host, shape, panel_rows, threads):
    """Threads that run one after another from sync to sync, the last one first if negative."""
    x, upstream = single(*shape), single(*shape, seed=1)
    runs = []
    for count in (1, threads):
        z, inverse, _ = host.forward(x, 0.0, panel_rows, count)
        runs.append((z, inverse, host.backward(upstream, z, inverse, 0.0, panel_rows, count)))
    assert all(torch.equal(one, many) for one, many in zip(*runs, strict=True))


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
    upstream = single(3, 40, 12, seed=1)
    for panel_rows in (None, 10):
        dx = host.backward(upstream, z, inverse, panel_rows=panel_rows)
        whole = host.backward(upstream, *clean[:2], panel_rows=panel_rows)
        assert (dx[1] == 0).all() and torch.equal(dx[::2], whole[::2])


@pytest.mark.parametrize("panel_rows", [None, 2, 10])
@pytest.mark.parametrize("dim", [2, 5, 12, 33])
def test_block_refuses_a_row_twice(host, dim, panel_rows):
    """n = D + 1: the last pivot is rounding of any size, often far above that of one product."""
    x = single(200, dim + 1, dim)
    clean = host.forward(x, panel_rows=panel_rows)
    x[::2, 0] = x[::2, dim // 2 + 1]
    z, inverse, info = host.forward(x, panel_rows=panel_rows)
    assert (info[::2] == 1).all(), info[::2].bincount()
    assert z[::2].isnan().all() and inverse[::2].isnan().all()
    assert clean[2].count_nonzero() < 10  # some come as near to singular by chance
    for actual, whole in zip((z, inverse, info), clean, strict=True):
        assert torch.equal(actual[1::2].view(torch.int32), whole[1::2].view(torch.int32))


def nearly_singular(kind: str) -> torch.Tensor:
    """Groups at the edge of what can be whitened in float32."""
    if kind == "a row nearly twice":
        x = single(60, 34, 33)
        x[:, 0] = x[:, 5] + 1e-2 * x[:, 0]
        return x
    if kind == "a common part":
        return single(40, 128, 64) + 300 * single(40, 128, 1, seed=1)
    # every pivot is above half of its variance, and L^-1 grows like exp(sqrt(D)) all the same
    factor = -0.9 * torch.arange(40, dtype=DOUBLE)[:, None].clamp(min=1).rsqrt()
    factor = factor.expand(40, 40).tril(-1) + torch.eye(40, dtype=DOUBLE)
    white = reference.whiten(randn(40, 80, 40), method="cholesky", eps=0.0)
    return (white @ factor.mT).float()


@pytest.mark.parametrize("kind", ["a row nearly twice", "a common part", "hidden from pivots"])
def test_block_returns_unit_variances_or_refuses(host, kind):
    z, _, info = host.forward(nearly_singular(kind))
    variances = z[info == 0].double().square().sum(1) / (z.shape[1] - 1)
    assert 0 < info.count_nonzero(), "too easy"
    assert ((variances - 1).abs() < 0.1 + 1e-5).all()


# largest chains of additions: all rows of a part, panels of one row in a part
@pytest.mark.parametrize("panel_rows", [None, 2, 10])
@pytest.mark.parametrize("rows", [13, 40, 900])
def test_block_refuses_constant_features(host, rows, panel_rows):
    """Their variance is what rounding leaves of the mean."""
    constants = torch.tensor([0.0, 1e-30, 0.1, 0.7, -1 / 3, 1000.3, 3.3e6, -7e15])
    x = single(len(constants), rows, 5)
    x[:, :, 3] = constants[:, None]
    assert host.forward(x, panel_rows=panel_rows)[2].tolist() == [1] * len(constants)


@pytest.mark.parametrize("panel_rows", [None, 10])
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_block_takes_small_deviations_from_a_large_mean(host, mean, panel_rows):
    z, _, info = host.forward(single(3, 900, 12) + mean, panel_rows=panel_rows)
    assert info.tolist() == [0] * 3
    identity = torch.eye(12, dtype=DOUBLE).expand(3, -1, -1)
    covariance = z.double().mT @ z.double() / 899
    torch.testing.assert_close(covariance, identity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [-32, 32])
@pytest.mark.parametrize("panel_rows", [None, 10])
def test_block_in_doubt_gives_the_bits_of_one_thread(host, panel_rows, threads):
    """Groups whose results are looked at: good ones, and some that are refused for them."""
    x, upstream = nearly_singular("a row nearly twice")[:8], single(8, 34, 33, seed=1)
    runs = []
    for count in (1, threads):
        z, inverse, info = host.forward(x, 0.0, panel_rows, count)
        dx = host.backward(upstream, z, inverse, 0.0, panel_rows, count)
        assert 0 < info.count_nonzero() < len(info)
        runs.append((z, inverse, info, dx))
    for one, many in zip(*runs, strict=True):
        assert torch.equal(one.view(torch.int32), many.view(torch.int32))


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
