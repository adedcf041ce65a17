"""The primitives against the dense reference in float64, and within its error in shorter types."""

from __future__ import annotations

import itertools

import oracles
import pytest
import sweeps
import torch
from sweep_cases import FUSED, INFINITY, KINDS, assert_close, make_case, needs_fused, run

from contrastive_kernels import ops, reference

pytestmark = needs_fused

# one row, fewer rows than lanes, a tile exactly, one more and one less, primes, several tiles
SIZES = [(1, 1, 1), (3, 5, 7), (64, 128, 16), (65, 129, 33), (193, 260, 40), (2, 1009, 8)]

# (temperature, dtype) of kernels that are interpreted: each once, and the largest logits twice
SLOWLY = [
    (0.01, torch.float32),
    (0.07, torch.bfloat16),
    (1.0, torch.float16),
    (0.01, torch.float16),
]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sweep_equals_the_reference_in_float64(backend, kind, sizes):
    if kind == "paired" and sizes[1] > 300:
        sizes = (sizes[0], 131, sizes[2])
    seed = sum(sizes)
    if oracles.interpreted(backend):  # still tiles, and a part of one
        most = (67, 131) if kind == "paired" else (131, 261)
        sizes = (min(sizes[0], most[0]), min(sizes[1], most[1]), sizes[2])
    x, y, ids = make_case(kind, sizes)
    keys = sizes[0] if y is None else sizes[1]
    threshold = oracles.randn(sizes[0], seed=9)
    other_ids = (ids[0] % 3, ids[0] % 3 if y is None else ids[1] % 3)
    masks = {
        "none": {}, "exclude": {"exclude": ids}, "keep": {"keep": other_ids},
        "both": {"exclude": ids, "keep": other_ids},
    }  # fmt: skip
    flags = itertools.product((False, True), (False, True), (False, True), masks)
    # own keys have no columns: combinations that only ask for these are one
    chosen = dict.fromkeys(
        (mean, columns and kind != "paired", normalize, mask)
        for mean, columns, normalize, mask in oracles.sample(backend, list(flags), seed)
    )
    for mean, columns, normalize, mask in chosen:
        bias = oracles.randn(keys, seed=7) if mean and kind != "self" else None
        options = dict(
            mean=mean, columns=columns, normalize=normalize, **masks[mask],
            threshold=threshold if normalize else None,
        )  # fmt: skip
        inputs = (x, y, 1.7, bias, torch.float64)
        got, got_grads = run(sweeps.sweep, *inputs, backend=backend, **options)
        wanted, grads = run(reference.sweep, *inputs, **options)
        assert got.keys() == wanted.keys()
        for name in wanted:
            assert_close(got[name], wanted[name], 1e-12, f"{name} with {options}")
        for k, (a, b) in enumerate(zip(got_grads, grads, strict=True)):
            assert_close(a, b, 1e-10, f"gradient {k} with {options}")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", ["shared", "paired"])
def test_softplus_sweep_equals_the_reference_in_float64(backend, kind):
    sizes = (17, 129, 33) if kind == "paired" else (65, 129, 33)
    x, y, ids = make_case(kind, sizes)
    for normalize, mask in itertools.product((False, True), ({}, {"exclude": ids}, {"keep": ids})):
        for bias in (torch.tensor(-2.0).double(), oracles.randn(129, seed=7) * 10):
            options = dict(normalize=normalize, threshold=oracles.randn(len(x), seed=3), **mask)
            actual = run(
                sweeps.softplus_sweep, x, y, 3.0, bias, torch.float64, backend=backend, **options
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
    if oracles.interpreted(backend) and (temperature, dtype) not in SLOWLY:
        return
    x, y, ids = make_case(kind, (67, 35, 48) if kind == "paired" else (67, 131, 48))
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
            statistic(sweeps.sweep, name, backend=backend),
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
        out = sweeps.sweep(
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
        assert sweeps.sweep(x, y, normalize=normalize, backend=backend).lse.isnan().all()
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
            got = run(sweeps.sweep, *inputs, 2.0, None, dtype, backend=backend, normalize=True)
            plain = [None if t is None else t.to(dtype) for t in (x, y)]
            wanted = run(sweeps.sweep, *plain, 2.0, None, dtype, backend=backend, normalize=True)
            assert_close(got[0]["lse"], wanted[0]["lse"], 1e-6, "lse")
            for a, b in zip(got[1], wanted[1], strict=True):
                assert_close(a, b, 1e-2 if dtype == torch.bfloat16 else 1e-12, "gradient")
    expanded = x[:1].expand(37, 12)
    got = sweeps.sweep(expanded, y, backend=backend).lse
    wanted = sweeps.sweep(expanded.contiguous(), y, backend=backend).lse
    assert_close(got, wanted, 1e-12, "expanded")


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
            lse = sweeps.sweep(query, keys, scale=learned, backend=backend, **options).lse
            if not live:
                keys.zero_()  # a queue may move on before the backward pass
            loss = (lse * oracles.randn(rows, seed=4)).sum()
            grads.append(torch.autograd.grad(loss, (query, learned)))
        for live, frozen in zip(*grads, strict=True):
            assert_close(frozen, live, 1e-11, f"{rows} rows, scale {scale}")


@pytest.mark.parametrize("backend", FUSED)
def test_ids_too_large_for_a_lane(backend):
    x, y, ids = make_case("shared", (40, 50, 6))
    small = sweeps.sweep(x.float(), y.float(), exclude=ids, backend=backend).lse
    large = tuple((i - 2) * 2**40 for i in ids)
    got = sweeps.sweep(x.float(), y.float(), exclude=large, backend=backend).lse
    assert torch.equal(got, small)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_equal_bits(backend, kind):
    few = kind == "paired" and oracles.interpreted(backend)
    x, y, ids = make_case(kind, (67, 131, 40) if few else (301, 517, 40))
    options = dict(exclude=ids, normalize=True, mean=True, columns=kind == "shared")
    runs = [
        run(sweeps.sweep, x, y, 10.0, None, torch.float32, backend=backend, **options)
        for _ in range(2)
    ]
    for name, value in runs[0][0].items():
        assert torch.equal(value, runs[1][0][name]), name
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.skipif("cpu" not in FUSED, reason="needs the C++ engine")
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads(threads):
    cases = {kind: make_case(kind, (389, 517, 12)) for kind in ("shared", "self")}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for kind, (x, y, ids) in cases.items():
            options = dict(exclude=ids, mean=True, columns=kind == "shared", normalize=True)
            got = run(sweeps.sweep, x, y, 4.0, None, torch.float64, backend="cpu", **options)
            wanted = run(reference.sweep, x, y, 4.0, None, torch.float64, **options)
            for name in wanted[0]:
                assert_close(got[0][name], wanted[0][name], 1e-12, name)
            for a, b in zip(got[1], wanted[1], strict=True):
                assert_close(a, b, 1e-11, "gradient")
    finally:
        torch.set_num_threads(before)
