"""What the tests of pytorch-metric-learning's losses share. The package must be there."""

from __future__ import annotations

import pytest
import torch
from conformance import assert_conforms
from oracles import generator
from pytorch_metric_learning import losses as peer

from contrastive_kernels import integrations
from contrastive_kernels.integrations import pytorch_metric_learning as fused

losses = pytest.mark.parametrize("name", ("NTXentLoss", "SupConLoss"))


def labels_of(n: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, (n,), generator=generator(seed))


def conform(loss_of, inputs, **options) -> None:
    """loss_of(module) with this package's and with the peer's classes; all calls ran fused."""
    before = fallbacks()
    assert_conforms(loss_of(fused), loss_of(peer), inputs, **options)
    assert fallbacks() == before


def fallbacks() -> dict:
    status = integrations.patch_status().get("pytorch_metric_learning", {})
    return {name: swap.fallback for name, swap in status.items()}
