"""What else is done with a graph: activation checkpointing, several gradients at once, losses that
are changed in place."""

from __future__ import annotations

import pytest
import torch
from loss_calls import FIRST, backends, by_rows, inputs, ours
from oracles import differentiable
from torch.utils.checkpoint import checkpoint

from contrastive_kernels.losses.table import CASES
from contrastive_kernels.ops import rowwise

NAMES = [name for name in CASES if "auto" in backends(name) or "cpu" in backends(name)]


@pytest.fixture(autouse=True, params=["small", "large"])
def as_of_size(request, monkeypatch):
    """Large features take nodes of their own in the graph."""
    if request.param == "large":
        monkeypatch.setattr(rowwise, "BLOCK_ELEMENTS", 1)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed(name):
    given = inputs(name)
    loss, leaves = ours(name), differentiable(given)
    expected = torch.autograd.grad(loss(*given), leaves)
    got = torch.autograd.grad(checkpoint(loss, *given, use_reentrant=False), leaves)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", NAMES)
def test_changed_in_place(name):
    """`loss *= 2` and `loss /= steps` before the backward, as with a loss that is dense."""
    given = inputs(name)
    leaves, loss = differentiable(given), ours(name, reduction=by_rows(name))
    expected = torch.autograd.grad((loss(*given) * 3 / 2).sum(), leaves)
    value = loss(*given)
    value *= 3
    got = torch.autograd.grad(value.div_(2).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", FIRST.values())
def test_several_gradients_at_once(name):
    given = inputs(name)
    leaves, loss = differentiable(given), ours(name)(*given)
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    weights = torch.tensor([1.0, -2.0], dtype=loss.dtype)
    got = torch.autograd.grad(loss, leaves, weights, is_grads_batched=True)
    for several, one in zip(got, expected, strict=True):
        torch.testing.assert_close(several, torch.stack((one, -2 * one)), rtol=1e-12, atol=1e-12)
