"""Errors that come late: flags on their way from a GPU, played by events, and on a real one."""

from __future__ import annotations

import pytest
import torch
from oracles import DEVICE, randn

import contrastive_kernels as ck
from contrastive_kernels.whitening import errors

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


class Event:
    """An event that has happened, or happens when it is waited for."""

    def __init__(self, happened: bool) -> None:
        self.happened = happened

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened = True


@pytest.fixture(autouse=True)
def no_calls():
    errors._calls.clear()
    yield
    errors._calls.clear()


def on_its_way(*info: int, happened: bool) -> Event:
    event = Event(happened)
    errors._calls.append(errors._Call(event, torch.tensor(info, device="cpu")))
    return event


def test_a_later_call_raises_for_what_has_arrived():
    on_its_way(0, 0, happened=True)
    on_its_way(0, 1, 0, happened=True)
    message = "group 1 of 3 of an earlier call is not positive definite"
    with pytest.raises(ValueError, match=message):
        errors._raise_for_earlier(wait=False)
    errors._raise_for_earlier(wait=False)  # once only
    assert not errors._calls


def test_nothing_waits_for_what_has_not_arrived():
    event = on_its_way(2, happened=False)
    errors._raise_for_earlier(wait=False)
    assert not event.happened and len(errors._calls) == 1


def test_check_whitening_waits():
    event = on_its_way(0, 2, happened=False)
    with pytest.raises(ValueError, match="group 1 of 2 of an earlier call is not finite"):
        ck.check_whitening()
    assert event.happened
    ck.check_whitening()


def bad_group() -> torch.Tensor:
    x = randn(3, 9, 8, dtype=torch.float32)
    x[1, 0] = torch.nan
    return x


@on_gpu
def test_the_next_call_on_a_gpu_raises():
    z = ck.whiten(bad_group())
    assert z[[0, 2]].isfinite().all()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="group 1 of 3 of an earlier call"):
        ck.whiten(randn(9, 8))
    ck.check_whitening()


@on_gpu
def test_nothing_synchronises_with_a_gpu():
    x = randn(3, 9, 8, dtype=torch.float32).requires_grad_()
    ck.whiten(x).sum().backward()  # what is set up by a first call may
    torch.cuda.set_sync_debug_mode("error")
    try:
        ck.whiten(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_cuda_graph_can_be_captured():
    x = randn(3, 9, 8, dtype=torch.float32)
    ck.whiten(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = ck.whiten(x)
    graph.replay()
    torch.testing.assert_close(z, ck.whiten(x))
