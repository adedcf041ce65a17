"""What a kernel issues for a tile, read from the disassembly of its binary, and how it loads."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from triton.backends import nvidia

LABEL = re.compile(r"^(\.L\w+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
TARGET = re.compile(r"`\((\.L\w+)\)")
PRODUCT = re.compile(r"(HGMMA|HMMA|DMMA|UTC\w*MMA)\b")


class Count(NamedTuple):
    """Instructions of one warp: `special` are exponentials, logarithms and the like, `products`
    those of tensor cores; at `barriers` a program waits for all its threads."""

    all: int = 0
    special: int = 0
    products: int = 0
    barriers: int = 0

    def plus(self, other: Count, times: int = 1) -> Count:
        return Count(*(a + times * b for a, b in zip(self, other, strict=True)))


class Loops(NamedTuple):
    """Once through the innermost loop with products, of a kernel without any with exponentials, and
    once through what is around it: the next loop, or the whole kernel. By the shortest way, without
    what few tiles need. A loop that was unrolled counts as what is around it."""

    inner: Count
    outer: Count

    def of_tile(self, slices: int) -> Count:
        """What one tile takes whose vectors are read in so many slices."""
        return self.inner if slices == 1 else self.outer.plus(self.inner, slices - 1)


class Code(NamedTuple):
    """loop: once through the loop over tiles. columns: n of its products' instructions, 0 where
    Triton does not say. wide, narrow: how many loads from global memory have 16 bytes, or fewer.
    buffers: the tiles of features that are in shared memory at once, at least 1."""

    loop: Count
    columns: int
    wide: int
    narrow: int
    buffers: int


class Line(NamedTuple):
    issued: Count
    target: str = ""
    conditional: bool = False


def code(found: Any) -> Code:
    """That of what Triton has compiled, whose tiles hold whole vectors."""
    ptx = found.asm["ptx"]
    columns = re.findall(r"(?:wgmma\.mma_async\S*|mma\.sync\S*)\.m\d+n(\d+)k\d+", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*\], (0x[0-9a-f]+|\d+)", ptx)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    sizes = [int(size, 0) for size in copies]
    sizes += [int(count or 1) * int(bits) // 8 for count, bits in loads]
    buffers = re.findall(
        r"local_alloc[^\n]*memdesc<(\d+)x\d+x\d+x(?:b?f16|f32)", found.asm["ttgir"]
    )
    return Code(
        loops(found.asm["cubin"]).inner,
        max(map(int, columns), default=0),
        sum(size >= 16 for size in sizes),
        sum(size < 16 for size in sizes),
        max(map(int, buffers), default=1),
    )


def loops(binary: bytes) -> Loops:
    """Of the only kernel of a binary."""
    tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "-c", file.name]
        return read(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read(text: str) -> Loops:
    """`loops` of a disassembly."""
    lines, labels, exits = _parsed(text)
    ranges = sorted(
        ((labels[line.target], at) for at, line in enumerate(lines) if line.target in labels),
        key=lambda r: r[1] - r[0],
    )
    ranges = [(start, end) for start, end in ranges if start <= end]
    found: dict[tuple[int, int], int] = {}
    counted = "products" if any(line.issued.products for line in lines) else "special"
    for a, b in ranges:  # the shortest first; others may begin or end in code that is moved away
        products = sum(getattr(line.issued, counted) for line in lines[a : b + 1])
        if products and all(b < start or end < a for start, end in found):
            found[a, b] = products
    if not found:
        return Loops(Count(), _shortest(lines, labels, 0, exits))
    start, end = max(found, key=lambda r: found[r])
    inner = _shortest(lines, labels, start, [end])
    around = ((a, b) for a, b in ranges if a <= start and b >= end and (a, b) != (start, end))
    first, last = next(around, (0, -1))
    before = _shortest(lines, labels, first, [start]).plus(lines[start].issued, -1)
    after = _shortest(lines, labels, end, exits if last < 0 else [last])
    return Loops(inner, before.plus(inner).plus(after).plus(lines[end].issued, -1))


def _parsed(text: str) -> tuple[list[Line], dict[str, int], list[int]]:
    """Instructions, where labels point to, and the last instructions of a kernel."""
    lines: list[Line] = []
    labels: dict[str, int] = {}
    exits = []
    for row in text.splitlines():
        if label := LABEL.match(row):
            labels[label[1]] = len(lines)
        elif found := INSTRUCTION.match(row):
            predicate, name, operands = found.groups()
            kinds = name.startswith("MUFU"), PRODUCT.match(name), name.startswith("BAR.SYNC")
            count = Count(1, *(int(bool(kind)) for kind in kinds))
            target = TARGET.search(operands) if name.startswith("BRA") else None
            if name == "EXIT" and not predicate:
                exits.append(len(lines))
            lines.append(Line(count, target[1] if target else "", bool(predicate)))
    return lines, labels, exits


def _shortest(lines: list[Line], labels: dict[str, int], start: int, ends: list[int]) -> Count:
    """The fewest instructions from one to the nearest of others, where there is a way; branches
    backwards are not taken, as those of loops that wait."""
    best: dict[int, Count] = {start: lines[start].issued}
    for at in range(start, len(lines)):
        if at not in best or at in ends:
            continue
        line, ways = lines[at], []
        target = labels.get(line.target, -1)
        if target > at:
            ways.append(target)
        if not line.target or line.conditional:
            ways.append(at + 1)
        for way in ways:
            if way < len(lines):
                count = best[at].plus(lines[way].issued)
                if way not in best or count.all < best[way].all:
                    best[way] = count
    return min((best[end] for end in ends if end in best), default=lines[start].issued)
