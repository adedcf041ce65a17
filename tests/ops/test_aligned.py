"""The logits of rows that belong together, which a sweep gives on its way."""

from __future__ import annotations

import oracles
import pytest
import torch
from sweep_cases import FUSED, INFINITY, assert_close
from torch.library import opcheck

import contrastive_kernels as ck
from contrastive_kernels import ops
from contrastive_kernels.backends import can_align, can_join
from contrastive_kernels.ops.registration import OPERATORS

ALIGNED = [backend for backend in FUSED if can_align(backend)]
pytestmark = pytest.mark.skipif(not ALIGNED, reason="no backend gives them here")
# one row, a tile, one more and less, a prime, several tiles; as many keys and more
SIZES = [(1, 1, 1), (2, 5, 3), (63, 63, 8), (65, 70, 5), (129, 129, 16), (307, 401, 7)]


def leaves_of(rows: int, keys: int, d: int, dtype: torch.dtype, size: float) -> list:
    made = [oracles.randn(rows, d, seed=1) * size, oracles.randn(keys, d, seed=2) * size]
    return [t.to(dtype).requires_grad_() for t in made]


def dense(x, y, scale, bias, dropped):
    """(z, the same with -inf where a pair is dropped) in float64."""
    z = scale * x.double() @ y.double().T
    z = z if bias is None else z + bias
    return z, z.masked_fill(dropped, -INFINITY)


def compare(outputs, expected, leaves, tolerance: float) -> None:
    """Values, and gradients for random ones from above."""
    for name, value in outputs.items():
        assert_close(value, expected[name], tolerance, name)
    weights = {k: oracles.randn(*v.shape, seed=len(k)) for k, v in expected.items()}
    loss, oracle = (
        sum((v.masked_fill(v == -INFINITY, 0.0).double() * weights[k]).sum() for k, v in o.items())
        for o in (outputs, expected)
    )
    given, wanted = (torch.autograd.grad(t, leaves) for t in (loss, oracle))
    for i, (a, b) in enumerate(zip(given, wanted, strict=True)):
        assert_close(a / b.abs().max(), b / b.abs().max(), tolerance, f"gradient {i}")


@pytest.mark.parametrize("backend", ALIGNED)
@pytest.mark.parametrize(
    "size, dtype", [(1.0, torch.float64), (1.0, torch.float32), (300.0, torch.float64)]
)
@pytest.mark.parametrize("sizes", SIZES)
def test_rows_and_keys(backend, sizes, size, dtype):
    rows, keys, d = sizes
    if oracles.interpreted(backend):  # still several tiles, and a part of one
        rows, keys = min(rows, 131), min(keys, 149)
    x, y = leaves_of(rows, keys, d, dtype, size)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    bias = oracles.randn(keys, seed=3).requires_grad_()
    ids = tuple(torch.arange(n) % 7 for n in (rows, keys))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    for columns in (False, True):
        given = ops.operands(
            x, y, scale=scale, bias=bias, exclude=ids, aligned=True, backend=backend
        )
        out = ops.sweep(given, columns=columns)
        z, kept = dense(x, y, scale, bias, ids[0][:, None] == ids[1])
        outputs = {"lse": out.lse, "partner": out.partner}
        expected = {"lse": kept.logsumexp(1), "partner": z.diagonal()}
        if columns:
            outputs["columns"], expected["columns"] = out.col_lse, kept.logsumexp(0)
        compare(outputs, expected, (x, y, scale, bias), tolerance)
    out = ops.softplus_sweep(given)
    z, kept = dense(x, y, scale, bias, ids[0][:, None] == ids[1])
    value = torch.nn.functional.softplus(kept).sum(1)
    compare(
        {"value": out.value, "partner": out.partner}, {"value": value, "partner": z.diagonal()},
        (x, y, scale, bias), tolerance,
    )  # fmt: skip
    # the partners' logits alone
    z, _ = dense(x, y, scale, bias, ids[0][:, None] == ids[1])
    grads = torch.autograd.grad(ops.sweep(given).partner.sum(), (x, y))
    for a, b in zip(grads, torch.autograd.grad(z.diagonal().sum(), (x, y)), strict=True):
        assert_close(a / size, b / size, tolerance, "of partners alone")


@pytest.mark.parametrize(
    ("backend", "threads"),
    [(b, count) for b in ALIGNED for count in ((1,) if oracles.interpreted(b) else (1, 2))],
)
@pytest.mark.parametrize("size", [1.0, 300.0])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 157, 331])
def test_rows_together(backend, n, size, threads):
    d = 6
    if oracles.interpreted(backend):  # both together: several tiles
        n = min(n, 67)
    x, y = leaves_of(n, n, d, torch.float64, size)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(n).repeat(2)
    # logits of 4e6 in units of log 2, of which a rounding is 1e-9
    tolerance = 4e-9 if size > 1 and backend == "triton" else 1e-9
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given = ops.operands(
            x, None, more=y, scale=scale, exclude=(ids, ids), aligned=True, backend=backend
        )
        out = ops.sweep(given)
        both = torch.cat((x, y))
        z, kept = dense(both, both, scale, None, ids[:, None] == ids)
        partner = torch.cat((z.diagonal(n), z.diagonal(-n)))
        compare(
            {"lse": out.lse, "partner": out.partner},
            {"lse": kept.logsumexp(1), "partner": partner}, (x, y, scale), tolerance,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ALIGNED)
def test_opcheck(backend):
    x, y = leaves_of(4, 6, 3, torch.float64, 1.0)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    pairs = (x, y, scale, *5 * (None,))
    opcheck(OPERATORS["row_stats", backend], (*pairs, None, *4 * (False,), False, True))
    opcheck(OPERATORS["row_softplus", backend], (*pairs, None, False, 4 * [False], True))
    if not can_join(backend):
        return
    more = (x, y[:4].detach().requires_grad_(), *pairs[2:])
    opcheck(OPERATORS["row_stats", backend], (*more, None, *4 * (False,), True, True))


@pytest.mark.parametrize("backend", ALIGNED)
def test_not_with_keep_ids_or_keys_of_each_row(backend):
    x, y = leaves_of(4, 6, 3, torch.float64, 1.0)
    ids = torch.zeros(4), torch.zeros(6)
    for given in (
        ops.operands(x, y, keep=tuple(t.long() for t in ids), aligned=True, backend=backend),
        ops.operands(x, y.expand(4, 6, 3), aligned=True, backend=backend),
    ):
        with pytest.raises(ValueError, match="aligned rows take y"):
            ops.sweep(given)


@pytest.mark.parametrize("loss", [ck.info_nce, ck.nt_xent, ck.dcl, ck.hcl, ck.rince])
def test_statistics_leave_the_value_alone(loss):
    # with statistics the positives are made beside the sweep
    x, y = leaves_of(70, 70, 9, torch.float64, 1.0)
    alone, (value, _) = loss(x, y), loss(x, y, return_stats=True)
    torch.testing.assert_close(alone, value, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(alone, (x, y)), torch.autograd.grad(value, (x, y)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)
