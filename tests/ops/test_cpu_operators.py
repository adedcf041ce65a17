"""What the operators of the CPU engine make of tensors before they become addresses, and after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import BACKENDS, randn
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive_kernels as ck
from contrastive_kernels import ops
from contrastive_kernels.ops import registration, schemas

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built here")
FLOAT = torch.float32


def row_stats(x, y, **options):
    """The operator as torch.ops reaches it: nothing has checked its arguments."""
    names = schemas.ARGUMENTS["row_stats"]._fields
    given = {**dict.fromkeys(names[:9]), **dict.fromkeys(names[9:], False)}
    given |= {"x": x, "y": y, "scale": torch.tensor(2.0)} | options
    return schemas.RESULTS["row_stats"](*torch.ops.contrastive_kernels.row_stats_cpu(**given))


X, Y, IDS = torch.ones(3, 2), torch.ones(5, 2), torch.arange(9)
ERRORS = {
    "x of one dim": (dict(x=X[0]), ValueError, r"x must have shape \(N, D\), got \[2\]"),
    "y of other rows": (dict(y=torch.ones(4, 5, 2)), ValueError, r"\(N, M, D\), got \[4, 5, 2\]"),
    "other D": (dict(y=torch.ones(5, 3)), ValueError, "the same D, got 2 and 3"),
    "no keys": (dict(y=Y[:0]), ValueError, r"must not be empty, got \[3, 2\] and \[0, 2\]"),
    "one double": (dict(y=Y.double()), TypeError, "must both be float64 or neither"),
    "integers": (dict(x=X.int()), TypeError, "features must be float32, .* got torch.int32"),
    "scale": (dict(scale=X), ValueError, r"scale must have one element, got \[3, 2\]"),
    "bias": (dict(bias=X), ValueError, r"bias must have shape \(5\), got \[3, 2\]"),
    "row ids": (
        dict(exclude_rows=IDS[:4], exclude_cols=IDS[:5]), ValueError,
        r"exclude_rows must have shape \(3\), got \[4\]",
    ),
    "column ids": (
        dict(keep_rows=IDS[:3], keep_cols=IDS), ValueError,
        r"keep_cols must have shape \(5\), got \[9\]",
    ),
    "threshold": (dict(threshold=Y[:, 0]), ValueError, r"threshold must have shape \(3\)"),
    "itself with a bias": (dict(y=None, bias=X[:, 0]), ValueError, "self-similarity .* no bias"),
    "columns of itself": (dict(y=None, columns=True), ValueError, r"columns need keys \(M, D\)"),
    "attend": (dict(y=torch.ones(3, 5, 2), attend=True), ValueError, "attend needs shared keys"),
    "together": (dict(y=Y.half(), together=True), ValueError, "together takes y .* dtype of x"),
}  # fmt: skip


@pytest.mark.parametrize("options, error, message", ERRORS.values(), ids=ERRORS)
def test_what_does_not_fit_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        row_stats(**{"x": X, "y": Y, **options})


@pytest.mark.parametrize(
    "ends, error, message",
    [
        (torch.tensor([1, 3]), ValueError, r"ends must have shape \(3\), got \[2\]"),
        (torch.tensor([1, 3, 5]).int(), TypeError, "ends must be contiguous int64"),
        (torch.tensor([3, 1, 5]), ValueError, "5 in all, got 5 in all"),
        (torch.tensor([1, 3, 6]), ValueError, "5 in all, got 6 in all"),
        (torch.tensor([-1, 3, 5]), ValueError, ">= 0 in number"),
        (None, ValueError, r"\(N, K, D\), or \(T, D\) with ends, got \[5, 2\]"),
    ],
)
def test_runs_that_do_not_fit_are_refused(ends, error, message):
    with pytest.raises(error, match=message):
        torch.ops.contrastive_kernels.row_dot_cpu(X, Y, ends, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_as_torch_rounds(dtype):
    """d <x, y> / dx = y, of any bits, rounded to the dtype of x."""
    kinds = np.arange(2**32, step=65521, dtype=np.int64).astype(np.uint32)  # a prime: all low bits
    halves = np.arange(2**16, dtype=np.uint32)
    ties = halves << 16 | 0x8000  # between two bfloat16, and close to it
    near = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    bits = np.concatenate((kinds, ties, ties - 1, ties + 1))
    y = torch.cat((torch.from_numpy(bits.view(np.int32)).view(FLOAT), near, near * 1.00048828125))
    y = y.view(-1, 1, 1)
    x = torch.ones(len(y), 1, dtype=dtype)
    dx, _ = torch.ops.contrastive_kernels.row_dot_backward_cpu(
        x, y, None, torch.ones(len(y), 1), False, [True, False]
    )
    wanted = (y.view(-1, 1) + 0.0).to(dtype)  # a sum that begins with 0 is not -0
    nan = wanted.isnan()
    assert dx.dtype == dtype and torch.equal(dx.isnan(), nan) and nan.any() and not nan.all()
    assert torch.equal(dx.view(torch.int16)[~nan], wanted.view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("itself", [True, False])
def test_ids_of_any_type_are_the_same(dtype, itself):
    x, y = randn(40, 6, dtype=FLOAT), None if itself else randn(50, 6, seed=1, dtype=FLOAT)
    ids = torch.arange(120) % 7
    rows, cols = ids[:40], None if itself else ids[40:90]
    wanted = row_stats(x, y, exclude_rows=rows, exclude_cols=cols).lse
    strided = torch.stack((ids, ids), 1).to(dtype)[:, 0]
    rows, cols = strided[:40], None if itself else ids[40:90].to(dtype)
    assert torch.equal(row_stats(x, y, exclude_rows=rows, exclude_cols=cols).lse, wanted)
    assert not torch.equal(row_stats(x, y).lse, wanted)


def test_negated_in_name_only():
    z = torch.randn(30, 4, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    assert torch.equal(ck.nt_xent(x, x), ck.nt_xent(x.clone(), x.clone()))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def test_who_looks_on_sees_the_operators():
    x, y = (randn(9, 4, seed=s, dtype=FLOAT).requires_grad_() for s in (1, 2))

    def loss():
        return ck.info_nce(x, y) + ops.row_dot(x, y, backend="cpu").sum()

    alone = loss()
    gradients = torch.autograd.grad(alone, (x, y))
    with Seen() as seen:
        watched = loss()
        again = torch.autograd.grad(watched, (x, y))
    assert torch.equal(alone, watched) and all(map(torch.equal, gradients, again))
    with torch.profiler.profile() as profile:
        torch.autograd.grad(loss(), (x, y))
    profiled = [event.name for event in profile.events()]
    for name in ("row_stats_cpu", "row_stats_backward_cpu", "row_dot_cpu", "row_dot_backward_cpu"):
        assert f"contrastive_kernels::{name}" in seen.names
        assert f"contrastive_kernels::{name}" in profiled


def test_what_stands_for_logits_is_no_larger_than_it_looks():
    """So that who saves it saves no logits."""
    x, y = (randn(601, 5, seed=s, dtype=FLOAT).requires_grad_() for s in (1, 2))
    out = registration.call(
        "row_stats", "cpu",
        **schemas.ARGUMENTS["row_stats"](
            x, y, torch.tensor(1.0), *6 * (None,), False, True, True, False, False, False
        )._asdict(),
    )  # fmt: skip
    from contrastive_kernels import _cpu

    assert _cpu.workspace_used() >= 4 * 601 * 601
    assert out.lse_low.untyped_storage().nbytes() == 4 * 601
    del out
    assert _cpu.workspace_used() == 0
