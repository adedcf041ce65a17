"""The Triton kernels compiled for GPUs that need not be there, for test_triton_compile.

Run as a program, in a process without Triton's interpreter: prints a line of JSON for each kernel.
What compiled.json has of a kernel whose source, arguments, options and compiler are the same is
taken from there, with the machine code of those for Hopper, but for a few, others each day.
`make compiled` keeps what is new (--write), and makes everything again where the file is not there.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import triton

from benchmarks.gpu import gates, resources
from contrastive_kernels import triton as operators
from contrastive_kernels.triton import compile as ahead
from contrastive_kernels.triton import max_sim, nested, top_k
from contrastive_kernels.triton.compile import L2, Compiled
from contrastive_kernels.triton.configs import TILES, Tile
from contrastive_kernels.triton.machine_code import Code, Count, code
from contrastive_kernels.triton.tune import Entry

RECORD = Path(__file__).with_name("compiled.json")
DAYS = 16  # in which everything is compiled once
# What is compiled here; the rest differs little: `python -m benchmarks.gpu.resources` has all.
KINDS = {80: ("half",), 86: ("half",), 90: ("half", "single", "double"), 100: ("half",)}
FEW = 1024  # rows and keys whose sweeps of rows and columns are one launch
# Those whose machine code is read.
GATED = [Entry(name, 128, "half") for name in ("stats", "attend", "two_way", "gradient")]


def recorded() -> tuple[str, dict[str, Compiled], dict[str, Code]]:
    """A version of Triton, what it makes, and some of the machine code, by key."""
    if not RECORD.exists():
        return "", {}, {}
    kept = json.loads(RECORD.read_text())
    codes = {key: code_from_json(row) for key, row in kept["code"].items()}
    return kept["triton"], {row[-1]: from_json(row) for row in kept["kernels"]}, codes


def from_json(row: list) -> Compiled:
    """Of what JSON has kept."""
    kernel, tile, *numbers, grid, key = row
    return Compiled(kernel, tile and Tile(*tile), *numbers, tuple(grid), key)


def code_from_json(row: list) -> Code:
    return Code(Count(*row[0]), *row[1:])


def keep(made: list[Compiled], codes: Mapping[str, Code]) -> None:
    lines = {one.key: json.dumps(one) for one in made}
    rows = ",\n".join(lines[key] for key in sorted(lines))
    facts = ",\n".join(
        f'"{key}": {json.dumps(codes[key])}' for key in sorted(lines) if key in codes
    )
    head = f'{{"triton": "{triton.__version__}"'
    RECORD.write_text(f'{head}, "kernels": [\n{rows}\n], "code": {{\n{facts}\n}}}}\n')


def due(key: str) -> bool:
    """Whether it is this kernel's day to be compiled again."""
    return (int(key, 16) - date.today().toordinal()) % DAYS == 0


def arguments(dim: int, **used: bool) -> list[torch.Tensor | None]:
    """x, y, scale, bias, ids to drop and ids to keep, of which only those named are there."""
    n, meta = FEW if used.get("few") else resources.N, resources.META
    x = torch.empty(n, dim, dtype=torch.bfloat16, device=meta)
    if used.get("half"):
        x = x.half()
    ids = torch.empty(n, dtype=torch.int64, device=meta)
    floats = torch.empty(n, device=meta)
    y = None if used.get("symmetric") else x
    drop, keep = (ids if used.get(name) else None for name in ("drop", "keep"))
    pairs = [drop, None if y is None else drop, keep, None if y is None else keep]
    return [x, y, torch.empty((), device=meta), floats if used.get("bias") else None, *pairs]


def forward(dim: int, *, mean=False, above=False, unit=True, columns=False, attend=False, **used):
    tensors = arguments(dim, **used)
    above = torch.empty(resources.N, device=resources.META) if above else None
    aligned = bool(used.get("few"))
    operators.row_stats(*tensors, above, mean, unit, columns, attend, False, aligned)


def softplus(dim: int, *, above=False, summed=False, unit=True, **used):
    tensors = arguments(dim, **used)
    above = torch.empty(resources.N, device=resources.META) if above else None
    needs = [summed, summed, summed, summed and bool(used.get("bias"))]
    operators.row_softplus(*tensors, above, unit, needs, False)


def backward(
    dim: int, *, rows=True, columns=False, mean=False, unit=True, key=False, add=False, **used
):  # fmt: skip
    tensors = arguments(dim, **used)
    size = FEW if used.get("few") else resources.N
    some, none = (torch.empty(n, device=resources.META) for n in (size, 0))
    grads = [some if rows else None, some if mean and rows else None,
             some if columns else None, some if mean and columns else None]  # fmt: skip
    needs = [not key, key, True, key and bool(used.get("bias"))]
    statistics = [*4 * [some], none, none, some, some]
    partner = some if used.get("few") else None
    into = (torch.empty_like(tensors[0]), None) if add else (None, None)
    operators.row_stats_backward(*tensors, *statistics, *grads, partner, unit, needs, False, into)


def products(dim: int, keys: int | None = None, half=False):
    """Of keys of each row, as many for each or, without `keys`, in runs; and their gradients."""
    rows, dtype = resources.N, torch.float16 if half else torch.float32
    of = {"dtype": dtype, "device": resources.META}
    shape = (rows,) if keys is None else (rows, keys)
    x, y, grad = (torch.empty(*s, **of) for s in ((rows, dim), (*shape, dim), shape))
    ends = torch.empty(rows, dtype=torch.long, device=resources.META) if keys is None else None
    operators.row_dot(x, y, ends, True)
    operators.row_dot_backward(x, y, ends, grad.float(), True, [True, True])


def nearest(dim: int):
    x, *_, ids, _, _, _ = arguments(dim, drop=True)
    level = torch.empty(resources.N, device=resources.META)
    top_k.top_k(x, x, ids, ids, None, None, level, level, 16, True)


def late(dim: int, *, own: int = 0, temperature: float = 0.0):
    """Late interaction of tokens that may not count, and its gradients."""
    x, y = (torch.empty(n, dim, dtype=torch.bfloat16, device=resources.META) for n in (1024, 11520))
    ends = [torch.empty(n, dtype=torch.int64, device=resources.META) for n in (32, 64)]
    kept = [torch.empty(len(t), dtype=torch.bool, device=resources.META) for t in (x, y)]
    given = (x, y, *ends, *kept, own, temperature, True, not temperature)
    scores, winners, values = max_sim.max_sim(*given)
    max_sim.max_sim_backward(*given, winners, values, torch.empty_like(scores), [True, True])


def prefixes(dim: int, *, softplus=False, **used: bool):
    """Sweeps of rows and columns, or of softplus, at two prefixes, and their gradients."""
    tensors, n = arguments(dim, drop=True, **used), resources.N
    ends, columns = [dim // 2, dim], not (softplus or used.get("symmetric"))
    nested.nested_stats(*tensors, ends, softplus, True, columns, False, True)
    stats = torch.empty(2, n, device=resources.META)
    grad_columns = stats if columns else None
    needs = [True, columns, True, bool(used.get("bias"))]
    nested.nested_stats_backward(
        *tensors, *4 * [stats], stats, grad_columns, stats, ends, softplus, True, needs, False
    )


# What the losses launch beside the commonest case.
VARIANTS: dict[str, Callable[[int], None]] = {
    "plain": lambda d: forward(d, unit=False),
    "bias": lambda d: forward(d, drop=True, bias=True),
    "mean": lambda d: forward(d, drop=True, mean=True),
    "mean above": lambda d: forward(d, drop=True, mean=True, above=True),
    "keep mean above bias": lambda d: forward(d, keep=True, mean=True, above=True, bias=True),
    "attend above": lambda d: forward(d, drop=True, attend=True, above=True),
    "attend keep bias": lambda d: forward(d, drop=True, attend=True, keep=True, bias=True),
    "attend float16": lambda d: forward(d, drop=True, attend=True, half=True),
    "rows and columns keep": lambda d: forward(d, columns=True, drop=True, keep=True),
    "symmetric": lambda d: forward(d, symmetric=True, drop=True),
    "symmetric above": lambda d: forward(d, symmetric=True, drop=True, above=True),
    "softplus above": lambda d: softplus(d, drop=True, bias=True, above=True),
    "softplus summed": lambda d: softplus(d, drop=True, bias=True, summed=True),
    "backward plain": lambda d: backward(d, unit=False),
    "key bias backward": lambda d: backward(d, drop=True, bias=True, key=True),
    "mean backward": lambda d: backward(d, drop=True, mean=True),
    "added backward": lambda d: backward(d, drop=True, add=True),
    "rows and columns backward": lambda d: backward(d, drop=True, columns=True),
    "rows and columns with mean backward": lambda d: backward(d, columns=True, mean=True),
    "few rows and columns": lambda d: forward(d, columns=True, drop=True, few=True),
    "few rows and columns backward": lambda d: backward(d, columns=True, drop=True, few=True),
    "few rows backward": lambda d: backward(d, drop=True, few=True),
    "symmetric backward": lambda d: backward(d, symmetric=True, drop=True),
    "float16 backward": lambda d: backward(d, drop=True, half=True),
    "pairs": lambda d: products(d, 1),
    "keys of each row": lambda d: products(d, 7),
    "runs of keys": lambda d: products(d),
    "runs of keys, float16": lambda d: products(d, half=True),
    "prefixes by a library": lambda d: prefixes(d, bias=True),
    "prefixes by a library, float16": lambda d: prefixes(d, half=True),
    "prefixes of softplus by a library": lambda d: prefixes(d, softplus=True, bias=True),
    "symmetric prefixes by a library": lambda d: prefixes(d, symmetric=True),
    "nearest": nearest,
    "late interaction": late,
    "late interaction, smooth": lambda d: late(d, own=2, temperature=0.1),
}

# At D = 768 too: the largest variant of each sweep, which the others are parts of.
LONG = {
    "keep mean above bias",
    "symmetric above",
    "softplus summed",
    "mean backward",
    "rows and columns with mean backward",
    "few rows and columns backward",
    "symmetric backward",
}

# What reads long vectors' products that a library has stored.
LIBRARY = {
    "rows and columns keep": "two_way_kernel",
    "rows and columns with mean backward": "coefficient_kernel",
    "rows and columns backward": "coefficient_kernel",
}

# The engine for Hopper: with a fixed shift, with the running maximum of float16, gradients of one
# side's statistics, of both sides', and with sums of dL/dz.
HOPPER: dict[str, tuple[str, Callable[[int], None], tuple[int, ...]]] = {
    "hopper": ("attend_kernel", lambda d: forward(d, drop=True, attend=True), (64, 128, 256)),
    "hopper float16": (
        "attend_kernel", lambda d: forward(d, drop=True, attend=True, half=True), (128,)),
    "hopper keys": (
        "gradient_sweep_kernel", lambda d: backward(d, drop=True, key=True), (64, 128, 256)),
    "hopper both float16": (
        "gradient_sweep_kernel", lambda d: backward(d, drop=True, columns=True, half=True),
        (128, 256)),
    "hopper key bias": (
        "gradient_sweep_kernel", lambda d: backward(d, bias=True, key=True), (128,)),
}  # fmt: skip


def tiles() -> Iterator[tuple[int, Entry, Tile]]:
    for architecture, entry in resources.configurations():
        yield architecture, entry, TILES[architecture][entry.kind][entry.schedule][entry.width]


def distinct() -> dict[tuple[int, Entry], tuple[int, Entry]]:
    """What is compiled for every tile that is judged: the tile itself, or one that makes the same
    code. Those of sm_86 that are sm_80's; of those that read vectors in slices the longest."""
    stands: dict[tuple, tuple[int, Entry]] = {}
    found = {}
    for architecture, entry, tile in reversed(list(tiles())):
        # of what no gate counts, the tiles that need the most registers
        counted = architecture == 90 and entry.kind != "double"
        if entry.kind in KINDS[architecture] and (counted or entry.width not in (64, 128)):
            sliced = entry.width == 0 or tile.block_k < entry.width
            code = 80 if architecture == 86 else architecture
            key = (code, entry._replace(width=0 if sliced else entry.width), tile)
            found[architecture, entry] = stands.setdefault(key, (architecture, entry))
    return found


def results(record: Mapping[str, Compiled], codes: dict[str, Code]) -> Iterator[tuple]:
    """(what it was compiled for, architecture, kernel) of all that the tests judge; and of the
    sweeps for an sm_90 at D = 128 what a pair costs, the machine code, and the IR of the GPU.
    `codes` gets the machine code of what has to be compiled for it."""
    compiling = partial(ahead.compiling, record=record)
    for architecture, entry in sorted(set(distinct().values())):
        seen: list[tuple] = []

        def look(made: Compiled, found, entry=entry, seen=seen) -> None:
            if not seen:  # what comes after it repairs
                facts = code(found)
                seen.append((gates.per_pair(made, facts), facts, found.asm["ttgir"]))

        gated = architecture == 90 and entry in GATED
        only = resources.KERNELS[entry.schedule]
        known = {} if gated else record
        with ahead.compiling(architecture, only, look if gated else None, record=known) as made:
            resources.workload(entry, resources.META, resources.N)()
        yield from ((f"sm_{architecture} {entry}", architecture, one) for one in made)
        yield from ((entry.schedule, *facts) for facts in seen)
    _, ragged = with_code("stats_kernel", lambda: forward(100, drop=True, attend=True), {}, {})
    yield "ragged", 0.0, ragged, ""
    for name, run in VARIANTS.items():
        for dim in (128, 768) if name in LONG else (128,):
            with compiling(90) as made:
                run(dim)
            yield from ((f"sm_90 {name} D={dim}", 90, one) for one in made)
    for architecture, name in itertools.product((90, 100), LIBRARY):
        with compiling(architecture, LIBRARY[name], l2=L2) as made:
            VARIANTS[name](768)
        label = f"sm_{architecture} {name} by a library"
        yield from ((label, architecture, one) for one in made)
    with patch.dict(os.environ, CK_HOPPER="1"):
        for name, (kernel, run, dims) in HOPPER.items():
            for dim in dims:
                made, facts = with_code(kernel, partial(run, dim), record, codes)
                yield from ((f"sm_90 {name} D={dim}", 90, one) for one in made)
                yield f"{name} D={dim}", 0.0, facts, ""


def with_code(
    kernel: str, run: Callable[[], None], record: Mapping[str, Compiled], codes: dict[str, Code]
) -> tuple[list[Compiled], Code]:
    """A kernel for an sm_90, and the machine code of the first of it."""

    def look(made: Compiled, found) -> None:
        codes[made.key] = code(found)

    known = {key: one for key, one in record.items() if key in codes}
    with ahead.compiling(90, kernel, look, record=known) as made:
        run()
    return made, codes[made[0].key]


if __name__ == "__main__":
    _, kernels, codes = recorded()
    printed = []
    for result in results({key: one for key, one in kernels.items() if not due(key)}, codes):
        print(json.dumps(result), flush=True)
        printed.append(result)
    if "--write" in sys.argv:
        keep([result[2] for result in printed if len(result) == 3], codes)
