"""Patching a peer, putting it back, and the record of what ran fused."""

from __future__ import annotations

import copy
import importlib.metadata
import sys
import types
import warnings

import pytest
import torch
from fresh import run_python
from torch.nn.modules import module as hooks

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
    module = types.ModuleType(f"{__name__}.toy")
    module.double = lambda x: ("peer", 2 * x)
    cls = type("Loss", (Loss,), {"forward": Loss.forward})
    monkeypatch.setattr(swap, "_imported", {})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.4.2rc1")
    peer = swap.Peer("toy", "toy-package", ("1.2", "2"))

    @peer.fused(cls, own=swap.Own(cls), mode=("plain", "loud"))
    def forward(self, x):
        if x < 0:
            return swap.Unfused("nothing to do", expected=True)
        if getattr(self, "mode", "plain") == "loud":
            return ("FUSED", x)
        return swap.Unfused("x is odd") if x % 2 else ("fused", x)

    @peer.fused(cls, "rows", own=swap.Own(cls))
    def rows(self, x):
        return ("fused", [x])

    @peer.fused(module, "double", own=swap.Own(module))
    def double(x):
        return ("fused", 2 * x)

    integration = types.ModuleType("contrastive_kernels.integrations.toy")
    integration.PEER = peer
    monkeypatch.setitem(sys.modules, integration.__name__, integration)
    monkeypatch.setattr(swap, "PEERS", (*swap.PEERS, "toy"))
    return types.SimpleNamespace(
        Loss=cls, module=module, double=lambda x: module.double(x), method=forward
    )


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
    run_python(program)


def test_compiled_without_a_graph_break():
    pytest.importorskip("lightly")
    from contrastive_kernels.integrations.lightly import NTXentLoss

    out0, out1 = torch.randn(2, 12, 8)
    loss = NTXentLoss()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(out0, out1), loss(out0, out1))


def test_other_modules_that_hold_a_function_are_named(toy, monkeypatch):
    """They imported it before the patch."""
    original = toy.module.double
    other = types.ModuleType("other")
    other.twice = original
    monkeypatch.setitem(sys.modules, "other", other)
    reason = "held by other.twice, stays unfused: import it after the patch, or call "
    with pytest.warns(UserWarning, match=f"double: {reason}"):
        ck.patch("toy")
    status = ck.patch_status()["toy"]
    assert status["double"].unreached == (f"{reason}{toy.module.__name__}.double",)
    assert status["Loss.forward"].unreached == ()
    assert other.twice(2) == ("peer", 4) and toy.double(2) == ("fused", 4)
    other.twice = toy.module.double  # imported again
    assert ck.patch_status()["toy"]["double"].unreached == ()
    ck.unpatch()
    assert ck.patch_status()["toy"]["double"].unreached == ()


def test_a_method_that_is_no_longer_the_peers_stays(toy):
    def mine(self, x):
        return ("mine", x)

    toy.Loss.forward = mine
    with pytest.warns(UserWarning, match="Loss.forward is overridden: it stays as it is"):
        ck.patch("toy")
    assert toy.Loss().forward(2) == ("mine", 2)
    status = ck.patch_status()["toy"]["Loss.forward"]
    assert not status.patched and status.unreached == (
        "Loss.forward is overridden: it stays as it is",
    )
    ck.unpatch()
    assert toy.Loss.forward is mine


def foreign(function):
    """The function as if another package had it."""
    scope = {"__name__": "somewhere.else"}
    return types.FunctionType(function.__code__, scope, function.__name__)


def test_a_method_that_was_not_the_peers_from_the_start(toy):
    """Put there before the integration was imported."""
    toy.Loss.rows = foreign(lambda self, x: ("theirs", x))
    peer = swap.Peer("toy", "toy-package", ("1.2", "2"))
    method = peer.fused(toy.Loss, "rows", own=swap.Own(toy.Loss))(lambda self, x: ("fused", x))
    with pytest.warns(UserWarning, match="rows is overridden"):
        assert method(toy.Loss(), 1) == ("theirs", 1)
    own = swap.Own(toy.Loss, "rows", "forward")
    assert own.replaced(toy.Loss()) == "rows is overridden"


class Part(torch.nn.Module):
    def forward(self, x):
        return x

    def helper(self, x):
        return x


class Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.mode, self.weight = Part(), "plain", None
        self.held = self.method

    def method(self):
        return 1

    @staticmethod
    def static():
        return 2


def own():
    part = swap.Own(Part, "forward", "helper", called=True)
    return swap.Own(
        Whole, "method", "static", functions={"held": [Whole.method]},
        options={"mode": ("plain", "loud"), "weight": (None,)}, parts={"part": part},
    )  # fmt: skip


def other(*args):
    return None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: None, None),
        (lambda w: setattr(w, "mode", "loud"), None),
        (lambda w: setattr(w, "method", w.method), None),
        (lambda w: setattr(w, "method", other), "method is overridden"),
        (lambda w: setattr(w, "static", other), "static is overridden"),
        (lambda w: setattr(w, "method", Whole().method), "method is overridden"),
        (lambda w: setattr(w, "held", Whole().held), "held is overridden"),
        (lambda w: setattr(w, "held", w.static), "held is overridden"),
        (lambda w: setattr(w, "mode", "soft"), "mode is 'soft'"),
        (lambda w: setattr(w, "weight", torch.ones(2)), "weight is a tensor"),
        (lambda w: setattr(w, "part", torch.nn.Identity()), "the part is Identity"),
        (lambda w: setattr(w.part, "helper", other), "part.helper is overridden"),
        (
            lambda w: setattr(w, "part", type("P", (Part,), {"__call__": other})()),
            "part.__call__ is overridden",
        ),
        (lambda w: w.part.register_forward_pre_hook(other), "part has hooks"),
        (lambda w: w.part.register_forward_hook(other), "part has hooks"),
        (lambda w: w.part.register_full_backward_hook(other), "part has hooks"),
        (lambda w: w.part.register_full_backward_pre_hook(other), "part has hooks"),
    ],
)
def test_what_is_replaced(change, reason):
    """Of an instance, of its copy and, while a graph is made, of the same instance."""
    whole = Whole()
    change(whole)
    assert own().replaced(whole) == reason
    assert own().replaced(copy.deepcopy(whole)) == reason


@pytest.mark.parametrize(
    "register",
    [
        hooks.register_module_forward_pre_hook,
        hooks.register_module_forward_hook,
        hooks.register_module_full_backward_pre_hook,
        hooks.register_module_full_backward_hook,
    ],
)
def test_hooks_of_all_modules(register):
    """They may change what a part gives, as its own may."""
    named = own()
    handle = register(other)
    try:
        assert named.replaced(Whole()) == "torch has hooks of all modules"
        named.parts["part"].called = False
        assert named.replaced(Whole()) is None
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_a_hook_of_all_modules_changes_the_number_as_it_does_the_peers():
    lightly = pytest.importorskip("lightly.loss")
    from contrastive_kernels.integrations.lightly import NTXentLoss

    views = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    plain = NTXentLoss()(*views)

    def double(module, inputs, output):
        return 2 * output if isinstance(module, torch.nn.CrossEntropyLoss) else None

    handle = hooks.register_module_forward_hook(double)
    try:
        ours, theirs = NTXentLoss()(*views), lightly.NTXentLoss()(*views)
    finally:
        handle.remove()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours, 2 * plain)


@pytest.mark.parametrize("name", ["method", "static", "held"])
def test_what_is_replaced_in_a_class(monkeypatch, name):
    named = own()
    below = type("Below", (Whole,), {"method": lambda self: 3} if name != "static" else {})
    if name == "static":
        monkeypatch.setattr(Whole, "static", staticmethod(other))
    assert "is overridden" in named.replaced(below())
    monkeypatch.setattr(Part, "helper", other)
    assert named.parts["part"].replaced(Part()) == "helper is overridden"
    assert not named.parts["part"].holds(Part()) and not named.holds(Part())


@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_an_override_is_seen_by_a_compiled_loss():
    """In one graph where it runs fused; the peer's own code is not compiled in one."""
    pytest.importorskip("lightly")
    from contrastive_kernels.integrations.lightly import NTXentLoss

    views, loss = torch.randn(2, 12, 8), NTXentLoss()
    for fullgraph, options in (
        (True, {}),
        (True, {"reduction": "sum", "label_smoothing": 0.3}),
        (False, {"weight": torch.rand(23)}),
    ):
        compiled = torch.compile(loss, fullgraph=fullgraph, backend="eager")
        loss.cross_entropy = torch.nn.CrossEntropyLoss(**options)
        torch.testing.assert_close(compiled(*views), loss(*views))
