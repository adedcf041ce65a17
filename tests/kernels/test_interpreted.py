"""Triton's interpreter as the tests prepare it computes what it computes as it comes."""

import oracles
import pytest
from fresh import run_python

PROGRAM = """
import interpreted
import torch
from oracles import randn

import sweeps
from contrastive_kernels import ops

x, y = (randn(n, 20, seed=n).requires_grad_() for n in (33, 70))
ids = torch.arange(33) % 5, torch.arange(70) % 7


def run():
    results = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out = sweeps.sweep(
            x.to(dtype), y.to(dtype), scale=3.0, exclude=ids, normalize=True, mean=True,
            columns=True, backend="triton",
        )
        values = [out.lse, out.mean, out.col_lse, out.col_mean]
        results += [*values, *torch.autograd.grad(sum(t.sum() for t in values), (x, y))]
    return results


before = run()
interpreted.prepare_once()
assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))
"""


@pytest.mark.skipif(oracles.DEVICE != "cpu", reason="kernels are not interpreted here")
@pytest.mark.skipif("triton" not in oracles.BACKENDS, reason="Triton is not usable")
def test_equal_bits():
    run_python(PROGRAM)
