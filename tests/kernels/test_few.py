"""Every loss where a launch counts for more than products, which on GPUs is so for small batches:
sweeps of rows and columns in one launch, positives where features are packed."""

from __future__ import annotations

import sys

import oracles
import pytest
import torch
from loss_calls import FIRST, backends, by_rows, dense, inputs, ours

from contrastive_kernels.backends import LAUNCH_BOUND, are_few
from contrastive_kernels.losses.table import CASES

pytestmark = pytest.mark.skipif("triton" not in oracles.BACKENDS, reason="no Triton here")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(sys.modules[are_few.__module__], "FEW_PRODUCTS", LAUNCH_BOUND)


def meets_another_path(name: str) -> bool:
    """The first case of a loss, and what a positive or a mask is beside it."""
    _, case = CASES[name]
    return name in FIRST.values() or bool({"bias", "mask", "ids"} & {*name.split(), *kinds(case)})


def kinds(case) -> set[str]:
    return {given.kind for given in case.inputs.values()}


@pytest.mark.parametrize(
    "name", [name for name in CASES if "triton" in backends(name) and meets_another_path(name)]
)
def test_losses_of_few_pairs(few, name):
    found, wanted = [], []
    for function, made in ((ours(name, backend="triton", reduction=by_rows(name)), found),
                           (dense(name, reduction=by_rows(name)), wanted)):  # fmt: skip
        given = inputs(name)
        leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
        value = function(*given)
        made += [value, *torch.autograd.grad(value, leaves, oracles.randn(*value.shape, seed=3))]
    for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
        error = (a - b).norm() / b.norm().clamp(min=1.0)
        assert error <= 1e-10, f"output {k}: {error:.1e}"
