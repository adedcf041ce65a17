"""The Whitening layer: batches, running statistics, evaluation, and what it keeps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracles import DOUBLE, randn
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference

METHODS = ["cholesky", "zca", "newton_schulz"]


def correlated(n: int, seed: int = 0, dim: int = 4) -> Tensor:
    return randn(n, dim, seed=seed) @ randn(dim, dim, seed=100) + 3.0


def layer(**options) -> ck.Whitening:
    return ck.Whitening(4, dtype=DOUBLE, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", [None, 8])
def test_training_whitens_the_batch_or_its_groups(method, group_size):
    x = correlated(24).requires_grad_()
    z = layer(method=method, group_size=group_size, eps=0.01)(x)
    groups = x.view(-1, group_size or 24, 4)
    expected = reference.whiten(groups, method=method, eps=0.01).view(24, 4)
    torch.testing.assert_close(z, expected)
    upstream = randn(24, 4, seed=1)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (z, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum):
    whitening = layer(momentum=momentum)
    mean, covariance = torch.zeros(4, dtype=DOUBLE), torch.eye(4, dtype=DOUBLE)
    for step in range(3):
        x = correlated(10, seed=step)
        whitening(x)
        weight = momentum or 1 / (step + 1)
        mean = (1 - weight) * mean + weight * x.mean(0)
        covariance = (1 - weight) * covariance + weight * x.T.cov()
    torch.testing.assert_close(whitening.running_mean, mean)
    torch.testing.assert_close(whitening.running_covariance, covariance)
    assert whitening.num_batches_tracked == 3
    whitening.reset_running_stats()
    assert whitening.num_batches_tracked == 0 and (whitening.running_mean == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_whitens_with_the_running_statistics(method):
    whitening = layer(method=method, momentum=None, eps=0.01, iterations=20)
    x = correlated(50)
    z = whitening(x)
    whitening.eval()
    # the only batch so far: what it was in training
    torch.testing.assert_close(whitening(x), z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whitening(x[:1]), z[:1], rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(whitening, correlated(3, seed=1).requires_grad_())


def changed_in_place(whitening: ck.Whitening) -> ck.Whitening:
    whitening.running_covariance.mul_(4.0)
    return whitening


def loaded(whitening: ck.Whitening) -> ck.Whitening:
    state = whitening.state_dict()
    whitening.load_state_dict(state | {"running_covariance": 4 * state["running_covariance"]})
    return whitening


def replaced(whitening: ck.Whitening) -> ck.Whitening:
    whitening.running_covariance = 4 * whitening.running_covariance
    return whitening


def copied(whitening: ck.Whitening) -> ck.Whitening:
    whitening = copy.deepcopy(whitening)
    return changed_in_place(whitening)


@pytest.mark.parametrize("change", [changed_in_place, loaded, replaced, copied])
def test_evaluation_sees_changed_statistics(change):
    whitening = layer(momentum=None, eps=0.0)
    x = correlated(50)
    whitening(x)
    whitening.eval()
    before = whitening(x)
    assert whitening._running_matrix() is whitening._running_matrix()  # kept
    torch.testing.assert_close(change(whitening)(x), before / 2)


def test_state_dict_round_trip():
    whitening = layer(affine=True)
    whitening(correlated(20))
    names = {"running_mean", "running_covariance", "num_batches_tracked", "weight", "bias"}
    assert set(whitening.state_dict()) == names
    whitening.eval()
    x = correlated(5, seed=3)
    fresh = layer(affine=True).eval()
    fresh.load_state_dict(whitening.state_dict())
    assert torch.equal(fresh(x), whitening(x))
    assert torch.equal(pickle.loads(pickle.dumps(whitening))(x), whitening(x))


def test_without_running_statistics_evaluation_uses_the_batch():
    whitening = layer(track_running_stats=False)
    assert not whitening.state_dict()
    x = correlated(20)
    assert torch.equal(whitening(x), whitening.eval()(x))


def test_scale_and_shift_are_learned():
    whitening = layer(affine=True)
    x = correlated(20)
    plain = layer()(x)
    assert torch.equal(whitening(x), plain)
    with torch.no_grad():
        whitening.weight.copy_(torch.arange(4.0))
        whitening.bias.fill_(2.0)
    y = whitening(x)
    torch.testing.assert_close(y, plain * torch.arange(4.0) + 2.0)
    y.sum().backward()
    torch.testing.assert_close(whitening.weight.grad, plain.sum(0), atol=1e-9, rtol=0)


def test_images_are_whitened_over_positions():
    x = randn(3, 4, 5, 2)
    y = layer()(x)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 4)
    torch.testing.assert_close(y.permute(0, 2, 3, 1).reshape(-1, 4), layer()(rows))
    assert y.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train", [True, False])
def test_half_inputs_come_back_in_half_and_are_computed_in_float(dtype, train):
    whitening = ck.Whitening(4).train(train)
    x = correlated(20).to(dtype)
    y = whitening(x)
    assert y.dtype == dtype
    exact = ck.Whitening(4).train(train)(x.float())
    assert torch.equal(y, exact.to(dtype))


def test_under_autocast_and_compiled():
    x = correlated(20).float()
    expected = ck.Whitening(4)(x)
    device = x.device.type
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(ck.Whitening(4)(x), expected)
    whitening = ck.Whitening(4)
    compiled = torch.compile(whitening, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    eager = copy.deepcopy(whitening).eval()(x)
    whitening.eval()
    torch.testing.assert_close(compiled(x), eager)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_features": 0}, "num_features must be at least 1, got 0"),
        ({"method": "pca"}, "method must be one of cholesky, zca, newton_schulz, got 'pca'"),
        ({"group_size": 1}, "group_size must be at least 2, got 1"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\] or None, got 1.5"),
        ({"eps": 1.0}, r"eps must be a finite number in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ck.Whitening(**({"num_features": 4} | options))


def test_bad_input():
    for shape in ((4,), (8, 5), (8,)):
        with pytest.raises(ValueError, match=r"x must have shape \(N, 4, \.\.\.\), got"):
            layer()(randn(*shape))
    with pytest.raises(ValueError, match="group_size must divide the 20 rows, got 8"):
        layer(group_size=8)(randn(20, 4))
    with pytest.raises(ValueError, match="n must be above D = 4"):
        layer()(randn(1, 4))
    with pytest.raises(ValueError, match="group 0 of 1 is not positive definite"):
        layer(eps=0.0)(torch.ones(8, 4, dtype=DOUBLE))
        ck.check_whitening()
