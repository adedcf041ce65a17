"""solo-learn's functions against their definitions, written out densely."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conformance import assert_conforms, clustered
from oracles import randn

from contrastive_kernels.integrations import solo as fused

TEMPERATURES = [1.0, 0.07, 0.01]


def simclr(z, indexes, temperature):
    z = F.normalize(z, dim=1)
    logits = z @ z.T / temperature
    same = indexes[:, None] == indexes[None]
    positive = same & ~torch.eye(len(z), dtype=torch.bool)
    top = logits.masked_fill(~positive, -torch.inf).logsumexp(1)
    return (logits.masked_fill(same ^ positive, -torch.inf).logsumexp(1) - top).mean()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("indexes", [[*range(11)] * 2, [3, 1, 1, 7] * 5, [-5] * 3 + [9] * 2])
def test_simclr(indexes, temperature):
    indexes = torch.tensor(indexes)
    z = clustered(len(indexes), 6)
    assert_conforms(
        lambda z: fused.simclr_loss_func(z, indexes, temperature),
        lambda z: simclr(z, indexes, temperature),
        [z],
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n", [1, 5, 23])
def test_moco_v2(n, temperature):
    def definition(query, key, queue):
        logits = torch.cat(((query * key).sum(1, keepdim=True), query @ queue), 1) / temperature
        return -F.log_softmax(logits, 1)[:, 0].mean()

    unit = [F.normalize(clustered(n, 7, seed=seed), dim=1) for seed in (0, 1)]
    queue = F.normalize(randn(7, 31, seed=2), dim=0)
    assert_conforms(
        lambda *t: fused.mocov2plus_loss_func(*t, temperature), definition, [*unit, queue]
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n", [2, 23])
def test_in_batch_losses(n, temperature):
    def rows(query, key):
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
        return -F.log_softmax(logits, 1).diagonal().mean()

    inputs = [clustered(n, 7), clustered(n, 7, seed=1)]
    assert_conforms(lambda a, b: fused.nnclr_loss_func(a, b, temperature), rows, inputs)
    assert_conforms(
        lambda a, b: fused.mocov3_loss_func(a, b, temperature),
        lambda a, b: 2 * temperature * rows(a, b),
        inputs,
    )


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_moco_v3_gathers_keys_without_gradient(process_group):
    query, key = (t.requires_grad_() for t in (clustered(5, 7), clustered(5, 7, seed=1)))
    gradients = torch.autograd.grad(
        fused.mocov3_loss_func(query, key), (query, key), allow_unused=True
    )
    assert gradients[0].any() and gradients[1] is None


@pytest.mark.parametrize("simplified", [True, False])
def test_w_mse(simplified):
    def definition(z1, z2):
        z2 = z2.detach() if simplified else z2
        return 2 - 2 * F.cosine_similarity(z1, z2).mean()

    inputs = [clustered(9, 5), clustered(9, 5, seed=1)]
    assert_conforms(
        lambda a, b: fused.wmse_loss_func(a, b, simplified), definition, inputs, bfloat16=False
    )


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_whitening(eps):
    def definition(x):
        centered = x - x.mean(0)
        covariance = (1 - eps) * centered.T @ centered / (len(x) - 1) + eps * torch.eye(6).to(x)
        return centered @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T

    assert_conforms(fused.Whitening2d(6, eps), definition, [clustered(19, 6)], bfloat16=False)
