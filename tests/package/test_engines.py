"""Which GPUs the engine for Hopper runs on, as asked, checked or recorded; GPUs are made up."""

from __future__ import annotations

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels import engines

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch, tmp_path):
    """A GPU of the kind; without records and checks."""
    monkeypatch.delenv("CK_HOPPER", raising=False)
    monkeypatch.setattr(engines, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(engines, "checked", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(engines.metadata, "version", lambda name: "3.6.0")
    engines._recorded.cache_clear()
    yield
    engines._recorded.cache_clear()


def test_it_has_to_be_asked_for_where_nothing_is_recorded(monkeypatch):
    assert "no check of it is recorded" in engines.without_hopper(DEVICE)
    monkeypatch.setenv("CK_HOPPER", "1")
    assert engines.without_hopper(DEVICE) is None
    with engines.forced(False):
        assert engines.without_hopper(DEVICE) is not None


def test_a_recorded_check_is_of_one_kind_of_gpu_and_code(monkeypatch):
    engines.record(DEVICE)
    assert engines.without_hopper(DEVICE) is None
    monkeypatch.setenv("CK_HOPPER", "0")
    assert engines.without_hopper(DEVICE) == "CK_HOPPER=0 is set"
    monkeypatch.delenv("CK_HOPPER")
    for owner, name, other in (
        (torch.cuda, "get_device_name", "NVIDIA H100"),
        (engines.metadata, "version", "3.9.0"),
        (engines, "SOURCES", engines.SOURCES[1:]),
    ):
        with monkeypatch.context() as changed:
            value = other if name == "SOURCES" else lambda _, other=other: other
            changed.setattr(owner, name, value)
            engines._recorded.cache_clear()
            assert engines.without_hopper(DEVICE) is not None, name


def test_the_first_call_checks_on_request(monkeypatch):
    assert not engines.wants_check(DEVICE)
    monkeypatch.setenv("CK_HOPPER", "check")
    assert engines.wants_check(DEVICE) and not engines.wants_check(torch.device("cpu"))
    assert "comes with the first call" in engines.without_hopper(DEVICE)
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not engines.wants_check(DEVICE)  # which waits
    for fault in ("all is wrong", None):
        engines.checked[DEVICE] = fault
        assert not engines.wants_check(DEVICE)
        found = engines.without_hopper(DEVICE)
        assert found is None if fault is None else fault in found


def test_a_failed_check_is_said_once(monkeypatch):
    pytest.importorskip("triton")
    from contrastive_kernels.triton import hopper_check

    monkeypatch.setenv("CK_HOPPER", "check")
    monkeypatch.setattr(hopper_check, "fault", lambda device: "all is wrong")
    with pytest.warns(UserWarning, match="not used on cuda:0: all is wrong"):
        hopper_check.on_request(DEVICE)
    hopper_check.on_request(DEVICE)
    assert engines.checked == {DEVICE: "all is wrong"}


def test_backends_says_why_not(monkeypatch):
    monkeypatch.setattr(ck.backends.__globals__["engines"], "is_hopper", lambda device: False)
    found = ck.backends()["triton"].engines
    assert list(found) == ["hopper", "triton"] and found["hopper"]
    assert not ck.backends()["cpu"].engines
