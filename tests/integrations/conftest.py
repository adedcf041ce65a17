"""Peers as they are installed, with whatever torchvision comes with them."""

import pytest

from benchmarks.baselines.loading import declare_torchvision
from contrastive_kernels import integrations

declare_torchvision()


@pytest.fixture
def metric_learning_status():
    """patch_status knows the peers that were imported by patch."""
    integrations.unpatch("pytorch_metric_learning")
