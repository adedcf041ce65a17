"""Few rows against many keys: each thread has a part of the keys and its own sums of the rows."""

from __future__ import annotations

import oracles
import pytest
import sweeps
import torch
from sweep_cases import FUSED, assert_close, run

from contrastive_kernels import reference

pytestmark = pytest.mark.skipif("cpu" not in FUSED, reason="the cpu backend is not built here")


@pytest.fixture(params=[3, 8])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", [(1, 1, 3), (1, 700, 5), (65, 1000, 8), (150, 257, 4)])
@pytest.mark.parametrize("size", [1.0, 300.0])  # with one shift, and by the largest logits
def test_rows_and_columns(threads, sizes, size):
    rows, keys, d = sizes
    x, y = oracles.randn(rows, d, seed=1) * size, oracles.randn(keys, d, seed=2)
    bias = oracles.randn(keys, seed=3)
    ids = tuple(torch.arange(n) % 5 for n in (rows, keys))
    options = {"exclude": ids, "mean": True, "columns": True}
    given = (x, y, 1.5, bias, torch.float64)
    expected, expected_grads = run(reference.sweep, *given, **options)
    for _ in range(2):
        out, grads = run(sweeps.sweep, *given, **options, backend="cpu")
        for name, value in expected.items():
            assert_close(out[name], value, 1e-11, name)
        for a, b in zip(grads, expected_grads, strict=True):
            assert_close(a, b, 1e-9, "gradient")


def test_equal_bits_each_time(threads):
    x, y = oracles.randn(70, 6, seed=1).float(), oracles.randn(3000, 6, seed=2).float()
    first, again = (
        run(
            sweeps.sweep,
            x,
            y,
            9.0,
            None,
            torch.float32,
            columns=True,
            normalize=True,
            backend="cpu",
        )
        for _ in range(2)
    )
    for a, b in zip((*first[0].values(), *first[1]), (*again[0].values(), *again[1]), strict=True):
        assert torch.equal(a, b)
