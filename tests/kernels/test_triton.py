"""What is particular to the Triton engine: its schedules, parts and workspaces."""

from __future__ import annotations

import itertools
import os

import oracles
import pytest
import sweeps
import torch
from fresh import run_python
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference

pytestmark = pytest.mark.skipif("triton" not in oracles.BACKENDS, reason="Triton is not usable")

ROWS, KEYS = 150, 290
SCHEDULES = {
    "one way": (dict(), (ROWS, KEYS)),
    "frozen keys": (dict(frozen=True), (ROWS, KEYS)),
    "mean": (dict(mean=True), (ROWS, KEYS)),
    "two ways": (dict(columns=True), (ROWS, KEYS)),
    "itself": (dict(itself=True), (ROWS, ROWS)),
    "few rows": (dict(), (3, 530)),
    "few keys": (dict(), (530, 3)),
}  # fmt: skip


@pytest.fixture
def engine(monkeypatch):
    """The engine with workspaces so small that every schedule works in several parts."""
    from contrastive_kernels.triton import engine

    monkeypatch.setattr(engine, "PARTIAL_BYTES", 1 << 12)
    monkeypatch.setattr(engine, "CHUNK_BYTES", 1 << 17)
    monkeypatch.setattr(engine, "CHUNK_COLUMNS", 256)
    return engine


def sweep_and_gradients(
    sweep, dim: int, sizes: tuple[int, int], dtype=torch.float64, frozen=False, itself=False,
    **options,
) -> list[Tensor]:  # fmt: skip
    x = oracles.randn(sizes[0], dim).to(dtype).requires_grad_()
    y = None if itself else oracles.randn(sizes[1], dim, seed=1).to(dtype)
    leaves = [x]
    if not (itself or frozen):
        leaves.append(y.requires_grad_())
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    leaves.append(scale)
    ids = torch.randint(0, 9, (sizes[0],), generator=oracles.generator(2))
    other = ids if itself else torch.randint(0, 9, (sizes[1],), generator=oracles.generator(3))
    out = sweep(x, y, scale=scale, exclude=(ids, other), normalize=True, **options)
    values = [t for t in out[:4] if t is not None]
    upstream = [oracles.randn(*t.shape, seed=7 + k).to(t.dtype) for k, t in enumerate(values)]
    return [*values, *torch.autograd.grad(values, leaves, upstream)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1.0)
        assert error <= tolerance, f"output {k}: error {error:.1e}"


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "dim"),  # a part of a tile, and in turn several tiles or a library's products
    [(name, dim) for k, name in enumerate(SCHEDULES) for dim in (16, (150, 290)[k % 2])],
)
def test_schedules_in_parts(engine, name, dim):
    options, sizes = SCHEDULES[name]

    def triton(*args, **kwargs):
        return sweeps.sweep(*args, backend="triton", **kwargs)

    got = sweep_and_gradients(triton, dim, sizes, **options)
    assert_all_close(got, sweep_and_gradients(reference.sweep, dim, sizes, **options), 1e-11)
    if dim == 16:
        for a, b in zip(got, sweep_and_gradients(triton, dim, sizes, **options), strict=True):
            assert torch.equal(a, b)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [48, 272])
def test_half_and_single_in_parts(engine, dim, dtype):
    def dense(x, y):
        return reference.sweep(x, y, scale=14.0, normalize=True, columns=True).lse

    def fused(x, y):
        out = sweeps.sweep(x, y, scale=14.0, normalize=True, columns=True, backend="triton")
        return out.lse

    x, y = oracles.randn(140, dim).to(dtype), oracles.randn(300, dim, seed=1).to(dtype)
    oracles.assert_within_budget(fused, dense, [x, y])


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("needs", "dim"),
    [(needs, (40, 290)[sum(needs) % 2])
     for needs in itertools.product([False, True], repeat=3) if any(needs)],
    ids=str,
)  # fmt: skip
def test_summed_softplus_brings_its_gradients(engine, dim, needs):
    results = []
    for sweep in (sweeps.softplus_sweep, reference.softplus_sweep):
        x, y = oracles.randn(150, dim), oracles.randn(270, dim, seed=1)
        scale, bias = (torch.tensor(v, dtype=torch.float64) for v in (9.0, -4.0))
        leaves = [t.requires_grad_() for t, need in zip((x, y, bias), needs, strict=True) if need]
        options = dict(scale=scale.requires_grad_(), normalize=True)
        if sweep is sweeps.softplus_sweep:
            value = sweep(x, y, bias=bias, summed=True, backend="triton", **options).value
        else:
            value = sweep(x, y, bias=bias, **options).value.sum()
        results.append([value, *torch.autograd.grad(value * 0.7, [*leaves, scale])])
    assert results[0][0].dim() == 0
    assert_all_close(*results, 1e-12)


def test_few_pairs_go_the_way_of_many(monkeypatch):
    """On every device the tests reach the fixed shift, and the sweep that repairs its rows."""
    from contrastive_kernels.triton import engine

    swept, launch = [], engine.launch

    def recorded(kernel, grid, *arguments, **constants):
        if "FIXED" in constants:
            swept.append((constants["FIXED"], constants["REPAIR"]))
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(engine, "launch", recorded)
    x, y = oracles.randn(5, 4), oracles.randn(7, 4, seed=1)
    sweeps.sweep(x, y, normalize=True, mean=True, backend="triton")
    assert {(True, False), (False, True)} <= set(swept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_features_are_copied_where_they_are_not_aligned(dtype):
    """Rows of a multiple of 16 elements, from an address that is a multiple of 16 on."""
    from contrastive_kernels.triton.engine import wide

    whole = oracles.randn(6, 64).to(dtype)
    assert wide(whole) is whole and wide(whole[::2]).data_ptr() == whole.data_ptr()
    assert wide(whole[:, 16:48]).data_ptr() == whole[:, 16:48].data_ptr()
    for odd in (whole[:, 1:33], whole[:, :20], whole[:, :5], whole.T, whole[:, ::2]):
        made = wide(odd)
        size, dim = odd.shape
        assert made.shape == (size, -(-dim // 16) * 16) and made.stride(1) == 1
        assert made.stride(0) % 16 == 0 and made.data_ptr() % 16 == 0
        assert torch.equal(made[:, :dim], odd) and not made[:, dim:].any()


@pytest.mark.parametrize("held", [1, 2, 3])
@pytest.mark.parametrize(("rows", "keys"), [(1024, 2**20), (256, 2**20), (4096, 65536), (64, 8192)])
def test_parts_fill_the_last_wave(monkeypatch, rows, keys, held):
    """Of 132 multiprocessors that hold so many programs at once, hardly any has less to do."""
    from contrastive_kernels.triton import engine

    monkeypatch.setattr(engine, "processors", lambda device: 132)
    x = torch.empty(2, 128)
    problem = engine.Problem(x, x, torch.ones(()), None, (None, None), (None, None), True)
    tile = engine.Tile(64, 64, 128, 4, 3)
    parts, each = problem.parts(rows, keys, tile, True)
    tiles, programs = rows // 64 * (keys // 64), rows // 64 * parts
    assert each * parts >= keys // 64
    waves = -(-programs // (132 * held))
    if programs >= 132 * held:
        assert tiles / (waves * 132 * held * each) > 0.9, (parts, each)
    else:  # as many parts as there are tiles
        assert each <= 2


def test_long_strides_are_made_short(monkeypatch):
    from contrastive_kernels.triton import engine

    monkeypatch.setattr(engine, "LARGEST_STRIDE", 100)
    wide = oracles.randn(40, 3, 50)
    x, y = wide[:, 1], wide[:, 2]
    got = sweeps.sweep(x, y, backend="triton").lse
    assert_all_close([got], [reference.sweep(x, y).lse], 1e-13)


@pytest.mark.parametrize("shared", [True, False], ids=["one tensor", "two tensors"])
def test_ids_beyond_32_bits(shared):
    x = oracles.randn(70, 5)
    low = torch.randint(0, 3, (70,), generator=oracles.generator())
    ids = low * 2**33 - 2**40  # all equal in their low 32 bits
    other = ids if shared else ids.flip(0).contiguous()
    for option in ("exclude", "keep"):
        got = sweeps.sweep(x, x.clone(), backend="triton", **{option: (ids, other)}).lse
        assert_all_close([got], [reference.sweep(x, x, **{option: (ids, other)}).lse], 1e-13)


def test_zero_and_tiny_vectors():
    for dtype in (torch.float64, torch.float32, torch.float16):
        tiny = torch.finfo(dtype).smallest_normal * 4
        x = oracles.randn(70, 6).to(dtype)
        x[3], x[5] = 0.0, tiny
        y = oracles.randn(80, 6, seed=1).to(dtype)
        y[11], y[12] = 0.0, tiny
        grads = []
        for sweep, options in ((sweeps.sweep, {"backend": "triton"}), (reference.sweep, {})):
            for frozen in (False, True):
                a, b = x.clone().requires_grad_(), y.clone().requires_grad_(not frozen)
                out = sweep(a, b, scale=20.0, normalize=True, **options).lse
                assert torch.isfinite(out).all()
                out.sum().backward()
                grads.append([t.grad for t in (a, b) if t.grad is not None])
        for got, wanted in zip(grads[:2], grads[2:], strict=True):
            for a, b in zip(got, wanted, strict=True):
                plain = torch.ones(len(a), dtype=torch.bool)
                plain[[3, 5, 11, 12]] = False
                tolerance = 1e-12 if dtype == torch.float64 else 2e-3
                assert_all_close([a[plain]], [b[plain]], tolerance)


def test_precision_of_float32_follows_torch():
    from contrastive_kernels.triton.configs import arithmetic

    x = torch.ones(2, 3)
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert arithmetic(x, x).precision == precision
            assert arithmetic(x.bfloat16(), x).precision == precision
            assert arithmetic(x.double(), x.double()).precision == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


PRECISIONS = """
import os, torch
from contrastive_kernels.backends import float32_products
from contrastive_kernels.triton.configs import arithmetic

new, every = "torch.backends.cuda.matmul.fp32_precision", "torch.backends.fp32_precision"
old, allow = "torch.set_float32_matmul_precision", "torch.backends.cuda.matmul.allow_tf32"
x = torch.ones(2, 3)
for wanted, *settings in [
    ("tf32x3",), ("tf32", f"{new} = 'tf32'"), ("tf32x3", f"{new} = 'ieee'"),
    ("tf32", f"{every} = 'tf32'"), ("tf32x3", f"{every} = 'ieee'"),
    ("tf32x3", f"{every} = 'tf32'", f"{new} = 'ieee'"), ("tf32", f"{allow} = True"),
    ("tf32x3", f"{old}('high')", f"{new} = 'ieee'"),
    ("tf32x3", f"{new} = 'tf32'", f"{old}('highest')"),
    ("tf32", f"{new} = 'ieee'", f"{old}('high')"), ("tf32", f"{new} = 'ieee'", f"{allow} = True"),
    ("tf32x3", f"{new} = 'tf32'", f"{allow} = False"),
    ("tf32x3", f"{allow} = True", f"{every} = 'ieee'", f"{new} = 'ieee'"),
    ("tf32x3", "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'"),
]:
    child = os.fork()  # torch cannot go back to where nothing was set
    if child == 0:
        exec("\\n".join(settings))
        on_cpu = float32_products("cpu")
        print(wanted, arithmetic(x, x).precision, on_cpu, settings, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_precision_of_float32_is_read_after_any_setting():
    lines = run_python(PRECISIONS).splitlines()
    assert len(lines) == 14
    for line in lines:
        wanted, got, on_cpu, *_ = line.split()
        assert got == wanted and on_cpu in ("none", "ieee", "tf32", "bf16"), line


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "siglip_loss", "nt_xent", "cacr"])
def test_cuda_graph(loss):
    more = {"clip_loss": (10.0,), "siglip_loss": (10.0, -5.0)}.get(loss, ())
    x = torch.randn(300, 64, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(300, 64, dtype=torch.bfloat16, requires_grad=True)

    def step():
        value = getattr(ck, loss)(x, y, *more)
        return value, *torch.autograd.grad(value, (x, y))

    wanted = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_on_a_gpu():
    x = torch.randn(500, 32, requires_grad=True)
    y = torch.randn(500, 32, requires_grad=True)
    labels = torch.randint(0, 9, (500,))
    ck.info_nce(x, y).backward()  # compiled, and all workspaces made
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ck.info_nce(x, y).backward()
        ck.clip_loss(x, y, 10.0).backward()
        ck.siglip_loss(x, y, 10.0, -5.0).backward()
        ck.nt_xent(x, y).backward()
        ck.sup_con(x, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(("columns", "mean"), [(False, True), (True, False)])
@pytest.mark.parametrize("largest", [-200.0, 3.0, 200.0, 5000.0])
def test_one_shift_for_logits_with_a_bias(monkeypatch, columns, mean, largest):
    """It holds where biases are large or none; what is far below them is swept again."""
    from contrastive_kernels.triton import forward

    swept = []
    plain = forward.sweep_and_merge

    def watched(*arguments, **options):
        swept.append(options["fixed"])
        plain(*arguments, **options)

    monkeypatch.setattr(forward, "sweep_and_merge", watched)
    x, y = (oracles.randn(n, 5, seed=n, dtype=torch.float32) for n in (20, 70))
    bias = largest - 3 * oracles.randn(70, seed=3).abs().float()
    bias[::7] = -torch.inf
    bias[[1, 5]] = torch.tensor([torch.nan, largest + 100])  # of dropped pairs alone
    ids = torch.zeros(20), (torch.arange(70) != 1) & (torch.arange(70) != 5)
    ids = tuple(t.long() for t in ids)
    options = {"scale": 20.0, "normalize": True, "exclude": ids, "mean": mean, "columns": columns}
    out = sweeps.sweep(x, y, bias=bias, backend="triton", **options)
    assert swept == [True, False] * (1 + columns)
    exact = reference.sweep(x.double(), y.double(), bias=bias.double(), **options)
    for name in ("lse", "mean", "col_lse", "col_mean"):
        got, right = getattr(out, name), getattr(exact, name)
        if right is not None:
            assert got is not None
            torch.testing.assert_close(got.double(), right, rtol=1e-6, atol=1e-5, equal_nan=True)
