"""The tiles that GPUs run, in the interpreter, with workspaces of NaN until they are written.

Elsewhere the interpreter runs one small tile, which hides what only other blocks do: rows beyond
the end of a larger block, own blocks that are longer than the others, several slices.
"""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import oracles
import pytest
import sweeps
import torch
from torch import Tensor

from contrastive_kernels import reference
from contrastive_kernels.backends import LAUNCH_BOUND, are_few

pytestmark = pytest.mark.skipif(
    not oracles.interpreted("triton") or "triton" not in oracles.BACKENDS,
    reason="kernels are not interpreted here",
)

ARCHITECTURES = (80, 90, 100)
DTYPES = {"half": torch.bfloat16, "single": torch.float32, "double": torch.float64}
TOLERANCE = {"half": 2e-2, "single": 1e-4, "double": 1e-10}
DIMS = {"half": (24, 100, 260), "single": (24, 100, 130), "double": (24, 257)}
# each beside the edge of a tile, or a prime
SIZES = [(1, 67), (129, 1), (63, 129), (127, 65), (65, 257)]
SCHEDULES = {
    "one way": {},
    "mean": {"mean": True},
    "two ways": {"columns": True},
    "itself": {"itself": True},
    "softplus": {"softplus": True},
    "few": {"columns": True, "mean": True, "few": True},
}
CASES = [
    (architecture, kind, schedule)
    for architecture, kind in itertools.product(ARCHITECTURES, DTYPES)
    for schedule in SCHEDULES
    # float64 has the same ones everywhere, sm_100 others than sm_90 for these schedules
    if (kind != "double" or architecture == 90)
    and (architecture != 100 or schedule in ("one way", "two ways"))
    and (schedule != "few" or architecture == 90)
]


@pytest.fixture
def as_on(monkeypatch):
    """Makes the interpreter run the tiles of an architecture, in poisoned workspaces."""
    from contrastive_kernels.triton import configs, engine, row_dots

    def tile(schedule: str, dim: int, kind: str, device: torch.device):
        width = 0 if schedule == "coefficient" else configs.bucket(dim)
        found = configs.TILES[architecture][kind][schedule][configs.width_of(dim) if width else 0]
        used.add((schedule, tuple(found)))
        return found._replace(block_k=min(found.block_k, width)) if width else found

    def empty(*shape, **options) -> Tensor:
        made = torch.empty(*shape, **options)
        return made.fill_(float("nan") if made.is_floating_point() else -(2**31) + 7)

    class Poisoned:
        def __getattr__(self, name):
            return empty if name == "empty" else getattr(torch, name)

    used: set[tuple] = set()
    architecture = 0

    def choose(number: int) -> set[tuple]:
        nonlocal architecture
        architecture = number
        monkeypatch.setattr(engine, "tile", tile)
        for module in (engine, row_dots):
            monkeypatch.setattr(module, "torch", Poisoned())
        return used

    return choose


def results(fused: bool, schedule: str, sizes: tuple[int, int], dim: int, dtype) -> list[Tensor]:
    """Values and gradients, for random upstream gradients, of unit vectors of which some pairs are
    dropped; of the dense reference in float64."""
    options = dict(SCHEDULES[schedule])
    options.pop("few", None)
    softplus, itself = (options.pop(name, False) for name in ("softplus", "itself"))
    rows, keys = sizes[0], sizes[0] if itself else sizes[1]
    x = oracles.randn(rows, dim).to(dtype)
    y = None if itself else oracles.randn(keys, dim, seed=1).to(dtype)
    leaves = [t if fused else t.double() for t in (x, y) if t is not None]
    leaves = [t.requires_grad_() for t in leaves]
    ids = torch.arange(rows) // 13, torch.arange(keys) // 11  # other ones in each block
    ids = (ids[0], ids[0]) if itself else ids
    of = sweeps if fused else reference
    sweep = of.softplus_sweep if softplus else of.sweep
    more = {"backend": "triton"} if fused else {}
    out = sweep(
        leaves[0], None if itself else leaves[1], scale=9.0, exclude=ids, normalize=True,
        bias=-3.0 if softplus else None, **options, **more,
    )  # fmt: skip
    values = [out.value] if softplus else [t for t in out[:4] if t is not None]
    finite = [t.masked_fill(t == -float("inf"), 0.0) for t in values]
    upstream = [oracles.randn(*t.shape, seed=5 + k).to(t.dtype) for k, t in enumerate(finite)]
    return [*values, *torch.autograd.grad(finite, leaves, upstream)]


@pytest.mark.parametrize(("architecture", "kind", "schedule"), CASES)
def test_tiles_of_a_gpu(as_on, monkeypatch, architecture, kind, schedule):
    used = as_on(architecture)
    if schedule == "few":
        monkeypatch.setattr(sys.modules[are_few.__module__], "FEW_PRODUCTS", LAUNCH_BOUND)
    place = CASES.index((architecture, kind, schedule))
    for k, dim in enumerate(DIMS[kind]):
        if len(DIMS[kind]) == 3 and (place + k) % 3 == 0:
            continue  # each case has two of three
        sizes = SIZES[(place + 2 * k) % len(SIZES)]
        got = results(True, schedule, sizes, dim, DTYPES[kind])
        wanted = results(False, schedule, sizes, dim, DTYPES[kind])
        for which, (a, b) in enumerate(zip(got, wanted, strict=True)):
            empty = b == -float("inf")
            assert torch.equal(a.double() == -float("inf"), empty), (which, sizes, dim)
            a, b = a.double().masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)
            error = (a - b).norm() / b.norm().clamp(min=1.0)
            assert error <= TOLERANCE[kind], f"output {which}, {sizes}, D={dim}: {error:.1e}"
    assert len(used) >= 3, used


@pytest.fixture
def pieces(monkeypatch) -> list[tuple[int, int]]:
    """Logits by a library's products, of 256 x 256 at a time; their sizes."""
    from contrastive_kernels.triton import configs, stored

    seen: list[tuple[int, int]] = []
    products = stored.products
    l2 = configs.Properties(0, 2, int((256 * 256 * 4 + 1) / stored.SHARE))

    def watched(rows, columns, buffer):
        seen.append((rows.size, columns.size))
        return products(rows, columns, buffer.fill_(float("nan")))

    monkeypatch.setattr(configs, "properties", lambda device: l2)
    monkeypatch.setattr(stored, "LEAST_BYTES", 0)
    monkeypatch.setattr(stored, "products", watched)
    return seen


@pytest.mark.parametrize(
    ("schedule", "sizes", "dtype"),
    [("two ways", (257, 520), torch.bfloat16), ("one way", (300, 255), torch.float16),
     ("itself", (270, 270), torch.bfloat16)],
)  # fmt: skip
def test_long_vectors_by_a_library(pieces, schedule, sizes, dtype):
    got = results(True, schedule, sizes, 260, dtype)
    wanted = results(False, schedule, sizes, 260, dtype)
    assert (256, min(sizes[1], 256)) in pieces and len(pieces) >= 2
    for which, (a, b) in enumerate(zip(got, wanted, strict=True)):
        error = (a.double() - b).norm() / b.norm().clamp(min=1.0)
        assert error <= TOLERANCE["half"], f"output {which}: {error:.1e}"


def test_a_piece_stays_in_l2(monkeypatch):
    from contrastive_kernels.triton import configs, stored

    half = SimpleNamespace(
        paired=False, few=False, dim=512, resident=256, device=None, scale=torch.ones(()),
        arithmetic=SimpleNamespace(kind="half"),
    )  # fmt: skip
    for megabytes, shape in (
        (50, (2048, 4096)),
        (40, (2048, 2048)),
        (126, (4096, 4096)),
        (6, None),
    ):
        properties = configs.Properties(90, 132, megabytes << 20)
        monkeypatch.setattr(configs, "properties", lambda device, found=properties: found)
        assert stored.shape(half) == shape
    assert stored.shape(SimpleNamespace(**vars(half) | {"dim": 256})) is None
