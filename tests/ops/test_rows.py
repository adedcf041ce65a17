"""Rows taken by index and summed by index."""

from __future__ import annotations

import pytest
import torch
from oracles import DOUBLE, randn

from contrastive_kernels.ops import rows

CASES = {
    "some": ([2, 0, 2, 5, 2, 0], 7),
    "one": ([0], 1),
    "all in one": ([3] * 9, 5),
    "none": ([], 3),
    "each": ([4, 3, 2, 1, 0], 5),
}
parametrize_cases = pytest.mark.parametrize("case", CASES)


def by_hand(x, which, count):
    total = torch.zeros(count, x.shape[1], dtype=x.dtype)
    for row, index in zip(x, which.tolist(), strict=True):
        total[index] += row
    return total


@pytest.fixture(params=["cpu", "gpu", "reference"])
def backend(request, monkeypatch):
    """CPUs add in order by themselves; else sums are made as on a GPU."""
    if request.param != "cpu":
        monkeypatch.setattr(rows, "adds_in_order", lambda x: False)
    return request.param


@parametrize_cases
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_sums(case, integers, backend):
    indices, count = CASES[case]
    which = torch.tensor(indices, dtype=integers)
    x = randn(len(indices), 3)
    found = rows.sum_rows(x, which, count, backend)
    torch.testing.assert_close(found, by_hand(x, which, count), rtol=1e-14, atol=1e-14)


@parametrize_cases
def test_derivatives(case, backend):
    indices, count = CASES[case]
    which = torch.tensor(indices, dtype=torch.int64)
    few = randn(count, 3).requires_grad_()
    assert torch.equal(rows.take_rows(few, which, backend), few[which])
    if indices:
        many = randn(len(indices), 3, seed=1).requires_grad_()
        for function, x in (
            (lambda x: rows.take_rows(x, which, backend).square(), few),
            (lambda x: rows.sum_rows(x, which, count, backend).square(), many),
        ):
            assert torch.autograd.gradcheck(function, x)
            assert torch.autograd.gradgradcheck(function, x)


def test_registration():
    which = torch.tensor([1, 0, 1, 1])
    torch.library.opcheck(rows._take_rows, (randn(2, 3).requires_grad_(), which))
    torch.library.opcheck(rows._sum_rows, (randn(4, 3).requires_grad_(), which, 2))


def test_two_runs_give_equal_bits():
    which = torch.arange(500) % 3
    x = randn(500, 7, dtype=torch.float32)
    first = rows._sum_rows(x, which, 3)
    assert torch.equal(first, rows._sum_rows(x, which, 3))
    close = {"rtol": 1e-6, "atol": 500 * 2.0**-23}
    torch.testing.assert_close(first.to(DOUBLE), by_hand(x.to(DOUBLE), which, 3), **close)
