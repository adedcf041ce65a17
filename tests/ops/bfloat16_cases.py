"""Losses and sweeps of bfloat16 features whose products are those of bfloat16. test_bfloat16.py
runs this file in a process that takes them."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import pytest
import sweeps
import torch
import torch.nn.functional as F
from oracles import randn, rms, value_and_gradients
from torch import Tensor

import contrastive_kernels as ck
from benchmarks.baselines import dense
from contrastive_kernels import _cpu
from contrastive_kernels.types import known

HALF = torch.bfloat16
N, D = 257, 66
NEGATIVES = F.normalize(randn(300, D, seed=7), dim=1).to(HALF)
LABELS = torch.arange(N) % 50


def test_products_are_those_of_bfloat16():
    assert _cpu.bfloat16() is not None


def queue(losses: ModuleType, query: Tensor, key: Tensor, temperature: float) -> Tensor:
    negatives = NEGATIVES.to(query.dtype)
    return losses.info_nce(query, key, negatives=negatives, temperature=temperature)


def siglip(losses: ModuleType, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return losses.siglip_loss(x, y, scale, bias)


def prefixes(
    name: str, losses: ModuleType, x: Tensor, y: Tensor, *given: Tensor, least: int = 7, **options
) -> Tensor:
    """The sum of a loss of three prefixes, of which some end within a pair of features."""
    loss, size = getattr(losses, name), x.shape[1]
    dims = (size, size // 2, least)
    if losses is ck:
        return loss(x, y, *given, dims=dims, **options)
    parts = [loss(x[:, :end], y[:, :end], *given, **options) for end in dims]
    return torch.stack(parts).sum(0)


def calls(temperature: float) -> dict:
    """name: a loss of `contrastive_kernels` or of `dense`, and its tensors"""
    x = randn(N, D, seed=1, dtype=HALF)
    y = (0.5 * x + randn(N, D, seed=2)).to(HALF)
    scale, bias = torch.tensor(1 / temperature), torch.tensor(-5.0)
    given = {
        "info_nce": (lambda m, q, k: m.info_nce(q, k, temperature=temperature), (x, y)),
        "queue": (partial(queue, temperature=temperature), (x, y)),
        "clip_loss": (lambda m, *t: m.clip_loss(*t), (x, y, scale)),
        "siglip_loss": (siglip, (x, y, scale, bias)),
        "nt_xent": (lambda m, *t: m.nt_xent(*t, temperature=temperature), (x, y)),
        "dcl": (lambda m, *t: m.dcl(*t, temperature=temperature), (x, y)),
        "sup_con": (lambda m, t: m.sup_con(t, LABELS, temperature=temperature), (x,)),
        "clip_loss nested": (partial(prefixes, "clip_loss"), (x, y, scale)),
        "siglip_loss nested": (partial(prefixes, "siglip_loss"), (x, y, scale, bias)),
        "nt_xent nested": (partial(prefixes, "nt_xent", temperature=temperature), (x, y)),
        "of one feature": (partial(prefixes, "clip_loss", least=1), (x, y, scale)),
    }
    if temperature == 1:
        positives = torch.stack([y, randn(N, D, seed=3, dtype=HALF)], 1)
        given["cacr"] = (lambda m, *t: m.cacr(*t), (x, positives))
    return given


CALLS = [(name, t) for t in (1.0, 0.1, 0.01) for name in calls(t)]


@pytest.mark.parametrize(("name", "temperature"), CALLS)
def test_error_is_below_that_of_dense_torch(name, temperature):
    """Of torch in bfloat16 throughout; and that of features is but a few roundings."""
    loss, given = calls(temperature)[name]
    got = value_and_gradients(partial(loss, ck), list(given))
    eager = value_and_gradients(partial(loss, dense), list(given))
    exact = value_and_gradients(partial(loss, dense), [t.double() for t in given])
    for which, (a, b, right) in enumerate(zip(got, eager, exact, strict=True)):
        error, budget = rms(a.double() - right), rms(b.double() - right)
        assert error <= budget, f"output {which}: error {error:.2e}, of torch {budget:.2e}"
        if a.dtype == HALF:
            assert error <= 2**-8 * rms(right), f"output {which}: error {error / rms(right):.2e}"


SIZES = [(1, 1, 2), (1, 300, 64), (300, 1, 64), (63, 65, 130), (129, 257, 62)]
SWEEPS = ["rows", "columns", "mean", "softplus", "masked", "frozen", "same"]


def run_sweep(kind: str, x: Tensor, y: Tensor, backend: str, scale: float | Tensor = 3.0) -> Tensor:
    options = {"scale": scale, "normalize": True, "backend": backend}
    if kind == "softplus":
        return sweeps.softplus_sweep(x, y, bias=-1.0, **options).value
    if kind == "same":
        ids = torch.arange(len(x))
        lse = sweeps.sweep(x, None, exclude=(ids, ids), **options).lse
        return lse[lse > -torch.inf]
    if kind == "masked":
        options["exclude"] = torch.arange(len(x)) % 3, torch.arange(len(y)) % 4
    both = kind == "columns"
    out = sweeps.sweep(x, y, columns=both, mean=kind == "mean", **options)
    values = [out.lse, out.col_lse if both else None, out.mean if kind == "mean" else None]
    joined = torch.cat([v for v in values if v is not None])
    return joined[joined > -torch.inf]


def run_aligned(x: Tensor, y: Tensor, backend: str, scale: float | Tensor) -> Tensor:
    """Losses that take their positives from the sweep; the second is of x with itself."""
    y, options = y[: len(x)], {"scale": scale, "backend": backend, "reduction": "none"}
    return torch.cat([ck.info_nce(x, y, **options), ck.nt_xent(x, y, **options).flatten()])


@pytest.mark.parametrize("kind", SWEEPS)
@pytest.mark.parametrize(("rows", "keys", "d"), [*SIZES, (65, 67, 33)])
def test_sizes(kind, rows, keys, d):
    """An odd D is widened."""
    x, y = randn(rows, d, seed=4, dtype=HALF), randn(keys, d, seed=5, dtype=HALF)
    x.requires_grad_()
    y.requires_grad_(kind not in ("frozen", "same"))
    got = value_and_gradients(partial(run_sweep, kind, backend="cpu"), [x, y])
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, y)]
    exact = value_and_gradients(partial(run_sweep, kind, backend="reference"), wide)
    for a, right in zip(got, exact, strict=True):
        largest = right.abs().max() if right.numel() else 0
        assert torch.isfinite(a).all()
        assert ((a.double() - right).abs() <= 2**-6 * largest + 1e-6).all()


@pytest.mark.parametrize("kind", [*SWEEPS, "aligned"])
def test_gradient_of_scale_is_not_rounded(kind):
    """Products of features take rounded coefficients; it takes those of before."""
    x, y = randn(131, 64, seed=1, dtype=HALF), randn(133, 64, seed=2, dtype=HALF)
    scale = torch.tensor(3.0, requires_grad=True)
    sides = x.requires_grad_(), y.requires_grad_(kind != "frozen")
    run = {"aligned": run_aligned}.get(kind, partial(run_sweep, kind))
    value = run(*sides, backend="cpu", scale=scale)
    upstream = randn(*value.shape, seed=3, dtype=torch.float32)
    got = torch.autograd.grad(value, scale, upstream)[0]
    exact = run(*(t.detach().double() for t in sides), backend="reference", scale=scale.double())
    right = torch.autograd.grad(exact, scale, upstream.double())[0]
    most = 4 if kind == "mean" else 1  # d mean / d scale has a square of logits
    assert abs(got - right) <= most * torch.finfo(torch.float32).eps * upstream.abs().sum()


def column_lse(x: Tensor, y: Tensor, backend: str) -> Tensor:
    return known(sweeps.sweep(x, y, columns=True, backend=backend).col_lse)


def test_padding_adds_nothing():
    """Logits of -2000 in whole columns: exp overflows in the padding of an odd number of rows."""
    x = torch.full((65, 64), 4.0, dtype=HALF)
    y = (-8 + 0.1 * randn(33, 64, seed=1)).to(HALF)
    got = value_and_gradients(partial(column_lse, backend="cpu"), [x, y])
    exact = value_and_gradients(partial(column_lse, backend="reference"), [x.double(), y.double()])
    for a, right in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), right, rtol=2**-6, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "name",
    ["clip_loss", "nt_xent", "queue", "siglip_loss", "clip_loss nested", "nt_xent nested"],
)
def test_two_runs_and_kept_logits_give_equal_bits(name, threads):
    d = D if name == "queue" else 288  # logits of fewer features may not be worth keeping
    x, y = (randn(601, d, seed=s, dtype=HALF) for s in (1, 2))
    given = [x, y, *calls(0.1)[name][1][2:]]
    loss, before = partial(calls(0.1)[name][0], ck), torch.get_num_threads()
    torch.set_num_threads(threads)
    found = []
    for limit in (0, 2**26, 2**26):
        with ck.workspace_limit(limit):
            found.append(value_and_gradients(loss, given))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
