"""lightly's losses, fused, against lightly's own."""

from __future__ import annotations

import pytest
import torch
from oracles import randn

pytest.importorskip("lightly")
from conformance import assert_conforms, clustered  # noqa: E402
from lightly import loss as peer  # noqa: E402

from contrastive_kernels.integrations import lightly as fused  # noqa: E402


def views(n: int, dim: int, seed: int = 0) -> list[torch.Tensor]:
    z = clustered(n, dim, seed=seed)
    return [z, z + 0.3 * randn(n, dim, seed=seed + 1)]


@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01, -1.0])
@pytest.mark.parametrize("shape", [(1, 8), (2, 1), (5, 3), (37, 16)], ids=str)
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_nt_xent(shape, temperature):
    options = {"temperature": temperature}
    assert_conforms(fused.NTXentLoss(**options), peer.NTXentLoss(**options), views(*shape))


@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01, -1.0])
@pytest.mark.parametrize(("n", "size"), [(1, 8), (7, 16), (13, 50)])
def test_nt_xent_with_a_memory_bank(n, size, temperature):
    dim = 12

    def in_type(cls):
        """The bank follows the features' type, which the peer's does not."""
        loss = cls(temperature=temperature, memory_bank_size=(size, dim))
        bank = randn(size, dim, seed=5, dtype=torch.bfloat16)

        def call(out0, out1):
            loss.memory_bank.bank = bank.to(out0.dtype)
            return loss(out0, out1)

        return call

    assert_conforms(in_type(fused.NTXentLoss), in_type(peer.NTXentLoss), views(n, dim))


def test_bank_is_filled_as_the_peer_fills_it():
    banks = []
    for cls in (fused.NTXentLoss, peer.NTXentLoss):
        torch.manual_seed(0)
        loss = cls(memory_bank_size=(17, 6))
        values = []
        for step in range(5):
            out0, out1 = (v.float().requires_grad_() for v in views(7, 6, seed=step))
            value = loss(out0, out1)
            value.backward()
            values.append(value.detach())
        with torch.no_grad():
            loss(out0, out1)  # not enqueued
        banks.append((loss.memory_bank.bank, loss.memory_bank.bank_ptr, torch.stack(values)))
    assert torch.equal(banks[0][1], banks[1][1])
    for ours, theirs in zip(banks[0][::2], banks[1][::2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_float64_with_a_bank():
    """The peer raises: its bank stays float32."""
    out0, out1 = views(5, 6)
    with pytest.raises(RuntimeError):
        peer.NTXentLoss(memory_bank_size=(9, 6))(out0, out1)
    assert fused.NTXentLoss(memory_bank_size=(9, 6))(out0, out1).dtype == torch.float64


@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
@pytest.mark.parametrize("shape", [(1, 8), (2, 3), (37, 16)], ids=str)
@pytest.mark.filterwarnings("ignore:.*runs unfused", "ignore:To copy construct")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DCLLoss", {}),
        ("DCLLoss", {"weight_fn": lambda a, b: (a - b).square().sum(1)}),
        ("DCLWLoss", {}),
        ("DCLWLoss", {"sigma": 0.9}),
    ],
)
def test_dcl(shape, temperature, name, options):
    options = options | {"temperature": temperature}
    if shape == (1, 8):  # a loss of -inf, the same
        value = getattr(fused, name)(**options)(*views(*shape))
        assert torch.equal(value, getattr(peer, name)(**options)(*views(*shape)))
        return
    assert_conforms(getattr(fused, name)(**options), getattr(peer, name)(**options), views(*shape))
