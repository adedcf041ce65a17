"""Patching a peer, putting it back, and the record of what ran fused."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
import warnings

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels.integrations import swap


class Loss:
    """A peer's loss, and a method that its subclasses inherit."""

    def forward(self, x):
        return ("peer", x)

    def rows(self, x):
        return ("peer", [x])


@pytest.fixture
def toy(monkeypatch):
    """A peer `toy` of one class and one function, as an integration declares them."""
    module = types.ModuleType("toy")
    module.double = lambda x: ("peer", 2 * x)
    cls = type("Loss", (Loss,), {"forward": Loss.forward})
    monkeypatch.setattr(swap, "_imported", {})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.4.2rc1")
    peer = swap.Peer("toy", "toy-package", ("1.2", "2"))

    @peer.fused(cls, mode=("plain", "loud"))
    def forward(self, x):
        if x < 0:
            return swap.Unfused("nothing to do", expected=True)
        if getattr(self, "mode", "plain") == "loud":
            return ("FUSED", x)
        return swap.Unfused("x is odd") if x % 2 else ("fused", x)

    @peer.fused(cls, "rows")
    def rows(self, x):
        return ("fused", [x])

    @peer.fused(module, "double")
    def double(x):
        return ("fused", 2 * x)

    integration = types.ModuleType("contrastive_kernels.integrations.toy")
    integration.PEER = peer
    monkeypatch.setitem(sys.modules, integration.__name__, integration)
    monkeypatch.setattr(swap, "PEERS", (*swap.PEERS, "toy"))
    return types.SimpleNamespace(Loss=cls, double=lambda x: module.double(x), method=forward)


def test_patch_reaches_old_instances_and_is_put_back(toy):
    loss, original = toy.Loss(), vars(toy.Loss)["forward"]
    assert loss.forward(2) == ("peer", 2)
    ck.patch("toy")
    assert loss.forward(2) == ("fused", 2) and toy.double(2) == ("fused", 4)
    ck.patch("toy")  # twice is once
    ck.unpatch("toy")
    assert loss.forward(2) == ("peer", 2) and toy.double(2) == ("peer", 4)
    assert vars(toy.Loss)["forward"] is original


def test_an_inherited_method_is_inherited_again(toy):
    with ck.patched("toy"):
        assert toy.Loss().rows(1) == ("fused", [1]) and Loss().rows(1) == ("peer", [1])
    assert toy.Loss().rows(1) == ("peer", [1]) and "rows" not in vars(toy.Loss)


def test_unpatch_of_all_and_before_anything_was_patched(toy):
    ck.unpatch()
    ck.patch("toy")
    ck.unpatch()
    assert toy.Loss().forward(2) == ("peer", 2)


def test_patch_of_named_parts(toy):
    ck.patch("toy", "double")
    assert toy.Loss().forward(2) == ("peer", 2) and toy.double(2) == ("fused", 4)
    with pytest.raises(ValueError, match="toy has Loss, double to patch, got 'Lost'"):
        ck.patch("toy", "Lost")
    ck.unpatch()


def test_patched_gives_back_what_it_found(toy):
    ck.patch("toy", "double")
    with pytest.raises(KeyError), ck.patched("toy"):
        assert toy.Loss().forward(2) == ("fused", 2)
        raise KeyError
    assert toy.Loss().forward(2) == ("peer", 2) and toy.double(2) == ("fused", 4)
    ck.unpatch()


def test_options_of_a_patch(toy):
    ck.patch("toy", mode="loud")
    assert toy.Loss().forward(2) == ("FUSED", 2) and toy.double(2) == ("fused", 4)
    with ck.patched("toy", "Loss", mode="plain"):
        assert toy.Loss().forward(2) == ("fused", 2)
    assert toy.Loss().forward(2) == ("FUSED", 2)
    ck.patch("toy")  # an option that is left out has its default
    assert toy.Loss().forward(2) == ("fused", 2)
    ck.patch("toy", mode="loud")
    ck.unpatch()
    assert toy.Loss().forward(2) == ("peer", 2) and not hasattr(toy.Loss, "mode")


def test_unknown_options(toy):
    with pytest.raises(ValueError, match="mode must be 'plain' or 'loud', got 'soft'"):
        ck.patch("toy", mode="soft")
    with pytest.raises(TypeError, match=r"options must be those of toy: \['mode'\], got 'modes'"):
        ck.patch("toy", modes="loud")
    with pytest.raises(TypeError, match=r"options must be those of double: \[\], got 'mode'"):
        ck.patch("toy", "double", mode="loud")
    assert toy.Loss().forward(2) == ("peer", 2)


def test_calls_that_do_not_fit_run_the_peers_code_and_warn_once(toy):
    with ck.patched("toy"):
        with pytest.warns(UserWarning, match="Loss.forward runs unfused: x is odd") as record:
            assert toy.Loss().forward(3) == ("peer", 3)
        assert record[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert toy.Loss().forward(5) == ("peer", 5)
            assert toy.Loss().forward(-1) == ("peer", -1)
        toy.Loss().forward(2)
        status = ck.patch_status()["toy"]
    assert status["Loss.forward"] == swap.SwapStatus(True, 1, {"x is odd": 2, "nothing to do": 1})
    assert status["double"] == swap.SwapStatus(True, 0, {})
    assert not ck.patch_status()["toy"]["Loss.forward"].patched


def test_calls_of_the_drop_ins_count_without_a_patch(toy):
    assert toy.method(toy.Loss(), 2) == ("fused", 2)
    assert ck.patch_status()["toy"]["Loss.forward"] == swap.SwapStatus(False, 1, {})


def test_unknown_peer():
    with pytest.raises(ValueError, match="peer must be one of info_nce, .*got 'lightning'"):
        ck.patch("lightning")


@pytest.mark.parametrize("found", ["1.1.9", "2.0", "2", "10.0"])
def test_wrong_version(monkeypatch, found):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    message = f"integrations.toy needs toy-package >= 1.2, < 2, found {found}"
    with pytest.raises(ImportError, match=message):
        swap.Peer("toy", "toy-package", ("1.2", "2"))


def test_missing_peer():
    with pytest.raises(ImportError, match="toy needs no-such-package >= 1, < 2, which is not inst"):
        swap.Peer("toy", "no-such-package", ("1", "2"))


def test_nothing_is_imported_before_it_is_asked_for():
    program = (
        "import sys, contrastive_kernels, contrastive_kernels.integrations as i\n"
        "assert not set(i.PEERS) & set(sys.modules), set(i.PEERS) & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_compiled_without_a_graph_break():
    pytest.importorskip("lightly")
    from contrastive_kernels.integrations.lightly import NTXentLoss

    out0, out1 = torch.randn(2, 12, 8)
    loss = NTXentLoss()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(out0, out1), loss(out0, out1))
