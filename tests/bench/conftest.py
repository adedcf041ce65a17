"""Benchmarks that take no time."""

import pytest
import torch

from benchmarks import run
from benchmarks.harness import measure


@pytest.fixture
def short(monkeypatch):
    """One thread, few rounds, and a made-up rate of matrix products: the rate."""
    rate = 1e11
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(measure, "FULL", measure.Effort(0.0, 5))
    monkeypatch.setattr(run, "gemm_flops", lambda dtype: rate)
    yield rate
    torch.set_num_threads(threads)
