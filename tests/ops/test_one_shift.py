"""Gradients of statistics of rows and columns, which share an exponential unless some sums are too
small for their common shift."""

import pytest
import sweeps
import torch
import torch.nn.functional as F
from oracles import BACKENDS, assert_within_budget, randn
from torch import Tensor

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built here")


def run(kind: str, scale: float, x: Tensor, y: Tensor, backend: str) -> Tensor:
    options = {"scale": scale, "normalize": True, "backend": backend, "mean": kind == "means"}
    if kind == "same":
        ids = torch.arange(len(x))
        return sweeps.sweep(x, None, exclude=(ids, ids), **options).lse
    out = sweeps.sweep(x, y, columns=True, **options)
    means = [out.mean, out.col_mean] if kind == "means" else []
    return torch.cat([t for t in (out.lse, out.col_lse, *means) if t is not None])


@pytest.mark.parametrize("opposite", [False, True], ids=["shared", "far_below"])
@pytest.mark.parametrize("scale", [2.0, 110.0])
@pytest.mark.parametrize("kind", ["columns", "means", "same"])
def test_gradients(kind, scale, opposite):
    """`far_below`: some rows and some columns have logits near -scale alone."""
    common = F.normalize(randn(1, 40, seed=1), dim=1)
    x, y = (common + 0.02 * randn(n, 40, seed=n) for n in (75, 130))
    if opposite:
        x[:3] *= -1
    inputs = [x] if kind == "same" else [x, y]

    def call(backend):
        return lambda *t: run(kind, scale, t[0], t[-1], backend)

    assert_within_budget(call("cpu"), call("reference"), [t.float() for t in inputs])
