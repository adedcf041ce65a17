"""What holds exactly, up to the rounding of float64 sums, and inputs to see it on."""

import torch
import torch.nn.functional as F
from oracles import DOUBLE, generator

# sums of a few hundred float64 terms
TOLERANCE = dict(rtol=1e-12, atol=1e-12)


def randn(*shape, seed=0, grad=False):
    x = torch.randn(shape, dtype=DOUBLE, generator=generator(seed))
    return x.requires_grad_(grad)


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=-1)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def assert_same_with_grad(actual, expected, inputs):
    """Equal values and equal gradients under one random upstream gradient."""
    assert_same(actual, expected)
    upstream = randn(*actual.shape, seed=99)
    assert_same(
        torch.autograd.grad(actual, inputs, upstream, retain_graph=True),
        torch.autograd.grad(expected, inputs, upstream, retain_graph=True),
    )


N, D = 5, 4
INPUTS = (randn(N, D, grad=True), randn(N, D, seed=1, grad=True))
