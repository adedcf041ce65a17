"""Negatives in arrays of other libraries: numpy, and what reads a file by slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_sources import LOSSES, D, assert_same, keys, leaves


class Stored:
    """What h5py and zarr have of an array: its rows by slices."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.array[rows]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["memory", "read only", "memmap", "stored"])
def test_arrays_of_other_libraries(name, dtype, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("contrastive_kernels.sources.CHUNK_BYTES", 20 * D * dtype.itemsize)
    array = keys(dtype).numpy()
    if kind == "read only":
        array.flags.writeable = False
    if kind == "memmap":
        array.tofile(tmp_path / "keys")
        array = np.memmap(tmp_path / "keys", array.dtype, "r", shape=array.shape)
    inputs = leaves(torch.float64 if dtype == torch.float64 else torch.float32)
    results = []
    for negatives in (Stored(array) if kind == "stored" else array, keys(dtype)):
        value = LOSSES[name](*inputs, negatives)
        results.append([value, *torch.autograd.grad(value, inputs, allow_unused=True)[:2]])
    assert_same(*results, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_arrays_that_do_not_fit(name):
    inputs = leaves()
    with pytest.raises(TypeError, match="negatives must be float32, .* got int32"):
        LOSSES[name](*inputs, np.ones((4, D), np.int32))
    with pytest.raises(ValueError, match=r"an array must have shape \(M, D\), got \(4,\)"):
        LOSSES[name](*inputs, np.ones(4))
