"""The rules of registered operators: gradients, dtypes, processors, errors that say what came."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import oracles
import pytest
import sweeps
import torch
from sweep_cases import FUSED, INFINITY, KINDS, assert_close, make_case, needs_fused
from torch.library import opcheck

from contrastive_kernels import ops
from contrastive_kernels.backends import can_sum
from contrastive_kernels.ops.registration import OPERATORS

pytestmark = needs_fused


@pytest.mark.skipif("cpu" not in FUSED, reason="the cpu backend is not built here")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_processors_without_avx512(capability):
    # a fresh process: the instruction set is chosen once
    code = (
        "import torch; from contrastive_kernels import ops, reference, _cpu\n"
        "torch.manual_seed(0)\n"
        "x, y = (torch.randn(n, 40, requires_grad=True) for n in (70, 90))\n"
        "options = dict(scale=3.0, normalize=True)\n"
        "given = ops.checked_operands(x, y, backend='cpu', **options)\n"
        "for f in (ops.sweep, ops.softplus_sweep):\n"
        "    a = f(given)[0]\n"
        "    b = getattr(reference, f.__name__)(x.double(), y.double(), **options)[0]\n"
        "    assert ((a - b) / b).abs().max() < 1e-6, f\n"
        "    for g, h in zip(torch.autograd.grad(a.sum(), (x, y)),\n"
        "                    torch.autograd.grad(b.sum(), (x, y))):\n"
        "        assert (g - h).abs().max() < 1e-5, f\n"
        "for bits in (0x7fffffff, 0x7f800001, -1, 0x7fc12345 - 2**31):\n"
        "    for at in (0, 89 * 40 + 39):\n"
        "        nan = y.detach().clone()\n"
        "        nan.view(-1).view(torch.int32)[at] = bits\n"
        "        given = ops.checked_operands(x, nan, backend='cpu', **options)\n"
        "        assert ops.sweep(given).lse.isnan().all(), bits\n"
        "        assert ops.softplus_sweep(given).value.isnan().all(), bits\n"
        "print(_cpu.capability())\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == {"default": "baseline", "avx2": "avx2"}[capability]


def operator_arguments(kind: str, sizes: tuple[int, int, int] = (6, 7, 5)):
    x, y, ids = make_case(kind, sizes)
    x.requires_grad_()
    if y is not None:
        y.requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    bias = None if kind == "self" else oracles.randn(sizes[1], seed=3).requires_grad_()
    col_ids = None if kind == "self" else ids[1]
    return x, y, scale, bias, ids[0], col_ids, None, None


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(backend, kind):
    pairs = operator_arguments(kind)
    threshold = oracles.randn(6, seed=5)
    opcheck(
        OPERATORS["row_stats", backend],
        (*pairs, threshold, True, True, kind == "shared", False, False, False),
    )
    opcheck(OPERATORS["row_stats", backend], (*pairs, None, *6 * (False,)))
    if kind != "self":
        opcheck(OPERATORS["row_softplus", backend], (*pairs, threshold, True, [False] * 4, False))
    if kind == "shared" and can_sum(backend):
        opcheck(OPERATORS["row_softplus", backend], (*pairs, None, True, [True] * 4, False))
    if kind == "paired":
        opcheck(OPERATORS["row_dot", backend], (pairs[0], pairs[1], None, True))


@pytest.mark.parametrize("backend", FUSED)
def test_results_that_are_not_asked_for_have_their_types(backend):
    x, y, scale, bias, *ids = operator_arguments("shared")
    features = [t.detach().bfloat16().requires_grad_() for t in (x, y)]
    others = [t.detach().float().requires_grad_() for t in (scale, bias)]
    pairs = (*features, *others, *ids)
    opcheck(OPERATORS["row_stats", backend], (*pairs, None, *6 * (False,)))
    opcheck(OPERATORS["row_softplus", backend], (*pairs, None, False, [False] * 4, False))


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck_with_frozen_keys(backend):
    x, y, scale, _, *ids = operator_arguments("shared")
    arguments = (x, y.detach(), scale, None, *ids, None, False, True, False, True, False, False)
    opcheck(OPERATORS["row_stats", backend], arguments)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, kind):
    # few, since each of their entries is moved twice
    sizes = (2, 3, 2) if kind == "paired" else (4, 5, 3)
    x, y, scale, bias, *_ = operator_arguments(kind, sizes)
    ids = make_case(kind, sizes)[2]
    dropped = ids[0][:, None] == ids[1]
    assert dropped.any() and not dropped.all()

    def statistics(x, y, scale, bias):
        out = sweeps.sweep(
            x, y, scale=scale, bias=bias, exclude=ids, normalize=True, mean=True,
            columns=kind == "shared", backend=backend,
        )  # fmt: skip
        return tuple(t.masked_fill(t == -INFINITY, 0.0) for t in out if t is not None)

    # of kernels that are interpreted, a random combination of the entries
    gradcheck = partial(torch.autograd.gradcheck, fast_mode=oracles.interpreted(backend))
    assert gradcheck(statistics, (x, y, scale, bias))
    if kind != "self":
        assert gradcheck(
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
    with pytest.raises(
        NotImplementedError, match='second-order gradients need backend="reference"'
    ):
        grad.sum().backward()


@pytest.mark.parametrize("backend", oracles.BACKENDS)
def test_inputs_are_left_alone_and_gradients_keep_their_dtype(backend):
    x = oracles.randn(70, 9).bfloat16().requires_grad_()
    y = oracles.randn(80, 9, seed=1).float().requires_grad_()
    copies = x.detach().clone(), y.detach().clone()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        lse = sweeps.sweep(x, y, scale=5.0, normalize=True, backend=backend).lse
    # the cpu backend keeps the dtypes of operands: its arithmetic is float32 anyhow
    seen = y.bfloat16() if backend == "triton" else y
    widened = (x.double(), seen.double())
    exact = sweeps.sweep(*widened, scale=5.0, normalize=True, backend="reference").lse
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
