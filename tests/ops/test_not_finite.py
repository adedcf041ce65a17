"""What is not finite in the primitives: NaN of any bits stays NaN, -inf is exactly nothing."""

from __future__ import annotations

import itertools

import oracles
import pytest
import sweeps
import torch
from nans import NANS, put_nan
from oracles import BACKENDS

from contrastive_kernels import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INFINITY = float("inf")
parametrize_backends = pytest.mark.parametrize("backend", BACKENDS)


@parametrize_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_any_bits_stays_nan(backend, dtype):
    """In the first and the last element, and so in vectors and in what is left over."""
    x, y = (oracles.randn(n, 19, seed=n).to(dtype) for n in (67, 5))
    places = list(itertools.product(NANS, (False, True)))
    for which, (bits, last) in enumerate(oracles.sample(backend, places, 0, every=3)):
        row = 66 * last
        nan = x.clone()
        put_nan(nan, nan.numel() - 1 if last else 0, bits)
        others = torch.arange(67) != row
        normalize = which % 3 > 0
        for scale in (1.0, 1e4):  # with a fixed shift and without
            options = {"scale": scale, "normalize": normalize, "backend": backend}
            out = sweeps.sweep(nan, y, mean=True, columns=True, **options)
            assert out.lse[row].isnan() and out.mean[row].isnan() and out.col_lse.isnan().all()
            assert out.lse[others].isfinite().all() and out.mean[others].isfinite().all()
            value = sweeps.softplus_sweep(nan, y, **options).value
            assert value[row].isnan() and value[others].isfinite().all()
            assert sweeps.sweep(y, nan, **options).lse.isnan().all()
        dots = ops.row_dot(nan, x, normalize=normalize, backend=backend)
        assert dots[row].isnan() and dots[others].isfinite().all()


@parametrize_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bias_that_is_nan(backend, dtype):
    x, y, bias = (oracles.randn(*shape, seed=3).to(dtype) for shape in ((5, 8), (70, 8), (70,)))
    for at, bits in zip((0, 69) * 4, NANS, strict=True):
        nan = bias.clone()
        put_nan(nan, at, bits)
        assert sweeps.sweep(x, y, bias=nan, backend=backend).lse.isnan().all()
        assert sweeps.softplus_sweep(x, y, bias=nan, backend=backend).value.isnan().all()


@parametrize_backends
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_nan_in_a_dropped_pair_does_not_count(backend, scale):
    x, y = oracles.randn(7, 8), oracles.randn(70, 8, seed=1)
    ids = torch.arange(7), torch.arange(70)
    ids[1][66:] = 3
    nan = y.clone()
    nan[67] = torch.nan
    of_nan = oracles.randn(70, seed=2)
    bias = of_nan.clone()
    of_nan[67], of_nan[68] = torch.nan, INFINITY
    options = {"scale": scale, "normalize": True, "exclude": ids, "mean": True, "backend": backend}
    expected = sweeps.sweep(x, y, bias=bias, **options)
    for keys, key_bias in ((nan, bias), (y, of_nan)):
        out = sweeps.sweep(x, keys, bias=key_bias, **options)
        for name in ("lse", "mean"):
            got, wanted = getattr(out, name), getattr(expected, name)
            torch.testing.assert_close(got[3], wanted[3], rtol=1e-12, atol=0)
            assert got[:3].isnan().all() and got[4:].isnan().all()


@parametrize_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_of_minus_infinity_takes_a_key_away(backend, dtype):
    """Exactly: exp and softplus of -inf are 0, and so is their slope."""
    x, y = (oracles.randn(n, 19, seed=n).to(dtype).requires_grad_() for n in (9, 70))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.full((70,), -INFINITY, dtype=statistics)
    value = sweeps.softplus_sweep(x, y, bias=bias, backend=backend).value
    lse = sweeps.sweep(x, y, bias=bias, backend=backend).lse
    assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(lse, torch.full_like(lse, -INFINITY))
    for total in (value.sum(), lse.sum()):
        for g in torch.autograd.grad(total, (x, y), retain_graph=True):
            assert torch.equal(g, torch.zeros_like(g))
    bias[5] = 0.0
    lse = sweeps.sweep(x, y, bias=bias, backend=backend).lse
    dots = ops.row_dot(x, y[5].expand_as(x), backend=backend)
    torch.testing.assert_close(lse, dots, rtol=1e-6, atol=1e-5)


@parametrize_backends
def test_softplus_of_infinity(backend):
    x, y = oracles.randn(5, 8).float(), oracles.randn(70, 8).float()
    bias = torch.zeros(70)
    bias[69] = INFINITY
    value = sweeps.softplus_sweep(x, y, bias=bias, backend=backend).value
    assert torch.equal(value, torch.full_like(value, INFINITY))


@parametrize_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_mean_leaves_out_what_a_bias_does(backend, dtype):
    x, y = oracles.randn(7, 8).to(dtype), oracles.randn(70, 8, seed=1).to(dtype)
    kept = torch.arange(70) % 3 > 0
    bias = torch.where(kept, oracles.randn(70, seed=2), -INFINITY).to(dtype)

    def run(y, bias):
        leaves = [t.detach().requires_grad_() for t in (x, y)]
        out = sweeps.sweep(*leaves, bias=bias, mean=True, backend=backend)
        value = (out.lse + 2 * out.mean).sum()
        return out.mean.detach(), *torch.autograd.grad(value, leaves)

    mean, dx, dy = run(y, bias)
    expected, dx_kept, dy_kept = run(y[kept], bias[kept])
    near = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    )
    for a, b in ((mean, expected), (dx, dx_kept), (dy[kept], dy_kept)):
        torch.testing.assert_close(a, b, **near)
    assert not dy[~kept].any()
