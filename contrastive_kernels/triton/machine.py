"""Reads the machine code of a compiled kernel: what a pair costs in its main loop, how it loads."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from triton.backends import nvidia

EXPONENTIAL = "MUFU.EX2"  # every pair needs one, so that the smallest loop with it is the main one


class Loop(NamedTuple):
    """The loop over tiles of a kernel.

    instructions: of one thread and tile, on the way that skips what only some tiles need (bounds,
    ids). barriers: of them those where the program waits for all its threads.
    """

    instructions: int
    barriers: int


class Code(NamedTuple):
    """loop: None where a kernel has none. columns: n of its products' instructions, 0 without.
    wide, narrow: how many loads from global memory have 16 bytes, or fewer. buffers: the tiles of
    features that are in shared memory at once, at least 1."""

    loop: Loop | None
    columns: int
    wide: int
    narrow: int
    buffers: int


def code(found: Any) -> Code:
    """That of what Triton has compiled."""
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
        loop(disassembled(found.asm["cubin"])),
        max(map(int, columns), default=0),
        sum(size >= 16 for size in sizes),
        sum(size < 16 for size in sizes),
        max(map(int, buffers), default=1),
    )


def disassembled(cubin: bytes) -> list[tuple[int, str]]:
    """(address, instruction) of the only kernel of a binary, by the tool that comes with Triton."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+?)\s*;", text)
    return [(int(address, 16), instruction) for address, instruction in lines]


def loop(lines: list[tuple[int, str]]) -> Loop | None:
    places = {address: k for k, (address, _) in enumerate(lines)}
    jumps = {}  # from the place of a branch to that of its target
    for k, (_, text) in enumerate(lines):
        if target := re.search(r"\bBRA\S*(?: !?U?P\w+,)? (?:`\(\S+\)|0x([0-9a-f]+))", text):
            jumps[k] = places.get(int(target[1] or "0", 16), k)
    bodies = [(start, end) for end, start in jumps.items() if start < end]
    bodies = [body for body in bodies if any(EXPONENTIAL in t for _, t in lines[body[0] : body[1]])]
    if not bodies:
        return None
    start, end = min(bodies, key=lambda body: body[1] - body[0])
    # from the end on: the fewest instructions from each one to the branch back
    costs: dict[int, tuple[int, int]] = {end: (1, 0)}
    for k in range(end - 1, start - 1, -1):
        text = lines[k][1]
        after = [costs[k + 1]]
        if k in jumps and jumps[k] in costs:
            always = not text.startswith("@") and not re.search(r"BRA\S* !?U?P", text)
            after = [costs[jumps[k]], *([] if always else after)]
        instructions, barriers = min(after)
        costs[k] = (instructions + 1, barriers + ("BAR.SYNC" in text))
    return Loop(*costs[start])
