"""What a kernel issues for a tile: its loops, read from the disassembly of its binary."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from triton.backends import nvidia

LABEL = re.compile(r"^(\.L\w+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
TARGET = re.compile(r"`\((\.L\w+)\)")
PRODUCT = re.compile(r"(HGMMA|HMMA|DMMA|UTC\w*MMA)\b")


class Count(NamedTuple):
    """Instructions of one warp: `special` are exponentials, logarithms and the like, `products`
    those of tensor cores."""

    all: int = 0
    special: int = 0
    products: int = 0

    def plus(self, other: Count, times: int = 1) -> Count:
        return Count(*(a + times * b for a, b in zip(self, other, strict=True)))


class Loops(NamedTuple):
    """Once through the innermost loop with products, and once through what is around it: the next
    loop, or the whole kernel. By the shortest way, without what few tiles need. A loop that was
    unrolled counts as what is around it."""

    inner: Count
    outer: Count

    def of_tile(self, slices: int) -> Count:
        """What one tile takes whose vectors are read in so many slices."""
        return self.inner if slices == 1 else self.outer.plus(self.inner, slices - 1)


class Line(NamedTuple):
    issued: Count
    target: str = ""
    conditional: bool = False


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
    products = [sum(one.issued.products for one in lines[a : b + 1]) for a, b in ranges]
    if not any(products):
        return Loops(Count(), _shortest(lines, labels, 0, exits))
    start, end = ranges[products.index(max(products))]
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
            count = Count(1, int(name.startswith("MUFU")), int(bool(PRODUCT.match(name))))
            target = TARGET.search(operands) if name.startswith("BRA") else None
            if name == "EXIT" and not predicate:
                exits.append(len(lines))
            lines.append(Line(count, target[1] if target else "", bool(predicate)))
    return lines, labels, exits


def _shortest(lines: list[Line], labels: dict[str, int], start: int, ends: list[int]) -> Count:
    """The fewest instructions from one to the nearest of others; branches backwards are not taken,
    as those of loops that wait."""
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
    return min(best[end] for end in ends if end in best)
