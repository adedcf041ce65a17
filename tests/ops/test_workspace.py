"""Logits that wait for the backward pass: the same gradients whatever is kept, in limited room."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from loss_calls import FIRST, backends, inputs, ours
from oracles import BACKENDS, randn, value_and_gradients

import contrastive_kernels as ck
from contrastive_kernels.losses.table import CASES
from contrastive_kernels.ops import registration

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built here")
N = 601  # fewer rows keep nothing
BLOCK = 4 * 640 * 128  # bytes of a block of keys with all rows
FUSED = [n for n in FIRST.values() if "cpu" in backends(n) and CASES[n][1].unit == 1]


def peak(monkeypatch) -> Callable[[], int]:
    """Bytes that any call of the operator held when it was done."""
    found, call = [0], registration.call

    def watched(*args, **options):
        out = call(*args, **options)
        found.append(used())
        return out

    monkeypatch.setattr(registration, "call", watched)
    return lambda: max(found)


def used() -> int:
    from contrastive_kernels import _cpu

    return _cpu.workspace_used()


@pytest.fixture(autouse=True)
def all_comes_back():
    before = used()
    yield
    assert used() == before


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", FUSED)
def test_what_is_kept_changes_no_bit(name, threads):
    given = inputs(name, torch.float32, N=N, D=7)
    loss, before = ours(name, backend="cpu"), torch.get_num_threads()
    torch.set_num_threads(threads)
    found = []
    for limit in (0, 2 * BLOCK, 2**26):  # nothing, some blocks, all
        with ck.workspace_limit(limit):
            found.append(value_and_gradients(loss, given))
            assert used() == 0
    torch.set_num_threads(before)
    for some in found[1:]:
        for a, b in zip(found[0], some, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


CALLS = {
    "rows": ck.info_nce,
    "rows and columns": lambda x, y: ck.clip_loss(x, y, 20.0),
    "itself": ck.nt_xent,
    "softplus": lambda x, y: ck.siglip_loss(x, y, 20.0, -3.0),
    "two sweeps": lambda x, y: ck.info_nce(x, y, negatives=x.flip(0), in_batch=True),
    "large logits": lambda x, y: ck.clip_loss(x, y, 1e4),
}
parametrize_calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def leaves(n: int = N) -> list[torch.Tensor]:
    return [randn(n, 9, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2)]


def without(call) -> tuple[torch.Tensor, ...]:
    x = leaves()
    with ck.workspace_limit(0):
        return torch.autograd.grad(call(*x), x)


@parametrize_calls
def test_a_graph_holds_its_logits_and_may_be_used_again(call):
    x = leaves()
    loss = call(*x)
    assert used() >= 4 * N * N
    for _ in range(2):
        got = torch.autograd.grad(loss, x, retain_graph=True)
        assert all(map(torch.equal, got, without(call)))
    del loss


@parametrize_calls
def test_threads_may_change_before_the_backward(call):
    x, before, found = leaves(), torch.get_num_threads(), []
    for limit in (0, 2**26):
        torch.set_num_threads(3)
        with ck.workspace_limit(limit):
            loss = call(*x)
            torch.set_num_threads(1)
            found.append(torch.autograd.grad(loss, x))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@parametrize_calls
def test_copies_of_what_is_saved_keep_nothing(call):
    """As offloading to another memory does."""
    x = leaves()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        loss = call(*x)
    got = torch.autograd.grad(loss, x)
    del loss
    assert all(map(torch.equal, got, without(call)))


def test_calls_share_the_limit():
    x, limit = leaves(), 8 * BLOCK
    with ck.workspace_limit(limit):
        losses = [ck.clip_loss(*x, 20.0) for _ in range(4)]
        assert 0 < used() <= limit
        gradients = [torch.autograd.grad(loss, x) for loss in losses]
        del losses
    for got in gradients[1:]:
        assert all(map(torch.equal, got, gradients[0]))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_without_gradient_nothing_is_kept(context, monkeypatch):
    x = leaves() if context is torch.no_grad else [t.detach() for t in leaves()]
    scale = torch.tensor(20.0, requires_grad=context is not nullcontext)
    taken = peak(monkeypatch)
    with context():
        loss = ck.clip_loss(*x, scale)
    assert taken() == 0 and not loss.requires_grad


def test_blocks_keep_nothing(monkeypatch):
    """Their backward is made by hand."""
    x, y = leaves()
    taken = peak(monkeypatch)
    ck.info_nce(x, y, negatives=list(y.detach().split(N))).backward()
    assert taken() == 0


def test_the_limit_is_set_or_lasts_for_a_context():
    before = ck.workspace_limit(100).before
    with ck.workspace_limit(200):
        assert ck.workspace_limit(200).before == 200
    assert ck.workspace_limit(before).before == 100
    with pytest.raises(ValueError, match="number of bytes, 0 or more, got -1"):
        ck.workspace_limit(-1)
