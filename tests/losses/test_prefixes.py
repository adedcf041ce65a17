"""Losses at several prefixes of the features: arguments, and who is called."""

from __future__ import annotations

import pytest
import torch
from loss_calls import inputs, ours
from oracles import BACKENDS, DOUBLE, assert_equal_in_double, assert_within_budget, randn
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.losses import nested as prefixes


def guide(n: int) -> list[Tensor]:
    return [randn(n, 4, seed=s).float() for s in (5, 6)]


LOSSES = {
    "info_nce": lambda x, y, **o: ck.info_nce(x, y, **o),
    "clip_loss": lambda x, y, **o: ck.clip_loss(x, y, 14.0, **o),
    "siglip_loss": lambda x, y, **o: ck.siglip_loss(x, y, 10.0, -10.0, **o),
    "mnrl": lambda x, y, **o: ck.mnrl(x, [y, y.flip(0)], **o),
    "nt_xent": lambda x, y, **o: ck.nt_xent(x, y, **o),
    "gist": lambda x, y, **o: ck.gist(x, y, *guide(len(x)), **o),
}
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built here")
parametrize_losses = pytest.mark.parametrize("loss", LOSSES)


@pytest.mark.parametrize(
    ("dims", "weights", "error", "message"),
    [
        ((), None, ValueError, "dims must have at least one entry"),
        ((0, 3), None, ValueError, r"dims must be from 1 to the 6 features of .*, got \(0, 3\)"),
        ([3, 7], None, ValueError, r"dims must be from 1 to the 6 features of .*, got \[3, 7\]"),
        ((3, 3), None, ValueError, "dims must differ"),
        (3, None, TypeError, "dims must be a sequence of whole numbers, got 3"),
        ((3.0,), None, TypeError, "dims must be a sequence of whole numbers"),
        (None, (1.0,), ValueError, "weights needs dims"),
        ((3, 2), (1.0,), ValueError, "weights must be as many as dims, 2, got 1"),
        ((3,), (float("nan"),), ValueError, "weights must be a finite number"),
        ((3,), torch.ones(1), TypeError, "weights must be a sequence of numbers, got Tensor"),
    ],
)
@parametrize_losses
def test_errors(loss, dims, weights, error, message):
    with pytest.raises(error, match=message):
        LOSSES[loss](randn(4, 6), randn(4, 6, seed=1), dims=dims, weights=weights)


@parametrize_losses
def test_other_errors_are_those_of_the_loss(loss):
    with pytest.raises(ValueError, match="the same number of features D, got 6 and 5"):
        LOSSES[loss](randn(4, 6), randn(4, 5), dims=(3,))
    with pytest.raises(TypeError, match="must be a tensor"):
        LOSSES[loss]([1.0], randn(4, 5), dims=(3,))


@parametrize_losses
def test_statistics_are_those_of_the_longest(loss):
    x, y = randn(9, 6), randn(9, 6, seed=1)
    value, stats = LOSSES[loss](x, y, dims=(2, 5), return_stats=True)
    torch.testing.assert_close(value, LOSSES[loss](x, y, dims=(5, 2)), rtol=1e-12, atol=0)
    _, alone = LOSSES[loss](x[:, :5], y[:, :5], return_stats=True)
    torch.testing.assert_close(stats, alone)


@needs_cpu
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "gist"])
def test_one_sweep_serves_all(loss, monkeypatch):
    """Of a batch on the CPU; what differs in nothing but `can_nest` agrees to the last digits."""
    x, y = randn(40, 12, dtype=torch.float32), randn(40, 12, seed=1, dtype=torch.float32)
    x.requires_grad_()

    def gradient():
        value = LOSSES[loss](x, y, dims=(3, 12, 7), weights=(1, 2, 3), backend="cpu")
        return value, *torch.autograd.grad(value, x), value.grad_fn

    *fused, node = gradient()
    names, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [following for following, _ in node.next_functions if following is not None]
    slices = {name for name in names if "Slice" in name}
    assert not slices
    monkeypatch.setattr(prefixes, "can_nest", lambda *given: False)
    torch.testing.assert_close(fused, list(gradient()[:2]), rtol=2e-5, atol=1e-6)


@parametrize_losses
def test_gradients_of_a_transform(loss):
    x, y = randn(7, 5), randn(7, 5, seed=1)
    given = {"dims": (2, 5), "weights": (1.0, 0.5)}
    taken = torch.func.grad(lambda t: LOSSES[loss](t, y, **given))(x)
    leaf = x.clone().requires_grad_()
    LOSSES[loss](leaf, y, **given).backward()
    torch.testing.assert_close(taken, leaf.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_margin_and_chunks(symmetric):
    """Of the negatives that are left, and of those that come without gradient."""
    own, other = torch.arange(7) % 4, torch.arange(7) % 3
    given = [randn(7, 5), randn(7, 5, seed=1)]
    options = {"dims": (5, 2), "weights": (1.0, 0.5), "alpha": 9.0, "reduction": "none"}
    more = options | {"symmetric": symmetric, "exclude": (own, other)}
    assert_equal_in_double(
        lambda q, k: ck.info_nce(q, k, **more), lambda q, k: reference.info_nce(q, k, **more), given
    )
    negatives = randn(11, 5, seed=2)
    for chunks in (list(negatives.split(4)), negatives.numpy()):
        assert_equal_in_double(
            lambda q, k, c=chunks: ck.info_nce(q, k, negatives=c, **options),
            lambda q, k: reference.info_nce(q, k, negatives=negatives, **options),
            given,
        )


def test_forward_mode_and_modules():
    x, y, direction = randn(7, 5), randn(7, 5, seed=1), randn(7, 5, seed=2)
    module = ck.CLIPLoss(dims=(5, 3))

    def call(t):
        return module(t, y, 14.0)

    _, slope = torch.func.jvp(call, (x,), (direction,))
    wanted = (torch.func.grad(call)(x) * direction).sum()
    torch.testing.assert_close(slope, wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_usual_sizes(dtype):
    """Logits that are kept, several blocks of rows and keys, temperature 0.01."""
    dims = (96, 64, 32, 16)
    x = randn(300, 96).to(dtype)
    y = (x + 0.7 * randn(300, 96, seed=1)).to(dtype)
    for scale in (20.0, 100.0):
        assert_within_budget(
            lambda q, d, s=scale: ck.mnrl(q, d, scale=s, dims=dims, reduction="none"),
            lambda q, d, s=scale: reference.mnrl(q, d, scale=s, dims=dims, reduction="none"),
            [x, y],
            slack=64 + 4 * scale,
        )


def test_features_beyond_the_longest_get_no_gradient():
    x, y = randn(7, 5).requires_grad_(), randn(7, 5, seed=1)
    ck.nt_xent(x, y, dims=(3, 2)).backward()
    assert (x.grad[:, 3:] == 0).all() and (x.grad[:, :3] != 0).all()


def test_compiled_once_for_all_sizes():
    call = torch.compile(ours("clip_loss nested"), fullgraph=True, dynamic=True, backend="eager")
    for n in (13, 17):
        given = inputs("clip_loss nested", DOUBLE, N=n)
        torch.testing.assert_close(call(*given), ours("clip_loss nested")(*given))
