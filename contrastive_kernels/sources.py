"""Negatives (M, D) that come in chunks, so that M may exceed the memory: a list of tensors, an
array of another library, or any object that is a `NegativeSource`, as files are (`files.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .files import DTYPES, made_ahead
from .files.reading import CHUNK_BYTES

if TYPE_CHECKING:
    from typing_extensions import TypeIs


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


def checked(source: NegativeSource) -> Iterator[Tensor]:
    """The chunks of a pass over a source, or raise for one that does not keep its word."""
    total, dim = source.shape
    rows = 0
    for chunk in source:
        if chunk.dim() != 2 or chunk.shape[1] != dim or chunk.dtype != source.dtype:
            raise ValueError(
                f"a chunk of negatives must have shape (m, {dim}) and be {source.dtype}, "
                f"got {tuple(chunk.shape)} and {chunk.dtype}"
            )
        if chunk.requires_grad:
            raise ValueError("a chunk of negatives must not need a gradient: detach it")
        rows += len(chunk)
        if rows > total:
            break
        yield chunk
    if rows != total:
        more = "at least " if rows > total else ""
        raise ValueError(f"negatives must have the {total} rows of their shape, got {more}{rows}")


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
        starts = range(0, rows, max(1, CHUNK_BYTES // (dim * self.dtype.itemsize)))

        def read(step: int) -> Tensor:
            chunk = self.array[starts[step] : starts[step] + starts.step]
            if not (getattr(chunk, "flags", None) is None or chunk.flags.writeable):
                chunk = chunk.copy()  # torch has no tensors that are read only
            return torch.as_tensor(chunk)

        return made_ahead(read, len(starts))


class _Prefix:
    """The first features of what comes in chunks."""

    def __init__(self, source: NegativeSource, end: int) -> None:
        self.source, self.end, self.dtype = source, end, source.dtype
        self.shape = source.shape[0], end

    def __iter__(self) -> Iterator[Tensor]:
        return (chunk[:, : self.end] for chunk in self.source)


def prefix_of(keys: Tensor | NegativeSource, end: int) -> Tensor | NegativeSource:
    """The first `end` features of keys."""
    return keys[..., :end] if isinstance(keys, Tensor) else _Prefix(keys, end)


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
        if str(dtype) not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {dtype}")
        if len(keys.shape) != 2:
            raise ValueError(
                f"{name} in an array must have shape (M, D), got {tuple(keys.shape)}: pass a tensor"
            )
        return _Array(keys, DTYPES[str(dtype)])
    if not (isinstance(keys, Tensor) or is_source(keys)):
        raise TypeError(
            f"{name} must be a tensor, an array, a list of tensors or a NegativeSource, "
            f"got {type(keys).__name__}"
        )
    return keys
