"""Files of rows, read chunk by chunk as negatives."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..types import FLOATS
from .layout import Layout, read_layout, read_npy_header

T = TypeVar("T")

CHUNK_BYTES = 2**24  # of a chunk; another one is read while it is used


class FileNegatives:
    """Rows of a file as negatives, read chunk by chunk.

    The file holds M rows of D numbers in the byte order of the machine and nothing else, as
    `write_negatives` and `tensor.view(torch.uint8).numpy().tofile(path)` write them. A .npy file,
    and one of `write_negatives`, whose `path`.json says it, know their dim and dtype. It is opened
    for each pass; a thread reads the next chunk while one is used. With a `group` and
    `sharded_negatives=True` each rank reads its part of the file, which all ranks pass.

    Args:
        path: the file; a name that ends in .npy is a NumPy file.
        dim: D.
        dtype: float32, float64, bfloat16 or float16.
        chunk_rows: rows of a chunk; by default those of 16 MiB. Three chunks are held, and those
            that the user keeps: their memory is not used again before.
        progress: called with (rows done, rows of the pass), first with 0 and then when a chunk has
            been used. What it raises ends the pass.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: a file that does not hold rows of this dim and dtype; in a pass, one
            that is not what it was when this object was made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dim: int | None = None,
        dtype: torch.dtype | None = None,
        *,
        chunk_rows: int | None = None,
        progress: Callable[[int, int], Any] | None = None,
    ) -> None:
        self.path, self.progress = os.fspath(path), progress
        self._state = _state(os.stat(self.path))
        self._offset = 0
        layout: Layout | None
        if self.path.endswith(".npy"):
            layout, self._offset = read_npy_header(self.path)
        else:
            layout = read_layout(self.path)
        if layout is not None:
            for name, given, held in (("dim", dim, layout.dim), ("dtype", dtype, layout.dtype)):
                if given not in (None, held):
                    raise ValueError(f"{name} must be that of {self.path}, {held}, got {given}")
            dim, dtype = layout
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be a whole number > 0, got {dim}")
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
        self._row_bytes = Layout(dim, dtype).row_bytes
        if chunk_rows is None:
            chunk_rows = max(1, CHUNK_BYTES // self._row_bytes)
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
        size = self._state[0]
        rows, rest = divmod(size - self._offset, self._row_bytes)
        if rows == 0 or rest != 0:
            raise ValueError(
                f"path must be a file of whole rows of {self._row_bytes} bytes (dim={dim}, "
                f"dtype={dtype}), at least one, got {self.path} of {size} bytes"
            )
        self.dtype, self.shape = dtype, (rows, dim)
        self.chunk_rows = min(chunk_rows, rows)

    def __iter__(self) -> Iterator[Tensor]:
        return self._read(0, self.shape[0])

    def part(self, start: int, stop: int) -> FilePart:
        """Rows start to stop as negatives. With `sharded_negatives=True` they are this rank's part
        as they are, as for a file that only this rank has."""
        return FilePart(self, start, stop)

    def _read(self, first: int, last: int) -> Iterator[Tensor]:
        starts = range(first, last, self.chunk_rows)
        size = self.chunk_rows * self._row_bytes
        buffers: list[bytearray] = []
        # unbuffered: straight into the chunk, and no page of the file counts as ours
        with open(self.path, "rb", buffering=0) as file:
            self._check(file)
            file.seek(self._offset + first * self._row_bytes)

            def read(step: int) -> Tensor:
                rows = min(self.chunk_rows, last - starts[step])
                memory = _unused(buffers, size)
                _fill(memoryview(memory)[: rows * self._row_bytes], file, self.path)
                self._check(file)
                _read_ahead(file.fileno(), file.tell(), size)
                count = rows * self.shape[1]
                return torch.frombuffer(memory, dtype=self.dtype, count=count).view(rows, -1)

            done = 0
            self._report(done, last - first)
            for chunk in made_ahead(read, len(starts)):
                rows = len(chunk)
                yield chunk
                del chunk  # else its memory would not be free for the next but one
                done += rows
                self._report(done, last - first)

    def _report(self, done: int, rows: int) -> None:
        if self.progress is not None:
            self.progress(done, rows)

    def _check(self, file: Any) -> None:
        """Raise unless the file is what it was."""
        now = _state(os.fstat(file.fileno()))
        if now == self._state:
            return
        (was, _), (size, _) = self._state, now
        what = "has been written to"
        if size != was:
            than = "longer" if size > was else "shorter"
            what = f"is {than} than it was, of {size} bytes and not {was}"
        raise ValueError(f"{self.path} {what}: make its FileNegatives anew")

    def __repr__(self) -> str:
        return f"FileNegatives({self.path!r}, shape={self.shape}, dtype={self.dtype})"


class FilePart:
    """Some rows of a `FileNegatives`, as `FileNegatives.part` gives them."""

    def __init__(self, whole: FileNegatives, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= whole.shape[0]:
            raise ValueError(
                f"start and stop must be rows of {whole.shape[0]}, in order, got {start} and {stop}"
            )
        self.whole, self.start, self.stop = whole, start, stop
        self.dtype, self.shape = whole.dtype, (stop - start, whole.shape[1])

    def __iter__(self) -> Iterator[Tensor]:
        return self.whole._read(self.start, self.stop)

    def __repr__(self) -> str:
        return f"{self.whole!r}.part({self.start}, {self.stop})"


def made_ahead(make: Callable[[int], T], steps: int) -> Iterator[T]:
    """make(0), make(1), ... of so many steps, each made by a thread while the one before is used.
    The thread ends with the iterator, however that ends."""
    with ThreadPoolExecutor(1, "contrastive_kernels") as pool:
        coming = None
        for step in range(steps):
            made = make(step) if coming is None else coming.result()
            coming = pool.submit(make, step + 1) if step + 1 < steps else None
            yield made


def _unused(buffers: list[bytearray], size: int) -> bytearray:
    """One of the buffers that no tensor holds, or a new one."""
    for i in range(len(buffers)):
        if sys.getrefcount(buffers[i]) <= 2:  # the list, and the argument
            return buffers[i]
    buffers.append(bytearray(size))
    return buffers[-1]


def _state(status: os.stat_result) -> tuple[int, int]:
    """(bytes, when it was last written) of a file."""
    return status.st_size, status.st_mtime_ns


def _fill(buffer: memoryview, file: Any, path: str) -> None:
    while len(buffer):
        got = file.readinto(buffer)  # at most 2 GB, or less after a signal
        if not got:
            raise ValueError(f"{path} is shorter than it was: it lacks {len(buffer)} bytes")
        buffer = buffer[got:]


def _read_ahead(file: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)
