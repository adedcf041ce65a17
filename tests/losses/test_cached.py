"""Gradient caching beside the plain step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from oracles import DEVICE, DOUBLE, randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import contrastive_kernels as ck

N, D = 7, 4
CHUNKS = (1, 3, 7, 50)


class Encoder(nn.Module):
    """Features of rows (n, 6), also by a mapping with a learned scale."""

    def __init__(self, dropout: float = 0.0, named: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, D)
        ).to(DOUBLE)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=seed + i))
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=DOUBLE))
        self.named = named

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Any:
        features = self.layers(x) + shift
        if not self.named:
            return features
        return {"image_features": features, "logit_scale": self.log_scale.exp()}


SCALE = nn.Parameter(torch.tensor([2.0], dtype=DOUBLE))


def rows(seed: int, n: int = N) -> Tensor:
    return randn(n, 6, seed=seed)


def plain(step: Callable[[], Tensor], *models: nn.Module) -> list[Tensor]:
    return gradients(lambda: step().backward(), *models)


def gradients(step: Callable[[], Any], *models: nn.Module) -> list[Tensor]:
    """The gradients that a step gives, also of what it does not reach."""
    parameters = [p for model in models for p in model.parameters()]
    for p in parameters:
        p.grad = None
    step()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    assert any(t.abs().max() > 1e-3 for t in wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


@pytest.mark.parametrize("chunk", CHUNKS)
def test_losses_of_one_encoder_and_of_several(chunk):
    one, other, x, y = Encoder(), Encoder(seed=9), rows(1), rows(2)
    loss = partial(ck.nt_xent, temperature=0.3)
    wanted = plain(lambda: loss(one(x), other(y)), one, other)
    values = []
    found = gradients(
        lambda: values.append(ck.cached_step((one, other), (x, y), loss, chunk=chunk)), one, other
    )
    assert_same(found, wanted)
    assert not values[0].requires_grad
    torch.testing.assert_close(values[0], loss(one(x), other(y)).detach())
    wanted = plain(lambda: loss(one(x), one(y)), one)
    assert_same(
        gradients(lambda: ck.cached_step([one, one], [x, y], loss, chunk=chunk), one), wanted
    )
    labels = torch.arange(N) % 3
    supervised = partial(ck.sup_con, labels=labels, return_stats=True)
    wanted = plain(lambda: supervised(one(x))[0], one)
    result: list[Any] = []
    assert_same(
        gradients(lambda: result.extend(ck.cached_step(one, x, supervised, chunk=chunk)), one),
        wanted,
    )
    assert result[1].lse.shape == (N,)


def test_a_loss_that_is_nobody_s_and_as_many_rows_as_there_are():
    """Documents are more than queries; inputs are mappings, lists, and what is no tensor."""
    one, other = Encoder(), Encoder(seed=9)
    queries, documents, shift = rows(1), rows(2, 2 * N), randn(2 * N, 1, seed=3)

    def loss(q: Tensor, d: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(q @ d.T, torch.arange(N, device=q.device))

    wanted = plain(lambda: loss(one(queries, 0.5), other(documents, shift)), one, other)
    inputs = [{"x": queries, "shift": 0.5}, (documents, shift)]
    step = partial(ck.cached_step, (one, other.forward), inputs, loss, chunk=4)
    assert_same(gradients(step, one, other), wanted)


def test_features_by_name_and_what_is_not_of_rows():
    """A learned scale comes with every chunk, and its gradient counts once."""
    one, texts, x = Encoder(named=True), rows(3)[:, :D], rows(1)

    def loss(image_features: Tensor, logit_scale: Tensor) -> Tensor:
        return ck.clip_loss(image_features, texts, logit_scale)

    wanted = plain(lambda: loss(**one(x)), one)
    assert wanted[0].abs() > 1e-3
    assert_same(gradients(lambda: ck.cached_step(one, x, loss, chunk=2), one), wanted)


@pytest.mark.parametrize("wrapped", ["module", "function"])
def test_dropout_has_the_same_numbers_twice(wrapped):
    """The plain step draws them in the order of the chunks; afterwards those that follow come."""
    one, x, y = Encoder(dropout=0.4), rows(1), rows(2)
    encoder: Any = one if wrapped == "module" else lambda rows: one(rows)

    def step() -> Tensor:
        parts = [torch.cat([one(part) for part in (t[:2], t[2:4], t[4:])]) for t in (x, y)]
        return ck.nt_xent(*parts)

    torch.manual_seed(5)
    wanted = plain(step, one)
    following = torch.rand(3)
    torch.manual_seed(5)
    cached = partial(ck.cached_step, (encoder, encoder), (x, y), ck.nt_xent, chunk=3)
    assert_same(gradients(cached, one), wanted)
    assert torch.equal(torch.rand(3), following)


def test_steps_accumulate_and_reach_the_inputs():
    one, batches = Encoder(), [(rows(i).requires_grad_(), rows(i + 10)) for i in range(2)]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ck.nt_xent(x, y) / 2

    def step() -> None:
        for x, y in batches:
            ck.cached_step((one, one), (x, y), loss, chunk=3)

    wanted = plain(lambda: torch.stack([loss(one(x), one(y)) for x, y in batches]).sum(), one)
    of_inputs = [x.grad for x, _ in batches]
    for x, _ in batches:
        x.grad = None
    assert_same(gradients(step, one), wanted)
    assert_same([x.grad for x, _ in batches], of_inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler(dtype):
    """Weights that autocast casts without gradient are not those of the second pass."""
    one, x, y = Encoder().float(), rows(1).float(), rows(2).float()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)

    def step() -> None:
        with torch.autocast(DEVICE, dtype=dtype):
            ck.cached_step((one, one), (x, y), ck.nt_xent, chunk=N, scaler=scaler)

    def whole() -> Tensor:
        with torch.autocast(DEVICE, dtype=dtype):
            loss = ck.nt_xent(one(x), one(y))
        return scaler.scale(loss)

    wanted = plain(whole, one)
    assert wanted[1].abs().max() > 1
    assert_same(gradients(step, one), wanted, 2e-2)


def test_frozen_encoders_and_checkpoints():
    """A frozen encoder is not run again; one that keeps no activations is no other."""
    one, frozen, x, y = Encoder(), Encoder(seed=9).requires_grad_(False), rows(1), rows(2)
    calls = []
    frozen.register_forward_hook(lambda *_: calls.append(1))
    wanted = plain(lambda: ck.nt_xent(one(x), frozen(y)), one)
    calls.clear()

    def kept(rows: Tensor) -> Tensor:
        return checkpoint(one, rows, use_reentrant=False)

    step = partial(ck.cached_step, (kept, frozen), (x, y), ck.nt_xent, chunk=2)
    assert_same(gradients(step, one), wanted)
    assert len(calls) == 4 + 1


def test_memory_is_that_of_one_chunk():
    """Counts the elements that graphs hold at one time."""
    one, x, y = Encoder(), rows(1, 64), rows(2, 64)
    held, peaks = [0], []

    class Saved:
        def __init__(self, t: Tensor) -> None:
            self.t = t
            held[0] += t.numel()
            peaks.append(held[0])

        def __del__(self) -> None:
            held[0] -= self.t.numel()

    def peak(step: Callable[[], Any]) -> int:
        peaks.clear()
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.t):
            step()
        assert held == [0]
        return max(peaks)

    def encode() -> None:
        one(x[:4]).sum().backward()

    features = torch.randn(2, 64, D, dtype=DOUBLE).requires_grad_()
    of_loss = peak(lambda: ck.nt_xent(*features, backend="reference").backward())
    of_chunk = peak(encode)
    loss = partial(ck.nt_xent, backend="reference")
    step = partial(ck.cached_step, (one, one), (x, y), loss, chunk=4)
    assert peak(step) == max(of_loss, of_chunk)
    assert peak(lambda: one(x).sum().backward()) > 8 * of_chunk


class Stateful(nn.Module):
    """Gives somewhat other features from a call on."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.layer, self.left = nn.Linear(6, D).to(DOUBLE), last

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        return self.layer(x) * (1 if self.left >= 0 else 1.001)


def norm(**options) -> nn.Module:
    return nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D, **options)).to(DOUBLE)


def test_models_that_cannot_be_run_in_chunks():
    """Before a gradient is made; in evaluation a batch norm is what it is for each row."""
    x = rows(1)
    without = norm(track_running_stats=False).eval()
    for model in (norm(), without, nn.Sequential(nn.Linear(6, D), ck.Whitening(D)).to(DOUBLE)):
        for encoder in (model, lambda rows, model=model: model(rows), model.forward):
            with pytest.raises(RuntimeError, match="with (BatchNorm1d|Whitening) in training mode"):
                ck.cached_step((encoder, encoder), (x, x), ck.nt_xent, chunk=2)
        assert all(p.grad is None for p in model.parameters())
    model = norm().eval()
    wanted = plain(lambda: ck.nt_xent(model(x), model(2 * x)), model)
    step = partial(ck.cached_step, (model, model), (x, 2 * x), ck.nt_xent, chunk=2)
    assert_same(gradients(step, model), wanted)
    for last in (4, 7):  # of 4 chunks: the first of the second time, or only the last
        with pytest.raises(RuntimeError, match="must give the same features each time"):
            ck.cached_step((model, Stateful(last)), (x, x), ck.nt_xent, chunk=2)


def test_what_the_loss_returns_comes_without_a_graph():
    class Output(NamedTuple):
        loss: Tensor
        features: Tensor
        note: str

    out = ck.cached_step(
        Encoder(), rows(1), lambda t: Output(t.square().mean(), 2 * t, "a"), chunk=2
    )
    assert isinstance(out, Output) and out.note == "a"
    assert not (out.loss.requires_grad or out.features.requires_grad)


def test_what_does_not_fit():
    one, x = Encoder(), rows(1)
    nothing = Encoder(named=True)
    nothing.forward = lambda rows: (rows.sum(), rows)  # type: ignore[method-assign]
    step = partial(ck.cached_step, chunk=3)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: step(one, x, ck.sup_con, chunk=0), ValueError, "chunk must be .* got 0"),
        (lambda: step(one, x, ck.sup_con, chunk=True), ValueError, "chunk must be .* got True"),
        (lambda: step((one, one), x, None), ValueError, "a tuple of 2, one for each .*got Tensor"),
        (lambda: step((one, one), (x,), None), ValueError, "one for each model, got 1"),
        (lambda: step(3, x, None), TypeError, "model must be a module or a function, got int"),
        (lambda: step(one, [x, x[1:]], None), ValueError, r"got tensors of \[6, 7\] rows"),
        (lambda: step(one, "text", None), ValueError, "equally many rows, got no tensor"),
        (lambda: step(one, x.clone().requires_grad_() * 2, None), ValueError, "not have a graph"),
        (lambda: step(one, x, lambda f: f), ValueError, r"return a 0-d tensor, .* got \(7, 4\)"),
        (lambda: step(one, x, lambda f: 3.0), ValueError, "return a 0-d tensor, .* got float"),
        (lambda: step(nothing, x, None), ValueError, "0-d must be the same for every chunk"),
        (
            lambda: ck.cached_step(lambda t: (t, SCALE), x, None, chunk=1),
            ValueError,
            r"return 0-d what does not depend on the rows, as a learned scale: got shape \(1,\)",
        ),
        (lambda: step(lambda t: t[:2], x, None), ValueError, r"rows as it gets, .* got shape \(2"),
        (lambda: step(lambda t: [t, 3], x, None), ValueError, "rows as it gets, .* got int"),
        (
            lambda: step(2 * [Encoder(named=True)], (x, x), None),
            ValueError,
            "features of different names, got image_features twice",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    with torch.no_grad(), pytest.raises(RuntimeError, match="outside of torch.no_grad"):
        step(one, x, ck.sup_con)
    with pytest.raises(NotImplementedError, match="cached_step cannot be differentiated by torch"):
        torch.func.grad(lambda x: step(one, x, ck.koleo))(x)
