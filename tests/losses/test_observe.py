"""Looking on at a loss: the same numbers, and what it says of itself."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from loss_calls import FIRST, inputs, ours
from oracles import randn, value_and_gradients

import contrastive_kernels as ck
from contrastive_kernels.losses.observe import observed
from contrastive_kernels.losses.table import CASES, LOSSES

STATISTICS = {
    row.name: "return_stats" in inspect.signature(row.function).parameters for row in LOSSES
}


@pytest.mark.parametrize("name", FIRST.values())
def test_numbers_are_the_same_to_the_bit(name):
    given = inputs(name, torch.float32)
    expected = value_and_gradients(ours(name), given)
    with observed() as calls:
        found = value_and_gradients(ours(name), given)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    (call,) = calls  # of losses within losses the outer one
    assert call.name == CASES[name][0].name
    assert (call.stats is not None) == STATISTICS[call.name]
    assert math.isfinite(call.backward_seconds) and call.forward_seconds > 0


def test_statistics_are_those_of_the_loss():
    x, y = randn(9, 4), randn(9, 4, seed=1)
    loss, stats = ck.nt_xent(x, y, return_stats=True)
    with observed() as calls:
        assert torch.equal(ck.nt_xent(x, y), loss)
        again, asked = ck.nt_xent(x, y, return_stats=True)
    assert torch.equal(again, loss) and torch.equal(asked.rank, stats.rank)
    for call in calls:
        numbers = call.numbers()
        assert numbers["accuracy"] == stats.accuracy
        assert numbers["mi_lower_bound"] == stats.mi_lower_bound
        assert "backward_ms" not in numbers


def test_time_is_that_of_the_loss_alone():
    x = randn(8, 4).requires_grad_()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            import time

            time.sleep(0.3)
            return grad

    with observed() as calls:
        features = Slow.apply(x)
        (Slow.apply(ck.nt_xent(features, features)) + features.sum()).backward()
    assert 0 < calls[0].backward_seconds < 0.2


@pytest.mark.skipif(not ck.backends()["cpu"].usable, reason="no extension")
@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="buffers of the engine")
def test_memory_is_that_of_the_engine():
    with observed() as calls:
        for n in (64, 1024):
            x = randn(n, 16, dtype=torch.float32).requires_grad_()
            ck.nt_xent(x, x.detach().flip(0)).backward()
    small, large = (call.peak_bytes for call in calls)
    assert 2 * 1024 * 1024 * 4 <= large <= 64 * 2**20  # logits of half of the pairs, kept
    assert small < large


def test_errors_are_those_of_the_loss():
    x = randn(3, 4)
    with observed() as calls, pytest.raises(ValueError, match="z2"):
        ck.nt_xent(x, randn(4, 4))
    with observed(), pytest.raises(TypeError):
        ck.nt_xent(x)
    assert calls == []
    with observed() as calls:  # somebody looks on again
        ck.nt_xent(x, x)
    assert len(calls) == 1


def test_transforms_are_left_alone():
    x = randn(5, 4)
    with observed() as calls:
        torch.func.grad(lambda z: ck.nt_xent(z, z))(x)
        torch.func.jvp(lambda z: ck.nt_xent(z, z), (x,), (x,))
    assert calls == []
