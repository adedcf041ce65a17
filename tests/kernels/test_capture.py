"""What a CUDA graph needs of a step, as far as it shows without a GPU: tensors without numbers are
in the place of those of the device, so that a number that is read, or a tensor of the host, shows.

What waits for the device is in test_launches too, in the host code of the kernels.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import oracles
import pytest
import torch
from loss_calls import FIRST
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import contrastive_kernels as ck
from contrastive_kernels import triton as operators
from contrastive_kernels.losses.cases import call, tensors
from contrastive_kernels.losses.table import CASES
from contrastive_kernels.ops import pairs
from contrastive_kernels.ops.schemas import ARGUMENTS
from contrastive_kernels.triton import engine

NAMES = [
    name
    for name in FIRST.values()
    if "triton" in (CASES[name][1].backends or CASES[name][0].backends)
]
pytestmark = pytest.mark.skipif("triton" not in oracles.BACKENDS, reason="no Triton here")


class FromHost(TorchDispatchMode):
    """The operators within it that have tensors of the host beside those of the device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs or {}, made))
        if {t.device.type for t in leaves if isinstance(t, Tensor)} >= {"cpu", "meta"}:
            self.found.append(str(operator))
        return made


@pytest.fixture
def device(monkeypatch):
    """Losses take its tensors, which they refuse for having no numbers."""
    for name, module in list(sys.modules.items()):
        if name.startswith("contrastive_kernels.") and hasattr(module, "resolve_backend"):
            monkeypatch.setattr(module, "resolve_backend", lambda backend, *_: backend)
    monkeypatch.setattr(
        sys.modules["contrastive_kernels.checks"], "check_numbers", lambda name, t, *_: t.long()
    )
    monkeypatch.setattr(pairs, "operand_dtype", lambda _backend, dtype, _device: dtype)  # autocast
    return torch.device("meta")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_comes_from_the_host(device, name):
    row, case = CASES[name]
    given = {
        key: t.detach().to(device).requires_grad_(t.requires_grad)
        for key, t in tensors(case, dtype=torch.bfloat16).items()
    }
    with FromHost() as seen:
        value = call(row.function, case, given, backend="triton")
        value.sum().backward()
    assert value.device == device and not seen.found


def test_the_page_lists_the_losses_that_are_tested():
    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| tested so, ")]
    assert re.findall(r"`(\w+)`", line) == NAMES


def test_a_tensor_of_the_host_is_found(device):
    with FromHost() as seen:
        torch.ones(3, device=device) * torch.tensor(2.0)
    assert seen.found


class Recorded(TorchDispatchMode):
    """What a CUDA graph keeps of a step: operators and kernels, with the memory that they read and
    wrote, but nothing of what the host did between them."""

    def __init__(self, made: list[Callable[[], None]]):
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        if operator.namespace == "aten" and "empty" not in operator._schema.name:
            # a view, or what need not be copied, starts nothing
            given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
            made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            writes = operator._schema.is_mutable
            if writes or any(t.untyped_storage()._cdata not in given for t in made):
                self.made.append(lambda: run_into(out, operator, args, kwargs))
        return out


@torch.no_grad()
def run_into(out, operator, args, kwargs) -> None:
    for old, new in zip(tree_leaves(out), tree_leaves(operator(*args, **kwargs)), strict=True):
        if isinstance(old, Tensor) and old is not new:
            old.copy_(new)


@pytest.fixture
def recorded(monkeypatch) -> list[Callable[[], None]]:
    """The kernels that are launched, and what runs within the operators of the package."""
    made: list[Callable[[], None]] = []
    launch = engine.launch

    def kept(*arguments, **options) -> None:
        with _disable_current_modes():  # the interpreter copies what it works on
            launch(*arguments, **options)
        made.append(lambda: launch(*arguments, **options))

    def within(function):
        def run(*arguments):
            with Recorded(made):
                return function(*arguments)

        return run

    monkeypatch.setattr(engine, "launch", kept)
    for name in ARGUMENTS:
        monkeypatch.setattr(operators, name, within(getattr(operators, name)))
    return made


@pytest.mark.skipif(not oracles.interpreted("triton"), reason="a real graph is captured below")
@pytest.mark.parametrize("name", ["info_nce", "clip_loss", "siglip_loss", "nt_xent", "sup_con"])
def test_what_a_graph_keeps_is_the_step(recorded, name):
    """Recorded for one batch, and replayed in the same memory for another: features, ids and the
    numbers that are tensors."""
    row, case = CASES[name]
    given = tensors(case, dtype=torch.float32)
    learned = [t for t in given.values() if t.requires_grad]

    def step() -> tuple[Tensor, ...]:
        value = call(row.function, case, given, backend="triton")
        return value, *torch.autograd.grad(value, learned)

    with Recorded(recorded):
        found = step()
    steps = list(recorded)
    before = [t.clone() for t in found]
    with torch.no_grad():
        for t in given.values():
            t.copy_((3 * t).sin() if t.is_floating_point() else t.roll(1, 0))
    for one in steps:
        one()
    for got, wanted, old in zip(found, step(), before, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=0.0)
        assert not torch.equal(got, old)


def test_a_number_that_the_host_has_read_is_not_replayed():
    steps: list[Callable[[], None]] = []
    x = torch.arange(1.0, 4.0)
    with Recorded(steps):
        read, kept = x * x.sum().item(), x * x.sum()
    x.add_(1.0)
    for one in steps:
        one()
    assert torch.equal(kept, x * x.sum()) and not torch.equal(read, kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU")
def test_a_captured_step_is_the_step():
    """The recipe of docs/gpu.md, replayed for other features."""

    def features(seed: int) -> list[Tensor]:
        made = [oracles.randn(256, 64, seed=seed + k).bfloat16() for k in range(2)]
        return [t.requires_grad_() for t in made]

    scale = torch.tensor(10.0, device="cuda", requires_grad=True)
    given = features(7)
    expected = ck.clip_loss(*given, scale)
    wanted = torch.autograd.grad(expected, (*given, scale))
    captured = torch.cuda.make_graphed_callables(ck.CLIPLoss(), (*features(1), scale))
    value = captured(*given, scale)
    assert torch.equal(value, expected)
    for a, b in zip(torch.autograd.grad(value, (*given, scale)), wanted, strict=True):
        assert torch.equal(a, b)
