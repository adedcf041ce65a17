"""Sweeps of every kind of keys, their statistics and gradients, and how far apart two may be."""

from __future__ import annotations

import oracles
import pytest
import torch

INFINITY = float("inf")
FUSED = [name for name in oracles.BACKENDS if name != "reference"]
KINDS = ["shared", "self", "paired"]


def make_case(kind: str, sizes: tuple[int, int, int], seed: int = 0):
    """x, y (None for self), and ids of a few values, so that pairs are dropped everywhere."""
    rows, keys, d = sizes
    x = oracles.randn(rows, d, seed=seed)
    if kind == "self":
        ids = torch.randint(0, 4, (rows,), generator=oracles.generator(seed + 1))
        return x, None, (ids, ids)
    y = oracles.randn(*((rows, keys, d) if kind == "paired" else (keys, d)), seed=seed + 2)
    make_ids = (torch.randint(0, 4, (n,), generator=oracles.generator(n)) for n in (rows, keys))
    return x, y, tuple(make_ids)


def run(function, x, y, scale, bias, dtype, **options):
    """Statistics, and gradients of every input for random upstream gradients."""
    inputs = [t.to(dtype).requires_grad_() for t in (x, y) if t is not None]
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    bias = None if bias is None else bias.clone().requires_grad_()
    out = function(
        inputs[0], inputs[1] if y is not None else None, scale=scale, bias=bias, **options
    )
    counts = {} if out.counts is None else out.counts._asdict()
    fields = {**out._replace(counts=None)._asdict(), **counts}
    fields = {k: v for k, v in fields.items() if v is not None}
    loss = 0.0
    for k, value in enumerate(fields.values()):
        if value.requires_grad:
            weight = oracles.randn(*value.shape, seed=k + 50)
            loss = loss + (value.masked_fill(value == -INFINITY, 0.0).double() * weight).sum()
    leaves = [*inputs, scale] + ([] if bias is None else [bias])
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(grads, leaves, strict=True)
    grads = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in pairs]
    return {k: v.detach() for k, v in fields.items()}, grads


def assert_close(actual, expected, tolerance: float, what: str) -> None:
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape, what
    assert torch.equal(actual == -INFINITY, expected == -INFINITY), f"{what}: other empty rows"
    actual, expected = (t.masked_fill(t == -INFINITY, 0.0) for t in (actual, expected))
    error = (actual - expected).abs().max().item()
    size = max(1.0, expected.abs().max().item())
    assert error <= tolerance * size, f"{what}: error {error:.2e} of {size:.2e}"


needs_fused = pytest.mark.skipif(not FUSED, reason="no fused backend is built here")
