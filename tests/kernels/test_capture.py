"""What a CUDA graph needs of a step, as far as it shows without a GPU: tensors without numbers are
in the place of those of the device, so that a number that is read, or a tensor of the host, shows.

What waits for the device is in test_launches too, in the host code of the kernels.
"""

from __future__ import annotations

import sys

import oracles
import pytest
import torch
from loss_calls import FIRST
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import contrastive_kernels as ck
from contrastive_kernels.losses.cases import call, tensors
from contrastive_kernels.losses.table import CASES
from contrastive_kernels.ops import pairs

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


def test_a_tensor_of_the_host_is_found(device):
    with FromHost() as seen:
        torch.ones(3, device=device) * torch.tensor(2.0)
    assert seen.found


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
