"""Peers as they are installed, with whatever torchvision comes with them."""

import pytest
import torch

from benchmarks.baselines.loading import declare_torchvision
from contrastive_kernels import integrations

declare_torchvision()


@pytest.fixture
def metric_learning_status():
    """patch_status knows the peers that were imported by patch."""
    integrations.unpatch("pytorch_metric_learning")


@pytest.fixture
def default_dtype_double():
    """Before 5.0 transformers makes causal masks for float64 in torch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
