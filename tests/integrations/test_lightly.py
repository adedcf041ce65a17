"""lightly's losses, fused, against lightly's own."""

from __future__ import annotations

import pytest
import torch
from oracles import randn

pytest.importorskip("lightly")
from conformance import assert_conforms, clustered  # noqa: E402
from lightly import loss as peer  # noqa: E402
from lightly.loss import wmse_loss as whitened  # noqa: E402

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


needs_w_mse = pytest.mark.skipif(
    not fused.PEER.since("1.6"), reason="before 1.6 the package's own constructor raises"
)


def running(loss: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in loss.buffers()]


@needs_w_mse
@pytest.mark.parametrize(
    ("shape", "count", "iterations", "options"),
    [
        ((12, 3), 2, 1, {}),
        ((24, 5), 3, 2, {"eps": 0.1, "momentum": 0.3}),
        ((36, 6), 2, 4, {"track_running_stats": False}),
    ],
)
def test_w_mse(shape, count, iterations, options):
    """With the package's permutations, and its running statistics afterwards."""
    n, dim = shape
    options = options | {"embedding_dim": dim, "w_size": 12, "w_iter": iterations}
    losses = [m.WMSELoss(num_samples=count, **options).double() for m in (fused, whitened)]

    def drawn(loss):
        def call(x):
            torch.manual_seed(3)
            return loss(x)

        return call

    inputs = [torch.cat([clustered(n, dim, seed=seed) for seed in range(count)])]
    calls = fused_calls("WMSELoss")
    assert_conforms(*map(drawn, losses), inputs, bfloat16=False)
    assert fused_calls("WMSELoss") == calls + 2
    ours, theirs = map(running, losses)
    assert len(ours) == (2 if options.get("track_running_stats", True) else 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@needs_w_mse
@pytest.mark.parametrize("options", [{}, {"eps": 0.1, "momentum": 0.5}])
@pytest.mark.filterwarnings("error:.*runs unfused")
def test_whitening(options):
    layers = [m.Whitening2d(6, **options).double() for m in (fused, whitened)]
    assert_conforms(*layers, [clustered(19, 6)], bfloat16=False)
    torch.testing.assert_close(*map(running, layers), rtol=1e-5, atol=1e-6)
    x = clustered(4, 6, seed=2)  # of running statistics, which need no groups
    torch.testing.assert_close(*(layer.eval()(x) for layer in layers), rtol=1e-5, atol=1e-6)


@needs_w_mse
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_w_mse_runs_unfused():
    def values(n: int, evaluate: bool = False, **options) -> list[torch.Tensor]:
        out = []
        for module in (fused, whitened):
            loss = module.WMSELoss(embedding_dim=3, w_size=6, **options).double()
            loss.train(not evaluate)
            torch.manual_seed(0)
            out.append(loss(clustered(n, 3)))
        return out

    calls = fused_calls("WMSELoss")
    torch.testing.assert_close(*values(24, evaluate=True), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(
        *values(24, loss_fn=torch.nn.functional.mse_loss), rtol=1e-9, atol=0.0
    )
    for n, error, message in [
        (25, RuntimeError, "divisible by num_samples"),
        (8, ValueError, "greater than or equal to w_size"),
        (26, RuntimeError, "invalid for input of size"),
    ]:
        with pytest.raises(error, match=message):
            values(n)
    assert fused_calls("WMSELoss") == calls


def fused_calls(title: str) -> int:
    return next(swap for swap in fused.PEER.swaps if swap.title == title).fused_calls


@pytest.mark.parametrize("shape", [(1, 8), (2, 3), (5, 3), (37, 16)], ids=str)
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_koleo(shape):
    for options in ({}, {"eps": 0.1}):
        assert_conforms(fused.KoLeoLoss(**options), peer.KoLeoLoss(**options), views(*shape)[:1])


def test_koleo_of_rows_shorter_than_its_eps():
    x = 0.01 * views(9, 4)[0]
    assert_conforms(fused.KoLeoLoss(eps=0.1), peer.KoLeoLoss(eps=0.1), [x])


@pytest.mark.filterwarnings("ignore:.*runs unfused")
@pytest.mark.parametrize("change", [{"p": 1}, {"eps": 0.0}])
def test_another_koleo_runs_unfused(change):
    x = views(9, 4)[0]
    assert torch.equal(fused.KoLeoLoss(**change)(x), peer.KoLeoLoss(**change)(x))


def test_the_nearest_of_a_support_set():
    found = []
    for cls in (fused.NNMemoryBankModule, fused.nearest.NNMemoryBankModule):
        torch.manual_seed(0)
        bank, steps = cls(size=(40, 6)), []
        for step in range(6):
            output = randn(9, 6, seed=step, dtype=torch.float32)
            steps.append(bank(output, update=step % 2 == 0))
        found.append([*steps, bank.bank])
    assert all(map(torch.equal, *found))


@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_a_support_set_of_doubles_runs_unfused():
    bank, output = fused.NNMemoryBankModule(size=(40, 6)).double(), randn(9, 6)
    before = bank.bank.clone()
    wanted = before[(output @ before.T).argmax(1)]
    assert torch.equal(bank(output, update=True), wanted)
    assert torch.equal(bank.bank, torch.cat((output, before[9:])))  # once
