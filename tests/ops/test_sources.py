"""Negatives that come in chunks: every loss beside the same negatives in one tensor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import BACKENDS, DEVICE, DOUBLE, assert_within_budget, generator, interpreted, randn
from sweeps import softplus_sweep, sweep
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.ops import row_softplus, row_stats

N, M, D = 6, 47, 5
ROOT = Path(__file__).resolve().parents[2]
BIAS = randn(M, seed=7)
IDS = tuple(torch.randint(0, 5, (count,), generator=generator(8)) for count in (N, M))
SIZES = {
    "one": (M,),
    "uneven": (1, 20, 19, 7),
    "empty": (0, 30, 0, 17, 0),
}
LOSSES = {
    "info_nce": lambda q, k, s, y, **o: ck.info_nce(q, k, negatives=y, scale=s, **o),
    "info_nce both": lambda q, k, s, y, **o: ck.info_nce(
        q, k, negatives=y, scale=s, in_batch=True, **o
    ),
    "info_nce ids, bias": lambda q, k, s, y, **o: ck.info_nce(
        q, k, negatives=y, scale=s, exclude=IDS, key_bias=BIAS, normalize=False, **o
    ),
    "eqco": lambda q, k, s, y, **o: ck.eqco(q, k, negatives=y, scale=s, **o),
    "nce": lambda q, k, s, y, **o: ck.nce(q, k, y, num_data=100, **o),
    "nce, Z learned": lambda q, k, s, y, **o: ck.nce(q, k, y, num_data=100, log_z=s, **o),
    "cacr": lambda q, k, s, y, **o: ck.cacr(q, k, negatives=y, **o),
    "cacr not normalised": lambda q, k, s, y, **o: ck.cacr(q, k, negatives=y, normalize=False, **o),
    "cacr detached": lambda q, k, s, y, **o: ck.cacr(q, k, negatives=y, detach_weights=True, **o),
    "cacr rbf": lambda q, k, s, y, **o: ck.cacr(q, k, negatives=y, cost="rbf", **o),
    "cct": lambda q, k, s, y, **o: ck.cct(q, k, negatives=y, **o),
}


def leaves(dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """query, key, scale."""
    query = randn(N, D, seed=1)
    key = query + 0.5 * randn(N, D, seed=2)
    single = torch.promote_types(dtype, torch.float32)
    made = query.to(dtype), key.to(dtype), torch.tensor(3.0, dtype=single)
    return [t.requires_grad_() for t in made]


def keys(dtype: torch.dtype = DOUBLE) -> Tensor:
    return randn(M, D, seed=3).to(dtype)


def evaluate(loss, inputs: list[Tensor], negatives, **options) -> list[Tensor]:
    """The value, and the gradients of the inputs."""
    value = loss(*inputs, negatives, **options)
    upstream = randn(*value.shape, seed=9).to(value.dtype)
    return [value, *torch.autograd.grad(value, inputs, upstream, materialize_grads=True)]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for which, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, (which, a, b)
        error = (a - b).abs().max()
        assert error <= tolerance * (1 + b.abs().max()), f"output {which}: error {error:.1e}"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_equal_those_of_one_tensor(backend, name, sizes, reduction):
    if reduction == "none" and name == "cacr rbf":
        return
    if interpreted(backend) and (sizes, reduction) not in (("uneven", "mean"), ("empty", "none")):
        return
    chunks = list(keys().split(SIZES[sizes]))
    options = {"backend": backend, "reduction": reduction}
    actual = evaluate(LOSSES[name], leaves(), chunks, **options)
    assert_same(actual, evaluate(LOSSES[name], leaves(), keys(), **options), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["info_nce", "cacr", "nce"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_are_within_the_budget(backend, name, dtype):
    split = list(keys(dtype).split(SIZES["uneven"]))
    options = {"cacr": {}, "info_nce": {"temperature": 0.1}, "nce": {"num_data": 100}}[name]

    def actual(query, key):
        first = (query, key, split) if name == "nce" else (query, key)
        more = {} if name == "nce" else {"negatives": split}
        return getattr(ck, name)(*first, **more, **options, backend=backend)

    def dense(query, key):
        y = keys(dtype).to(query.dtype)
        first = (query, key, y) if name == "nce" else (query, key)
        more = {} if name == "nce" else {"negatives": y}
        return getattr(reference, name)(*first, **more, **options)

    assert_within_budget(actual, dense, leaves(dtype)[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE])
@pytest.mark.parametrize("backend", BACKENDS)
def test_files_of_every_dtype(backend, dtype, tmp_path):
    path = write(tmp_path / "negatives", keys(dtype))
    source = ck.FileNegatives(path, D, dtype, chunk_rows=9)
    assert source.shape == (M, D)
    read = torch.cat([chunk.clone() for chunk in source])
    assert torch.equal(read, keys(dtype).cpu())
    loss = LOSSES["info_nce"]
    actual = evaluate(loss, leaves(dtype), source, backend=backend)
    listed = list(keys(dtype).split(9))
    assert_same(actual, evaluate(loss, leaves(dtype), listed, backend=backend), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, DOUBLE])
def test_npy_files_know_their_shape(dtype, tmp_path):
    np = pytest.importorskip("numpy")
    path = tmp_path / "negatives.npy"
    np.save(path, keys(dtype).cpu().numpy())
    source = ck.FileNegatives(path)
    assert (source.shape, source.dtype) == ((M, D), dtype)
    assert torch.equal(torch.cat(list(source)), keys(dtype).cpu())
    with pytest.raises(ValueError, match=f"dim must be that of .*npy, {D}, got 3"):
        ck.FileNegatives(path, 3)
    for wrong, got in ((np.zeros(3), r"shape \(3,\)"), (np.zeros((3, 2), int), "int64")):
        np.save(path, wrong)
        with pytest.raises(ValueError, match=rf"path must hold an array \(M, D\) .* got .*{got}"):
            ck.FileNegatives(path)
    np.save(path, np.zeros((3, 2)).T)
    with pytest.raises(ValueError, match="column by column"):
        ck.FileNegatives(path)


def write(path: Path, t: Tensor) -> Path:
    path.write_bytes(bytes(t.cpu().contiguous().view(torch.uint8).numpy()))
    return path


@pytest.mark.parametrize("name", ["info_nce both", "info_nce ids, bias", "nce", "cacr"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_add_up(backend, name):
    options = {"backend": backend, "return_stats": True}
    chunks = list(keys().split(SIZES["uneven"]))
    loss, stats = LOSSES[name](*leaves(), chunks, **options)
    expected_loss, expected = LOSSES[name](*leaves(), keys(), **options)
    given = [(a, b) for a, b in zip(stats, expected, strict=True) if b is not None]
    assert len(given) >= 3 and stats.rank.sum() > 0
    for a, b in [(loss, expected_loss), *given]:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sweeps_with_a_learned_bias_and_rows_without_pairs(backend, mean):
    """Rows 0 and 1 keep no pair; the gradient of a bias takes a second pass."""
    keep = torch.arange(N), IDS[1] + 2 - (IDS[1] > 3).long()
    inputs = [*leaves()[::2], BIAS.clone().requires_grad_()]
    source = ck_source(SIZES["uneven"])

    def outputs(y):
        x, scale, bias = inputs
        options = {"bias": bias, "keep": keep, "backend": backend}
        soft = softplus_sweep(x, y, scale=scale, **options).value
        out = sweep(x, y, scale=scale, mean=mean, normalize=True, **options)
        assert (out.lse[:2] == -torch.inf).all() and out.lse[2:].isfinite().all()
        values = [soft, out.lse[2:], *([out.mean] if mean else [])]
        upstream = [randn(*t.shape, seed=i) for i, t in enumerate(values)]
        return [*values, *torch.autograd.grad(values, inputs, upstream)]

    assert_same(outputs(source), outputs(keys()), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_primitives_take_a_source(backend):
    x, source = leaves()[0], ck_source(SIZES["uneven"])
    out = row_stats(x, source, scale=2.0, backend=backend)
    assert_same(list(out), list(row_stats(x, keys(), scale=2.0, backend=backend)), 1e-12)
    softplus = row_softplus(x, source, bias=-0.5, backend=backend)
    assert_same([softplus], [row_softplus(x, keys(), bias=-0.5, backend=backend)], 1e-12)
    with pytest.raises(ValueError, match="columns=True needs keys of shape .* got a y in chunks"):
        row_stats(x, source, columns=True, backend=backend)


class Source:
    """As a user writes one; counts its passes."""

    def __init__(self, shape=(M, D), dtype=DOUBLE, chunks=()) -> None:
        self.shape, self.dtype, self.chunks, self.passes = shape, dtype, list(chunks), 0

    def __iter__(self):
        self.passes += 1
        yield from self.chunks


def ck_source(sizes: tuple[int, ...]) -> Source:
    return Source(chunks=keys().split(sizes))


@pytest.mark.parametrize(
    "name, passes",
    [("info_nce", 1), ("info_nce ids, bias", 1), ("nce", 2), ("cacr", 2), ("cacr rbf", 2)],
)
def test_number_of_passes(name, passes):
    """One for value and gradient; NCE's estimate of Z takes another, and so does a mean."""
    backend = "cpu" if "cpu" in BACKENDS and DEVICE == "cpu" else "triton"
    if backend not in BACKENDS:
        pytest.skip("the dense reference takes a pass for each")
    source = ck_source(SIZES["uneven"])
    evaluate(LOSSES[name], leaves(), source, backend=backend)
    assert source.passes == passes
    with torch.no_grad():
        LOSSES["info_nce"](*leaves(), source, backend=backend)
    assert source.passes == passes + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_too_long_for_one_pass(backend):
    """Triton stores parts of dL/dz for them, and its forward brings no gradient."""
    x = randn(N, 140, seed=1).float().requires_grad_()
    y = randn(M, 140, seed=3).float()
    source = Source(shape=(M, 140), dtype=torch.float32, chunks=y.split(20))
    results = []
    for negatives in (source, y):
        lse = sweep(x, negatives, scale=4.0, normalize=True, backend=backend).lse
        results.append([lse, *torch.autograd.grad(lse.sum(), x)])
    assert_same(*results, 1e-5)
    assert source.passes == (1 if backend == "cpu" else 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    source = Source(dtype=torch.float32, chunks=keys(torch.float32).split(20))
    results = []
    for negatives in (source, keys(torch.float32)):
        inputs = leaves(torch.float32)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            value = LOSSES["cacr"](*inputs, negatives, backend=backend)
        results.append([value, *torch.autograd.grad(value, inputs[:2])])
    assert_same(*results, 1e-2 if backend == "triton" else 1e-5)


def test_the_module_of_nce_keeps_its_estimate():
    query, key, _ = leaves()
    module = ck.NCE(num_data=100)
    source = ck_source((20, 27))
    first = module(query, key, source)
    torch.testing.assert_close(first, ck.nce(query, key, keys(), num_data=100))
    module(query, key, source)
    assert source.passes == 3


def test_compiled_with_graph_breaks():
    query, key, scale = leaves()
    source = ck_source((20, 27))
    loss = torch.compile(LOSSES["info_nce"], backend="eager")
    torch.testing.assert_close(
        evaluate(loss, [query, key, scale], source),
        evaluate(LOSSES["info_nce"], [query, key, scale], keys()),
    )


BAD = [
    (Source(shape=(M, 4)), ValueError, "query and negatives .*features D, got 5 and 4"),
    (Source(shape=(0, D)), ValueError, r"negatives must not be empty, got shape \(0, 5\)"),
    (Source(shape=(M, 2, D)), ValueError, r"negatives in chunks .* \(M, D\), got \(47, 2, 5\)"),
    (Source(dtype=torch.float32), TypeError, "query and negatives must both be float64 or neither"),
    (Source(dtype=torch.int8), TypeError, "negatives must be float32, .* got int8"),
    (Source(shape=(50, D), chunks=[keys()]), ValueError, "have the 50 rows .* got 47"),
    (Source(shape=(40, D), chunks=[keys()]), ValueError, "have the 40 rows .* got at least 47"),
    (Source(chunks=[keys()[:, :4]]), ValueError, r"shape \(m, 5\) .* got \(47, 4\)"),
    (Source(chunks=[keys().float()]), ValueError, "be torch.float64, got .* torch.float32"),
    (Source(chunks=[keys().requires_grad_()]), ValueError, "must not need a gradient: detach it"),
    ([], TypeError, "negatives must be tensors, got an empty list"),
    ([keys(), 3.0], TypeError, "negatives must be tensors, got float"),
    ([keys(), keys()[:, :3]], ValueError, r"shapes \(m_i, D\) and one dtype, got \(47, 5\)"),
    ((chunk for chunk in [keys()]), TypeError, "a list of tensors or a NegativeSource, got gen"),
]


@pytest.mark.parametrize("negatives, error, message", BAD)
def test_bad_sources(negatives, error, message):
    query, key, _ = leaves()
    for loss in (
        lambda: ck.info_nce(query, key, negatives=negatives),
        lambda: ck.cacr(query, key, negatives=negatives),
        lambda: ck.nce(query, key, negatives, num_data=9),
    ):
        with pytest.raises(error, match=message):
            loss()


def test_sharded_negatives_need_a_group():
    query, key, _ = leaves()
    for loss in (ck.info_nce, ck.cacr):
        with pytest.raises(ValueError, match="sharded_negatives needs a group"):
            loss(query, key, negatives=[keys()], sharded_negatives=True)


def test_bad_files(tmp_path):
    path = write(tmp_path / "negatives", keys())
    with pytest.raises(FileNotFoundError):
        ck.FileNegatives(tmp_path / "none", D, DOUBLE)
    for options, error, message in (
        ({}, ValueError, "dim must be a whole number > 0, got None"),
        ({"dim": 0, "dtype": DOUBLE}, ValueError, "dim must be a whole number > 0, got 0"),
        ({"dim": D}, TypeError, "dtype must be float32, .* got None"),
        ({"dim": D, "dtype": torch.int8}, TypeError, "dtype must be float32, .* got torch.int8"),
        ({"dim": 6, "dtype": DOUBLE}, ValueError, "whole rows of 48 bytes .* got .* 1880 bytes"),
        ({"dim": D, "dtype": DOUBLE, "chunk_rows": 0}, ValueError, "chunk_rows .* got 0"),
    ):
        with pytest.raises(error, match=message):
            ck.FileNegatives(path, **options)
    source = ck.FileNegatives(path, D, DOUBLE, chunk_rows=10)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        ValueError, match="negatives is shorter than it was, of 1840 bytes and not 1880"
    ):
        list(source)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="at least one, got .* 0 bytes"):
        ck.FileNegatives(path, D, DOUBLE)


MEMORY = """
import resource, sys
import torch
import contrastive_kernels as ck
torch.set_num_threads(1)
query, key = (torch.randn(32, 128).bfloat16().requires_grad_() for _ in range(2))
warm = ck.info_nce(query, key, negatives=torch.randn(64, 128).bfloat16())
warm.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
negatives = ck.FileNegatives(sys.argv[1], 128, torch.bfloat16)
ck.info_nce(query, key, negatives=negatives).backward()
assert query.grad.isfinite().all() and negatives.shape[0] * 256 == 400 << 20
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or DEVICE != "cpu", reason="the peak of a Linux process"
)
def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "negatives"
    block = write(path, randn(1 << 14, 128).bfloat16()).read_bytes()
    with open(path, "ab") as file:
        for _ in range(99):
            file.write(block)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kilobytes = int(done.stdout)
    assert kilobytes < 100 << 10, f"{kilobytes} kB more for a file of {400 << 10} kB"
