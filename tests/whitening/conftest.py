"""Both ways in which operators of whitening compute."""

from __future__ import annotations

import pytest

from contrastive_kernels.whitening import operators


@pytest.fixture(params=["kernel", "batched torch"])
def path(request, monkeypatch):
    """With the compiled kernels, and without."""
    if request.param == "batched torch":
        monkeypatch.setattr(operators, "CPU_ERROR", "left out by a test")
        monkeypatch.setattr(operators, "cuda", None)
