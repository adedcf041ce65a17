"""Files of negatives, written from batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..types import FLOATS, known
from .layout import Layout, layout_path, read_layout, write_layout


def write_negatives(
    path: str | os.PathLike[str],
    batches: Iterable[Tensor] | Callable[[int], Iterable[Tensor]],
    *,
    dtype: torch.dtype | None = None,
    append: bool = False,
) -> int:
    """Writes the file of a `FileNegatives`, batch by batch, and `path`.json with its dim and dtype.

    With `append=True` and a function a run that was killed goes on where it stopped: half a row at
    the end is cut off, the function is called with the number of whole rows that are there, and
    gives those that follow. The same call starts a file and resumes it.

    Args:
        path: the file; not a .npy file.
        batches: tensors (m, D), any m, on any device; or a function of the number of rows that
            the file has, which gives them.
        dtype: of the file: float32, float64, bfloat16 or float16; by default that of the file, or
            of the first batch.
        append: whether rows may be there already, before those of the batches.

    Returns:
        The number of rows in the file.

    Raises:
        FileExistsError: there is such a file, and `append` is False.
        TypeError, ValueError: batches that do not fit one another or the file; no rows at all.
        RuntimeError: another process is writing the file.
    """
    path = os.fspath(path)
    if path.endswith(".npy"):
        raise ValueError(f"path must be a file of rows alone, got {path}")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    with open(path, "ab" if append else "xb", buffering=0) as file:
        _lock(file, path)
        try:
            _add(file, path, batches, dtype)
        finally:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                os.remove(path)
    if size == 0:
        raise ValueError("batches must have at least one row, got none")
    return size // known(read_layout(path)).row_bytes


def _add(file: Any, path: str, batches: Any, dtype: torch.dtype | None) -> None:
    """The batches behind the whole rows of a file."""
    layout, rows = None, 0
    size = os.fstat(file.fileno()).st_size
    if size:
        layout = read_layout(path)
        if layout is None:
            raise ValueError(
                f"{path} has rows, and no {layout_path(path)} says what they are: write "
                '{"dim": D, "dtype": "float32"} there, or start another file'
            )
        if dtype not in (None, layout.dtype):
            raise ValueError(f"dtype must be that of {path}, {layout.dtype}, got {dtype}")
        rows = size // layout.row_bytes
        file.truncate(rows * layout.row_bytes)
    told = layout is not None
    for batch in batches(rows) if callable(batches) else batches:
        found = _layout_of(batch, dtype if layout is None else layout.dtype)
        layout = layout or found
        if found != layout:
            raise ValueError(f"batches must have rows as those of {path}, {layout}, got {found}")
        if not told and len(batch):
            write_layout(path, layout)
            told = True
        _write(file, batch, layout.dtype)
    os.fsync(file.fileno())


def _layout_of(batch: Any, dtype: torch.dtype | None) -> Layout:
    if not isinstance(batch, Tensor) or batch.dtype not in FLOATS:
        got = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"batches must be tensors of floating point numbers, got {got}")
    if batch.dim() != 2 or batch.shape[1] == 0:
        raise ValueError(f"batches must have shape (m, D), got {tuple(batch.shape)}")
    return Layout(batch.shape[1], batch.dtype if dtype is None else dtype)


def _write(file: Any, batch: Tensor, dtype: torch.dtype) -> None:
    batch = batch.detach().to("cpu", dtype).contiguous()
    data = memoryview(batch.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
    while len(data):
        data = data[file.write(data) :]


def _lock(file: Any, path: str) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"another process is writing {path}") from None
