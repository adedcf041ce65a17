"""A similarity matrix as the kernels see it, and how work is split."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..backends import are_few, check_aligned, resident_dim
from ..types import known, statistics_dtype
from . import packing
from .configs import INTERPRETED, Tile, arithmetic, processors, tile
from .launching import launch
from .tiles import RANGE, Side

ROWS, COLUMNS = 0, 1

# Contiguous gradients of x and y, to which those are added in place.
Into = tuple[Tensor | None, Tensor | None]

# A part of dL/dz that is stored where vectors are too long to be held, and its columns at most.
CHUNK_BYTES, CHUNK_COLUMNS = 256 << 20, 1 << 20
# Copies of features that cannot be read 16 bytes at a time as they lie; elements that Triton counts
# alignment in.
COPY_BYTES, ALIGNMENT = 128 << 20, 16
# Results of programs that share rows, before they are merged.
PARTIAL_BYTES = 32 << 20
# Offsets within a tile are of 32 bit.
LARGEST_STRIDE = 1 << 22
# log2 of the largest sum that a fixed shift allows, in the range of float32; less where terms are
# multiplied by 1 / norm, which is at most 1e12.
SUM_EXPONENT, SUM_EXPONENT_WEIGHTED = 120.0, 80.0
# What is packed for a side is padded to a multiple of the largest tile.
PADDING = 256
# From so many pairs on, what a fixed shift saves is more than the launches it may take.
FIXED_PAIRS = 0 if INTERPRETED else 1 << 26
# Programs for each multiprocessor that keep it busy to the end: of `two_way`, and of sweeps whose
# other side is cut into parts. It holds one, two or three of these at once: of six the last wave is
# full too.
WAVES, PART_WAVES = 4, 6


def cdiv(a: int, b: int) -> int:
    """Triton's own takes microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def narrow(rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Ids of at most 32 bits that are equal where these are: the position in sorted order."""
    if rows is None or columns is None:
        return None, None
    if max(rows.dtype.itemsize, columns.dtype.itemsize) > 4:
        ordered = (rows if rows is columns else torch.cat((rows, columns))).sort().values
        rows, columns = (
            torch.searchsorted(ordered, ids.contiguous(), out_int32=True) for ids in (rows, columns)
        )
    return rows.contiguous(), columns.contiguous()


def plain(features: Tensor) -> Tensor:
    """Features whose offsets within a tile fit 32 bit."""
    widest = max(features.stride(-2), features.stride(-1) * features.shape[-1])
    return features if widest < LARGEST_STRIDE else features.contiguous()


def wide(features: Tensor) -> Tensor:
    """Features that can be read 16 bytes at a time: as they are, or a copy, of vectors that end in
    zeros."""
    size, dim = features.shape
    padded = cdiv(dim, ALIGNMENT) * ALIGNMENT
    aligned = features.stride(1) == 1 and features.stride(0) % ALIGNMENT == 0
    if padded == dim and aligned and features.data_ptr() % 16 == 0:
        return features
    copy = features.new_empty(size, padded)
    copy[:, :dim].copy_(features)
    copy[:, dim:].zero_()
    return copy


class Needs(NamedTuple):
    """Which gradients are needed."""

    x: bool
    y: bool
    scale: bool
    bias: bool


class Problem:
    """A similarity matrix: its two sides, and how their products are computed.

    y is None: x with itself. y (N, M, D): its products with x come too, and `dim` is 0. Else it is
    what the kernels see of the `length` of the vectors, with zeros after them. `aligned`: vectors
    are copied if they cannot be read 16 bytes at a time.
    """

    def __init__(
        self, x: Tensor, y: Tensor | None, scale: Tensor, bias: Tensor | None,
        exclude: tuple[Tensor | None, Tensor | None], keep: tuple[Tensor | None, Tensor | None],
        normalize: bool, products: Tensor | None = None, aligned: bool = True,
    ):  # fmt: skip
        self.symmetric = y is None
        self.paired = products is not None
        self.scale = scale
        self.device = x.device
        self.normalize = normalize
        self.arithmetic = arithmetic(x, x if y is None else y)
        self.dtype = statistics_dtype(x)
        self.inputs = (x, x if y is None else y)
        self.features = (plain(self.inputs[ROWS]), plain(self.inputs[COLUMNS]))
        self.length = x.shape[-1]
        self.bias = None if bias is None else bias.contiguous()
        if self.symmetric:
            exclude, keep = (exclude[0], exclude[0]), (keep[0], keep[0])
        self.exclude, self.keep = narrow(*exclude), narrow(*keep)
        self.packed: tuple[Side, Side] | None = None
        self.products = products
        self.dim = x.shape[-1]
        bytes_of_copies = sum(t.numel() * t.element_size() for t in self.inputs)
        if aligned and not (self.paired or self.few or bytes_of_copies > COPY_BYTES):
            made = wide(self.features[ROWS])
            self.features = (made, made if self.symmetric else wide(self.features[COLUMNS]))
            self.dim = made.shape[1]
        self.resident = resident_dim(*(t.dtype for t in self.inputs))
        if self.paired:
            self.dim = 0
            self.arithmetic = self.arithmetic._replace(kind="single", operand=self.arithmetic.sum)

    def size(self, which: int) -> int:
        return self.inputs[which].shape[-2]

    @property
    def bounded(self) -> bool:
        """Whether the scale and the largest bias bound the logits."""
        return self.normalize and not self.paired

    @property
    def few(self) -> bool:
        """Whether launches take longer than the products."""
        return are_few(self.size(ROWS), self.size(COLUMNS), self.dim)

    @cached_property
    def largest_bias(self) -> Tensor | None:
        """0-d; NaN and inf, which may be of dropped pairs alone, count as 0."""
        return None if self.bias is None else self.bias.nan_to_num(nan=0.0, posinf=0.0).amax()

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def pack(
        self, rows: dict[str, Tensor], columns: dict[str, Tensor], partner: Tensor | None = None
    ) -> None:
        """Makes both sides ready for the kernels, with what the backward pass knows of them; into
        `partner`, if given, go the logits of the rows and their partners."""
        features = self.features if self.products is None else (self.products, self.products)
        dim = features[ROWS].shape[-1]
        normalize = self.normalize and not self.paired
        sources, packed, blocks = [], [], []
        for which, statistics in enumerate((rows, columns)[: 1 if self.symmetric else 2]):
            t, size = features[which], self.size(which)
            source = Side(
                t, t.stride(0), t.stride(1), size, bias=self.bias if which == COLUMNS else None,
                exclude=self.exclude[which], keep=self.keep[which], **statistics,
            )  # fmt: skip
            fields = [name for name in Side._fields[4:] if name != "low"]
            names = [name for name in fields if getattr(source, name) is not None]
            names += ["inverse"] if normalize else []
            padded = cdiv(size, PADDING) * PADDING
            made: dict[str, Any] = {}
            for name in names:
                ids = name in ("exclude", "keep")
                made[name] = self.empty(padded, dtype=torch.int32 if ids else None)
            if source.exclude is not None:
                made["ranges"] = self.empty(padded // RANGE.value, 2, dtype=torch.int32)
            sources.append(source)
            packed.append(Side(*source[:4], **made))
            needed = made or (which == ROWS and partner is not None)
            blocks.append(padded // RANGE.value if needed else 0)
        if sum(blocks):
            both = [t for pair in zip(sources, packed, strict=True) for t in pair]
            launch(
                packing.pack_kernel, (sum(blocks),), *both, *([None] * (4 - len(both))),
                None if partner is None else self.scale, partner, blocks[0], BOTH=len(both) > 2,
                DIM=dim, NORMALIZE=normalize, ACC=self.arithmetic.sum,
                BLOCK_K=min(64, next_power_of_2(dim)),
            )  # fmt: skip
        self.packed = (packed[0], packed[-1])

    def pack_partners(self, keep_rows: Tensor | None, into: Tensor | None = None) -> Tensor:
        """The logits of the rows and their partners, made where features are packed."""
        keys = 0 if self.paired else self.size(COLUMNS)
        check_aligned(self.size(ROWS), keys, keep_rows)
        partner = self.empty(self.size(ROWS)) if into is None else into
        self.pack({}, {}, partner)
        return partner

    def side(self, which: int) -> Side:
        if self.packed is None:
            self.pack({}, {})
        return known(self.packed)[which]

    def part(self, side: Side, which: int, start: int, stop: int) -> Side:
        """Vectors of a side from `start`, a multiple of the largest tile, to `stop`."""
        if start == 0 and stop == side.size:
            return side
        fields: dict[str, Any] = {
            name: t[start:] for name, t in side._asdict().items() if isinstance(t, Tensor)
        }
        fields["features"] = self.features[which][start:stop]
        if side.ranges is not None:
            fields["ranges"] = side.ranges[start // RANGE.value :]
        return side._replace(size=stop - start, **fields)

    def constants(self, chosen: Tile) -> dict[str, Any]:
        """What the sweeps of this problem are compiled for."""
        return {
            "DIM": self.dim,
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "BLOCK_K": chosen.block_k,
            "DTYPE": self.arithmetic.operand,
            "PRECISION": self.arithmetic.precision,
            "tile": chosen,
        }

    def tile(self, schedule: str) -> Tile:
        return tile(schedule, self.dim, self.arithmetic.kind, self.device)

    def parts(self, own: int, other: int, chosen: Tile, vectors: bool) -> tuple[int, int]:
        """(parts, tiles of each) of the other side, so that every multiprocessor has work."""
        blocks, tiles = cdiv(own, chosen.block_m), cdiv(other, chosen.block_n)
        parts, width = 1, processors(self.device)
        if blocks < 2 * width:
            parts = min(tiles, PART_WAVES * width // blocks)
            bytes_each = own * (self.dim if vectors else 6) * self.scale.element_size()
            parts = max(1, min(parts, PARTIAL_BYTES // bytes_each))
        each = cdiv(tiles, parts)
        return cdiv(tiles, each), each

    def blocks(self, which: int) -> list[tuple[int, int]]:
        """Rows whose weighted sums fit into a workspace of fixed size."""
        height = PARTIAL_BYTES // (self.dim * self.scale.element_size())
        height = max(1, height // PADDING) * PADDING
        n = self.size(which)
        return [(start, min(start + height, n)) for start in range(0, n, height)]

    def stored_side(self, needs: Needs) -> int:
        """The side whose vectors' coefficients are stored as rows: sums over these are cheap."""
        if self.symmetric or not (needs.y or needs.bias):
            return ROWS
        return COLUMNS if needs.bias or not needs.x else ROWS

    def in_range(self, inverse: Tensor) -> Tensor:
        """1 / norm that float16 can take; of a zero vector any will do, but 0 times the -inf of a
        dropped pair is NaN."""
        half = self.arithmetic.operand == tl.float16
        return torch.where(inverse < 1e11, inverse, 1e-30) if half else inverse

    def float16_scale(self, weights: Tensor | float, *sides: Side) -> Tensor | None:
        """A power of two that brings weights of this size, times 1 / norm of sides, into the range
        of float16; None for types that have the range of float32."""
        if self.arithmetic.operand != tl.float16:
            return None
        if isinstance(weights, Tensor):
            largest = weights
        else:
            largest = torch.full((), weights, dtype=self.dtype, device=self.device)
        for inverse in (side.inverse for side in sides if side.inverse is not None):
            largest = largest * self.in_range(inverse).amax()
        return torch.exp2(torch.floor(14 - torch.log2(largest)).clamp(-60, 60))
