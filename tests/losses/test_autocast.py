"""A backward pass inside an autocast region: float32 features keep their precision there too."""

from __future__ import annotations

import pytest
import torch
from loss_calls import FIRST, by_rows, inputs, ours, with_backends
from oracles import DEVICE, randn, value_and_gradients
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels.losses.table import CASES

METHODS = ("cholesky", "zca", "newton_schulz")


def in_a_region(function, given: list[Tensor], whole: bool) -> list[Tensor]:
    """Value and gradients, of a forward pass in the region and on request the backward too."""
    given = [t.detach().requires_grad_(t.requires_grad) for t in given]
    with torch.autocast(DEVICE, torch.bfloat16):
        value = function(*given)
        upstream = randn(*value.shape, seed=99).to(value.dtype)
        if whole:
            found = torch.autograd.grad(value, [t for t in given if t.requires_grad], upstream)
    if not whole:
        found = torch.autograd.grad(value, [t for t in given if t.requires_grad], upstream)
    return [value.detach(), *found]


def check(function, given: list[Tensor]) -> None:
    wanted = value_and_gradients(function, given)
    for whole in (False, True):
        for a, b in zip(in_a_region(function, given, whole), wanted, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@with_backends(
    [n for n, (row, _) in CASES.items() if n == FIRST[row.name] or row.name in ("intl", "w_mse")],
    interpreted=(),
)
def test_backward_of_a_loss_in_the_region(name, backend):
    check(ours(name, backend=backend, reduction=by_rows(name)), inputs(name, torch.float32))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("method", METHODS)
def test_backward_of_whitening_in_the_region(method, backend):
    x = randn(2, 24, 5).float().requires_grad_()
    check(lambda x: ck.whiten(x, method=method, backend=backend), [x])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_backward_of_the_layer_in_the_region(method, training):
    layer = ck.Whitening(5, method=method).train(training)
    check(layer, [randn(24, 5).float().requires_grad_()])
