"""What the rows of a file are: a .json file beside it says it, or the header of a .npy file."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

import torch

from ..types import FLOATS

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


class Layout(NamedTuple):
    """What the rows of a file are."""

    dim: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.dim * self.dtype.itemsize

    def __str__(self) -> str:
        return f"dim={self.dim}, dtype={self.dtype}"


def layout_path(path: str) -> str:
    return f"{path}.json"


def write_layout(path: str, layout: Layout) -> None:
    name = str(layout.dtype).removeprefix("torch.")
    part = f"{layout_path(path)}.part"
    with open(part, "w") as file:
        json.dump({"dim": layout.dim, "dtype": name}, file)
    os.replace(part, layout_path(path))  # whole or not at all


def read_layout(path: str) -> Layout | None:
    try:
        with open(layout_path(path)) as file:
            held = json.load(file)
            dim, dtype = held["dim"], DTYPES[held["dtype"]]
            if not isinstance(dim, int) or dim < 1:
                raise ValueError
            return Layout(dim, dtype)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f'{layout_path(path)} must be as {{"dim": 128, "dtype": "bfloat16"}}, with a dtype of '
            f"{', '.join(DTYPES)}"
        ) from None


def read_npy_header(path: str) -> tuple[Layout, int]:
    """(what the rows are, where they begin)."""
    import numpy as np

    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, column_major, dtype = read(file)
        held = {np.dtype(name): d for name, d in DTYPES.items() if d != torch.bfloat16}
        if len(shape) != 2 or column_major or dtype not in held:
            order = "column" if column_major else "row"
            raise ValueError(
                "path must hold an array (M, D) of float32, float64 or float16, row by row, got "
                f"{path}: shape {shape}, {dtype}, {order} by {order}"
            )
        return Layout(shape[1], held[dtype]), file.tell()
