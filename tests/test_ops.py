"""The primitives against the dense reference in float64, and the rules of registered operators."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import oracles
import pytest
import torch
from torch.library import opcheck

from contrastive_kernels import ops, reference, registration

FUSED = [name for name in oracles.BACKENDS if name != "reference"]
pytestmark = pytest.mark.skipif(not FUSED, reason="no fused backend is built here")

INFINITY = float("inf")
# one row, fewer rows than lanes, a tile exactly, one more and one less, primes, several tiles
SIZES = [(1, 1, 1), (3, 5, 7), (64, 128, 16), (65, 129, 33), (257, 300, 64), (2, 1009, 8)]
KINDS = ["shared", "self", "paired"]


def make_case(kind: str, sizes: tuple[int, int, int], seed: int = 0):
    """x, y (None for self), and ids of a few values, so that pairs are dropped everywhere."""
    rows, keys, d = sizes
    x = oracles.randn(rows, d, seed=seed)
    if kind == "self":
        ids = torch.randint(0, 4, (rows,), generator=oracles.generator(seed + 1))
        return x, None, (ids, ids)
    y = oracles.randn(*((rows, keys, d) if kind == "paired" else (keys, d)), seed=seed + 2)
    make_ids = (torch.randint(0, 4, (n,), generator=oracles.generator(n)) for n in (rows, keys))
    return x, y, tuple(make_ids)


def run(function, x, y, scale, bias, dtype, **options):
    """Statistics, and gradients of every input for random upstream gradients."""
    inputs = [t.to(dtype).requires_grad_() for t in (x, y) if t is not None]
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    bias = None if bias is None else bias.clone().requires_grad_()
    out = function(
        inputs[0], inputs[1] if y is not None else None, scale=scale, bias=bias, **options
    )
    fields = {k: v for k, v in out._asdict().items() if v is not None}
    loss = 0.0
    for k, value in enumerate(fields.values()):
        if value.requires_grad:
            weight = oracles.randn(*value.shape, seed=k + 50)
            loss = loss + (value.masked_fill(value == -INFINITY, 0.0).double() * weight).sum()
    leaves = [*inputs, scale] + ([] if bias is None else [bias])
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(grads, leaves, strict=True)
    grads = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in pairs]
    return {k: v.detach() for k, v in fields.items()}, grads


def assert_close(actual, expected, tolerance: float, what: str) -> None:
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape, what
    assert torch.equal(actual == -INFINITY, expected == -INFINITY), f"{what}: other empty rows"
    actual, expected = (t.masked_fill(t == -INFINITY, 0.0) for t in (actual, expected))
    error = (actual - expected).abs().max().item()
    size = max(1.0, expected.abs().max().item())
    assert error <= tolerance * size, f"{what}: error {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sweep_equals_the_reference_in_float64(backend, kind, sizes):
    if kind == "paired" and sizes[1] > 300:
        sizes = (sizes[0], 131, sizes[2])
    x, y, ids = make_case(kind, sizes)
    keys = sizes[0] if y is None else sizes[1]
    threshold = oracles.randn(sizes[0], seed=9)
    other_ids = (ids[0] % 3, ids[0] % 3 if y is None else ids[1] % 3)
    flags = itertools.product((False, True), repeat=3)
    masks = ({}, {"exclude": ids}, {"keep": other_ids}, {"exclude": ids, "keep": other_ids})
    combinations = list(itertools.product(flags, masks))
    for (mean, columns, normalize), mask in oracles.sample(backend, combinations, sum(sizes)):
        columns = columns and kind != "paired"
        bias = oracles.randn(keys, seed=7) if mean and kind != "self" else None
        options = dict(
            mean=mean, columns=columns, normalize=normalize, **mask,
            threshold=threshold if normalize else None,
        )  # fmt: skip
        got, got_grads = run(ops.sweep, x, y, 1.7, bias, torch.float64, backend=backend, **options)
        wanted, grads = run(reference.sweep, x, y, 1.7, bias, torch.float64, **options)
        assert got.keys() == wanted.keys()
        for name in wanted:
            assert_close(got[name], wanted[name], 1e-12, f"{name} with {options}")
        for k, (a, b) in enumerate(zip(got_grads, grads, strict=True)):
            assert_close(a, b, 1e-10, f"gradient {k} with {options}")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", ["shared", "paired"])
def test_softplus_sweep_equals_the_reference_in_float64(backend, kind):
    x, y, ids = make_case(kind, (65, 129, 33))
    for normalize, mask in itertools.product((False, True), ({}, {"exclude": ids}, {"keep": ids})):
        for bias in (torch.tensor(-2.0).double(), oracles.randn(129, seed=7) * 10):
            options = dict(normalize=normalize, threshold=oracles.randn(65, seed=3), **mask)
            actual = run(
                ops.softplus_sweep, x, y, 3.0, bias, torch.float64, backend=backend, **options
            )
            expected = run(reference.softplus_sweep, x, y, 3.0, bias, torch.float64, **options)
            for name in expected[0]:
                assert_close(actual[0][name], expected[0][name], 1e-12, name)
            for a, b in zip(actual[1], expected[1], strict=True):
                assert_close(a, b, 1e-11, "gradient")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("normalize", [False, True])
def test_row_dot_equals_the_reference_in_float64(backend, normalize):
    for rows, keys, d in ((1, 1, 1), (65, 3, 33), (300, 1, 128)):
        x, y = oracles.randn(rows, d), oracles.randn(rows, keys, d, seed=1)
        oracles.assert_equal_in_double(
            lambda a, b: ops.row_dot(a, b, normalize=normalize, backend=backend),
            lambda a, b: reference.row_dot(a, b, normalize=normalize),
            [x, y],
        )


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
def test_error_stays_within_that_of_dense_torch(backend, dtype, kind, temperature):
    x, y, ids = make_case(kind, (131, 67, 48) if kind == "paired" else (131, 257, 48))
    rounded = [x.to(dtype)] + ([] if y is None else [y.to(dtype)])

    def statistic(sweep, name, **options):
        def function(*inputs):
            return getattr(
                sweep(
                    inputs[0], inputs[1] if len(inputs) > 1 else None, scale=1 / temperature,
                    exclude=ids, normalize=True, mean=True, **options,
                ),
                name,
            )  # fmt: skip

        return function

    for name in ("lse", "mean"):
        oracles.assert_within_budget(
            statistic(ops.sweep, name, backend=backend),
            statistic(reference.sweep, name),
            rounded,
        )


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("scale", [1.0, 100.0, 3000.0])
def test_logits_far_below_their_bound(backend, scale):
    # all keys opposite to all queries: exponentials relative to the bound underflow
    x = torch.zeros(70, 4)
    x[:, 0] = 1
    x = (x + 0.01 * oracles.randn(70, 4).float()).requires_grad_()
    y = (-x.detach()).requires_grad_()
    for keys, columns in ((y, True), (y, False), (None, False)):
        out = ops.sweep(
            x, keys, scale=-scale if keys is None else scale, normalize=True, mean=True,
            columns=columns, backend=backend,
        )  # fmt: skip
        exact = reference.sweep(
            x.double(), None if keys is None else keys.double(),
            scale=-scale if keys is None else scale, normalize=True, mean=True, columns=columns,
        )  # fmt: skip
        for name in ("lse", "mean", "col_lse", "col_mean"):
            if getattr(exact, name) is not None:
                assert_close(getattr(out, name), getattr(exact, name), 1e-5, name)
        grad = torch.autograd.grad(out.lse.sum(), x)[0]
        exact_grad = torch.autograd.grad(exact.lse.sum(), x)[0]
        # softmax weights carry the rounding of the logits, which grows with them
        assert_close(grad, exact_grad, 1e-5 + 1e-6 * scale, "gradient")


@pytest.mark.parametrize("backend", FUSED)
def test_rows_without_a_pair(backend):
    x, y = oracles.randn(5, 3).requires_grad_(), oracles.randn(4, 3, seed=1).requires_grad_()
    keep = (torch.tensor([0, 1, 2, 9, 9]), torch.tensor([0, 1, 2, 3]))
    out = ops.row_stats(x, y, keep=keep, columns=True, backend=backend)
    assert torch.equal(out.lse == -INFINITY, torch.tensor([False] * 3 + [True] * 2))
    assert torch.equal(out.col_lse == -INFINITY, torch.tensor([False] * 3 + [True]))
    assert (out.mean[3:] == 0).all() and out.col_mean[3] == 0
    # even an infinite gradient from above must not become NaN
    upstream = torch.where(out.lse == -INFINITY, INFINITY, 1.0)
    for g in torch.autograd.grad((out.lse, out.mean), (x, y), (upstream, upstream)):
        assert torch.isfinite(g).all()
    gx = torch.autograd.grad(ops.row_stats(x, y, keep=keep, backend=backend).lse[:3].sum(), x)[0]
    assert (gx[3:] == 0).all() and (gx[:3] != 0).all()


@pytest.mark.parametrize("backend", FUSED)
def test_nan_is_never_hidden(backend):
    x, y = oracles.randn(70, 8).float(), oracles.randn(90, 8, seed=1).float()
    y[17, 3] = float("nan")
    for normalize in (False, True):
        assert ops.sweep(x, y, normalize=normalize, backend=backend).lse.isnan().all()
        assert ops.row_softplus(x, y, normalize=normalize, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_strided_features(backend, kind):
    x, y, _ = make_case(kind, (37, 45, 12))

    def strided(t):
        return torch.stack([t, -t], -1)[..., 0]

    def transposed(t):
        return t.mT.contiguous().mT

    for layout in (strided, transposed):
        views = [None if t is None else layout(t) for t in (x, y)]
        assert not views[0].is_contiguous()
        for dtype in (torch.float64, torch.bfloat16):
            inputs = [None if t is None else layout(t.to(dtype)) for t in (x, y)]
            got = run(ops.sweep, *inputs, 2.0, None, dtype, backend=backend, normalize=True)
            plain = [None if t is None else t.to(dtype) for t in (x, y)]
            wanted = run(ops.sweep, *plain, 2.0, None, dtype, backend=backend, normalize=True)
            assert_close(got[0]["lse"], wanted[0]["lse"], 1e-6, "lse")
            for a, b in zip(got[1], wanted[1], strict=True):
                assert_close(a, b, 1e-2 if dtype == torch.bfloat16 else 1e-12, "gradient")
    expanded = x[:1].expand(37, 12)
    got = ops.sweep(expanded, y, backend=backend).lse
    assert_close(got, ops.sweep(expanded.contiguous(), y, backend=backend).lse, 1e-12, "expanded")


@pytest.mark.parametrize("backend", FUSED)
def test_frozen_keys_give_the_same_gradient_as_live_ones(backend):
    x, y, ids = make_case("shared", (150, 700, 20))
    # few rows: the keys are cut among the threads; a large scale: the shift follows the logits
    for rows, scale, normalize in ((150, 5.0, True), (3, 5.0, True), (3, 400.0, False)):
        options = dict(exclude=(ids[0][:rows], ids[1]), normalize=normalize)
        grads = []
        for live in (True, False):
            query = x[:rows].clone().requires_grad_()
            learned = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
            keys = y.clone().requires_grad_(live)
            lse = ops.sweep(query, keys, scale=learned, backend=backend, **options).lse
            if not live:
                keys.zero_()  # a queue may move on before the backward pass
            loss = (lse * oracles.randn(rows, seed=4)).sum()
            grads.append(torch.autograd.grad(loss, (query, learned)))
        for live, frozen in zip(*grads, strict=True):
            assert_close(frozen, live, 1e-11, f"{rows} rows, scale {scale}")


@pytest.mark.parametrize("backend", FUSED)
def test_ids_too_large_for_a_lane(backend):
    x, y, ids = make_case("shared", (40, 50, 6))
    small = ops.sweep(x.float(), y.float(), exclude=ids, backend=backend).lse
    large = tuple((i - 2) * 2**40 for i in ids)
    assert torch.equal(ops.sweep(x.float(), y.float(), exclude=large, backend=backend).lse, small)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_equal_bits(backend, kind):
    x, y, ids = make_case(kind, (301, 517, 40))
    options = dict(exclude=ids, normalize=True, mean=True, columns=kind == "shared")
    runs = [
        run(ops.sweep, x, y, 10.0, None, torch.float32, backend=backend, **options)
        for _ in range(2)
    ]
    for name, value in runs[0][0].items():
        assert torch.equal(value, runs[1][0][name]), name
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads(backend, threads):
    cases = {kind: make_case(kind, (389, 517, 12)) for kind in ("shared", "self")}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for kind, (x, y, ids) in cases.items():
            options = dict(exclude=ids, mean=True, columns=kind == "shared", normalize=True)
            got = run(ops.sweep, x, y, 4.0, None, torch.float64, backend=backend, **options)
            wanted = run(reference.sweep, x, y, 4.0, None, torch.float64, **options)
            for name in wanted[0]:
                assert_close(got[0][name], wanted[0][name], 1e-12, name)
            for a, b in zip(got[1], wanted[1], strict=True):
                assert_close(a, b, 1e-11, "gradient")
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("cpu" not in FUSED, reason="the cpu backend is not built here")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_processors_without_avx512(capability):
    # a fresh process: the instruction set is chosen once
    code = (
        "import torch; from contrastive_kernels import ops, reference, _cpu\n"
        "torch.manual_seed(0)\n"
        "x, y = (torch.randn(n, 40, requires_grad=True) for n in (70, 90))\n"
        "for f in (ops.sweep, ops.softplus_sweep):\n"
        "    options = dict(scale=3.0, normalize=True)\n"
        "    a = f(x, y, backend='cpu', **options)[0]\n"
        "    b = getattr(reference, f.__name__)(x.double(), y.double(), **options)[0]\n"
        "    assert ((a - b) / b).abs().max() < 1e-6, f\n"
        "    for g, h in zip(torch.autograd.grad(a.sum(), (x, y)),\n"
        "                    torch.autograd.grad(b.sum(), (x, y))):\n"
        "        assert (g - h).abs().max() < 1e-5, f\n"
        "print(_cpu.capability())\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == {"default": "baseline", "avx2": "avx2"}[capability]


def operator_arguments(kind: str):
    x, y, ids = make_case(kind, (6, 7, 5))
    x.requires_grad_()
    if y is not None:
        y.requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    bias = None if kind == "self" else oracles.randn(7, seed=3).requires_grad_()
    col_ids = None if kind == "self" else ids[1]
    return x, y, scale, bias, ids[0], col_ids, None, None


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(backend, kind):
    pairs = operator_arguments(kind)
    threshold = oracles.randn(6, seed=5)
    opcheck(
        registration.row_stats(backend),
        (*pairs, threshold, True, True, kind == "shared", False),
    )
    opcheck(registration.row_stats(backend), (*pairs, None, False, False, False, False))
    if kind != "self":
        opcheck(registration.row_softplus(backend), (*pairs, threshold, True, [False] * 4))
    if kind == "shared" and registration.can_sum(backend):
        opcheck(registration.row_softplus(backend), (*pairs, None, True, [True] * 4))
    if kind == "paired":
        opcheck(registration.row_dot(backend), (pairs[0], pairs[1], True))


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck_with_frozen_keys(backend):
    x, y, scale, _, *ids = operator_arguments("shared")
    arguments = (x, y.detach(), scale, None, *ids, None, False, True, False, True)
    opcheck(registration.row_stats(backend), arguments)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, kind):
    x, y, scale, bias, *_ = operator_arguments(kind)
    ids = make_case(kind, (6, 7, 5))[2]

    def statistics(x, y, scale, bias):
        out = ops.sweep(
            x, y, scale=scale, bias=bias, exclude=ids, normalize=True, mean=True,
            columns=kind == "shared", backend=backend,
        )  # fmt: skip
        return tuple(t.masked_fill(t == -INFINITY, 0.0) for t in out if t is not None)

    assert torch.autograd.gradcheck(statistics, (x, y, scale, bias))
    if kind != "self":
        assert torch.autograd.gradcheck(
            lambda x, y, scale, bias: ops.row_softplus(
                x, y, scale=scale, bias=bias, exclude=ids, normalize=True, backend=backend
            ),
            (x, y, scale, bias),
        )


@pytest.mark.parametrize("backend", FUSED)
def test_second_order_gradients_are_refused(backend):
    x, y = oracles.randn(4, 3).requires_grad_(), oracles.randn(5, 3).requires_grad_()
    (grad,) = torch.autograd.grad(
        ops.row_stats(x, y, backend=backend).lse.sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match='second-order gradients .* backend="reference" only'):
        grad.sum().backward()


@pytest.mark.parametrize("backend", oracles.BACKENDS)
def test_inputs_are_left_alone_and_gradients_keep_their_dtype(backend):
    x = oracles.randn(70, 9).bfloat16().requires_grad_()
    y = oracles.randn(80, 9, seed=1).float().requires_grad_()
    copies = x.detach().clone(), y.detach().clone()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        lse = ops.sweep(x, y, scale=5.0, normalize=True, backend=backend).lse
    # the cpu backend keeps the dtypes of operands: its arithmetic is float32 anyhow
    seen = y.bfloat16() if backend == "triton" else y
    exact = ops.sweep(x.double(), seen.double(), scale=5.0, normalize=True, backend="reference").lse
    assert lse.dtype == torch.float32
    assert_close(lse, exact, 1e-6, "lse under autocast")
    gx, gy = torch.autograd.grad(lse.sum(), (x, y))
    assert gx.dtype == torch.bfloat16 and gy.dtype == torch.float32
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])


def test_row_stats_unpacks_as_documented():
    x, y = oracles.randn(4, 3), oracles.randn(5, 3, seed=1)
    lse, mean = ops.row_stats(x, y)
    assert lse.shape == mean.shape == (4,)
    lse, mean, col_lse, col_mean = ops.row_stats(x, y, columns=True)
    assert col_lse.shape == col_mean.shape == (5,)
    same = ops.row_stats(x, x, exclude=(torch.arange(4), torch.arange(4))).lse
    ids = torch.arange(4)
    assert_close(same, ops.row_stats(x, x.clone(), exclude=(ids, ids)).lse, 1e-12, "self")


BAD = {
    "x of one dim": (dict(x=torch.ones(3)), ValueError, r"x must have shape \(N, D\), got \(3,\)"),
    "integers": (dict(x=torch.ones(3, 2).long()), TypeError, "x must be float32.*got int64"),
    "not a tensor": (dict(x=[[1.0]]), TypeError, "x must be a tensor, got list"),
    "empty x": (dict(x=torch.ones(0, 2)), ValueError, r"x must not be empty, got shape \(0, 2\)"),
    "empty y": (dict(y=torch.ones(0, 2)), ValueError, r"y must not be empty, got shape \(0, 2\)"),
    "other D": (dict(y=torch.ones(5, 3)), ValueError, "same number of features D, got 2 and 3"),
    "mixed double": (dict(y=torch.ones(5, 2).double()), TypeError, "both be float64 or neither"),
    "other device": (dict(y=torch.ones(5, 2, device="meta")), ValueError, "on one device"),
    "paired rows": (dict(y=torch.ones(5, 2, 2)), ValueError, "one set of keys for each of the 3"),
    "scale": (dict(scale=float("nan")), ValueError, "scale must be a finite number, got nan"),
    "scale shape": (dict(scale=torch.ones(2)), ValueError, r"tensor of one element, got .*\(2,\)"),
    "bias": (dict(bias=torch.ones(3)), ValueError, r"bias must have shape \(5,\), got \(3,\)"),
    "ids alone": (dict(exclude=torch.arange(3)), TypeError, "exclude must be a pair"),
    "float ids": (
        dict(keep=(torch.ones(3), torch.arange(5))), TypeError, "keep: row_ids must be an integer"
    ),
    "short ids": (
        dict(exclude=(torch.arange(3), torch.arange(4))), ValueError,
        r"exclude: col_ids must have shape \(5,\), got \(4,\)",
    ),
    "backend": (dict(backend="fast"), ValueError, "backend must be .* got 'fast'"),
    "cuda": (dict(backend="cuda"), RuntimeError, 'backend="cuda" cannot run on .* tensors'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changed, error, message = BAD[name]
    arguments = dict(x=torch.ones(3, 2), y=torch.ones(5, 2), scale=1.0) | changed
    x, y = arguments.pop("x"), arguments.pop("y")
    with pytest.raises(error, match=message):
        ops.row_stats(x, y, **arguments)
