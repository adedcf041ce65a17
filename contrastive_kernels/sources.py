"""Negatives (M, D) that come in chunks, so that M may exceed the memory: from a file, a list of
tensors, or any object that is a `NegativeSource`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .types import FLOATS

if TYPE_CHECKING:
    from typing_extensions import TypeIs

CHUNK_BYTES = 2**25


class NegativeSource(Protocol):
    """What `negatives=` takes beside tensors: keys without gradient that are read chunk by chunk.

    Each `iter()` starts again and yields tensors (m_i, D) of `dtype` on any device, M rows in all,
    always in the same order; a chunk may have no rows, and is used before the next one is asked
    for, so that all may share one buffer.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(M, D)."""

    @property
    def dtype(self) -> torch.dtype: ...

    def __iter__(self) -> Iterator[Tensor]: ...


class FileNegatives:
    """Rows of a file as negatives, read chunk by chunk into one buffer.

    The file holds M rows of D numbers in the byte order of the machine and nothing else, as
    `tensor.view(torch.uint8).numpy().tofile(path)` writes them; or it is a .npy file, which knows
    its dim and dtype. It is opened for each pass, and while a chunk is used the system is asked to
    read the next.

    Args:
        path: the file; a name that ends in .npy is a NumPy file.
        dim: D.
        dtype: float32, float64, bfloat16 or float16.
        chunk_rows: rows of a chunk; by default those of 32 MiB.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: a file that does not hold rows of this dim and dtype.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dim: int | None = None,
        dtype: torch.dtype | None = None,
        *,
        chunk_rows: int | None = None,
    ) -> None:
        self.path = os.fspath(path)
        size = os.stat(self.path).st_size
        self._offset = 0
        if self.path.endswith(".npy"):
            found, self._offset = _read_npy_header(self.path)
            for name, given, held in (("dim", dim, found[0]), ("dtype", dtype, found[1])):
                if given not in (None, held):
                    raise ValueError(f"{name} must be that of {self.path}, {held}, got {given}")
            dim, dtype = found
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be a whole number > 0, got {dim}")
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
        self._row_bytes = dim * dtype.itemsize
        if chunk_rows is None:
            chunk_rows = max(1, CHUNK_BYTES // self._row_bytes)
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
        rows, rest = divmod(size - self._offset, self._row_bytes)
        if rows == 0 or rest != 0:
            raise ValueError(
                f"path must be a file of whole rows of {self._row_bytes} bytes (dim={dim}, "
                f"dtype={dtype}), at least one, got {self.path} of {size} bytes"
            )
        self.dtype, self.shape = dtype, (rows, dim)
        self.chunk_rows = min(chunk_rows, rows)

    def __iter__(self) -> Iterator[Tensor]:
        rows, dim = self.shape
        buffer = memoryview(bytearray(self.chunk_rows * self._row_bytes))
        # unbuffered: straight into the chunk, and no page of the file counts as ours
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._offset)
            for start in range(0, rows, self.chunk_rows):
                count = min(self.chunk_rows, rows - start)
                part = buffer[: count * self._row_bytes]
                _fill(part, file, self.path)
                _read_ahead(file.fileno(), file.tell(), len(buffer))
                yield torch.frombuffer(part, dtype=self.dtype).view(count, dim)

    def __repr__(self) -> str:
        return f"FileNegatives({self.path!r}, shape={self.shape}, dtype={self.dtype})"


class _Listed:
    """Tensors (m_i, D), one after the other."""

    def __init__(self, name: str, chunks: Sequence[Tensor]) -> None:
        wrong = [type(t).__name__ for t in chunks if not isinstance(t, Tensor)]
        if wrong or not chunks:
            raise TypeError(f"{name} must be tensors, got {wrong[0] if wrong else 'an empty list'}")
        for t in chunks:
            if t.dim() != 2 or t.shape[1] != chunks[0].shape[-1] or t.dtype != chunks[0].dtype:
                raise ValueError(
                    f"{name} in a list must have shapes (m_i, D) and one dtype, got "
                    f"{tuple(chunks[0].shape)} {chunks[0].dtype} and {tuple(t.shape)} {t.dtype}"
                )
        self.chunks, self.dtype = chunks, chunks[0].dtype
        self.shape = sum(len(t) for t in chunks), chunks[0].shape[1]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.chunks)


class _Array:
    """An array (M, D) of another library, as numpy.memmap, h5py and zarr have it: its rows are read
    by slices."""

    def __init__(self, array: Any, dtype: torch.dtype) -> None:
        self.array, self.dtype = array, dtype
        self.shape = tuple(array.shape)

    def __iter__(self) -> Iterator[Tensor]:
        rows, dim = self.shape
        count = max(1, CHUNK_BYTES // (dim * self.dtype.itemsize))
        for start in range(0, rows, count):
            chunk = self.array[start : start + count]
            if not (getattr(chunk, "flags", None) is None or chunk.flags.writeable):
                chunk = chunk.copy()  # torch has no tensors that are read only
            yield torch.as_tensor(chunk)


def is_source(keys: Any) -> TypeIs[NegativeSource]:
    """Whether keys come in chunks; a tensor has all of the protocol, and is none."""
    if keys is None or isinstance(keys, Tensor):
        return False
    # what torch.compile can trace, as it cannot isinstance() of a protocol
    return all(hasattr(keys, name) for name in ("shape", "dtype", "__iter__"))


def as_source(name: str, keys: Any) -> Tensor | NegativeSource:
    """Tensors and sources as they are, a list of tensors or an array as a source.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if isinstance(keys, list | tuple):
        return _Listed(name, keys)
    dtype = getattr(keys, "dtype", None)
    if dtype is not None and not isinstance(dtype, torch.dtype) and hasattr(keys, "__getitem__"):
        known = {str(d).removeprefix("torch."): d for d in FLOATS}
        if str(dtype) not in known:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {dtype}")
        if len(keys.shape) != 2:
            raise ValueError(
                f"{name} in an array must have shape (M, D), got {tuple(keys.shape)}: pass a tensor"
            )
        return _Array(keys, known[str(dtype)])
    if not (isinstance(keys, Tensor) or is_source(keys)):
        raise TypeError(
            f"{name} must be a tensor, an array, a list of tensors or a NegativeSource, "
            f"got {type(keys).__name__}"
        )
    return keys


def _fill(buffer: memoryview, file: Any, path: str) -> None:
    while len(buffer):
        got = file.readinto(buffer)  # at most 2 GB, or less after a signal
        if not got:
            raise ValueError(f"{path} is shorter than it was: it lacks {len(buffer)} bytes")
        buffer = buffer[got:]


def _read_ahead(file: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)


def _read_npy_header(path: str) -> tuple[tuple[int, torch.dtype], int]:
    """((dim, dtype), where the numbers begin)."""
    import numpy as np

    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, column_major, dtype = read(file)
        known = {np.dtype(str(d).removeprefix("torch.")): d for d in FLOATS if d != torch.bfloat16}
        if len(shape) != 2 or column_major or dtype not in known:
            order = "column" if column_major else "row"
            raise ValueError(
                "path must hold an array (M, D) of float32, float64 or float16, row by row, got "
                f"{path}: shape {shape}, {dtype}, {order} by {order}"
            )
        return (shape[1], known[dtype]), file.tell()
