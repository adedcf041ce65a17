"""Gradients that Triton's kernels add to those of sweeps before, without one of their own."""

import sys

import pytest
import torch
from allocations import all_of
from oracles import BACKENDS, DEVICE, randn

from contrastive_kernels import ops
from contrastive_kernels.backends import LAUNCH_BOUND, are_few
from contrastive_kernels.ops import pairs
from contrastive_kernels.ops.pairs import Needs
from contrastive_kernels.types import Sweep

pytestmark = [
    pytest.mark.skipif(not {"triton", "cpu"} <= set(BACKENDS), reason="needs both engines"),
    pytest.mark.skipif(DEVICE != "cpu", reason="counts what the allocator of CPUs gives"),
]

backend_rules = sys.modules[are_few.__module__]

# Sizes of x and y, their type, and what is asked.
SWEEPS = {
    "few": ((40, 30, 48), torch.bfloat16, {}),
    "long": ((40, 30, 1100), torch.float32, {"columns": True}),
    "itself": ((40, None, 48), torch.float16, {}),
    "attend": ((40, 300, 48), torch.float32, {"attend": True}),
    "a key of each row": ((40, 40, 1, 48), torch.float32, {}),
    "keys of each row": ((40, 40, 3, 48), torch.bfloat16, {}),
}


def prepared(name: str):
    (n, *keys, dim), dtype, options = SWEEPS[name]
    x = randn(n, dim).to(dtype)
    y = None if keys == [None] else randn(*keys, dim, seed=1).to(dtype)
    given = ops.operands(x, y, scale=3.0, normalize=True, backend="triton")
    with torch.no_grad():
        stats = pairs.softmax(given, **{"mean": False, "columns": False, **options})
    above = Sweep(lse=randn(n, seed=2).to(stats.lse.dtype))
    if options.get("columns"):
        above = above._replace(col_lse=randn(keys[0], seed=3).to(stats.lse.dtype))
    y_needed = y is not None and not options.get("attend")
    needs = Needs(x=True, y=y_needed, scale=True, bias=False)
    return dtype, given, stats, above, needs


@pytest.mark.parametrize("name", SWEEPS)
def test_gradients_are_added_in_place(name, monkeypatch):
    if name == "few":
        monkeypatch.setattr(backend_rules, "FEW_PRODUCTS", LAUNCH_BOUND)
    dtype, given, stats, above, needs = prepared(name)

    def made(*into):
        return pairs.softmax_backward(given, stats, above, needs, *into)

    alone = made()
    wanted = [g for g, need in zip(alone[:2], needs[:2], strict=True) if need]
    there = [randn(*g.shape, seed=5 + i).to(dtype) for i, g in enumerate(wanted)]
    sums = [t.double() + g.double() for t, g in zip(there, wanted, strict=True)]
    into = (there[0], there[1] if needs.y else None)
    added = made(into)
    for place, t, total in zip((added.x, added.y), there, sums, strict=False):
        assert place is t
        # the gradient alone is rounded, and then the sum
        bound = 2 * torch.finfo(dtype).eps * (1 + total.abs().max())
        assert (t.double() - total).abs().max() <= bound
    torch.testing.assert_close(added.scale, alone.scale, rtol=0, atol=0)

    size = sum(t.numel() * t.element_size() for t in there)
    assert all_of(lambda: made(into)) <= all_of(made) - 0.9 * size


def test_both_sides_are_added_to_the_same_rows(monkeypatch):
    """Not by one launch, of which two programs would write to one row."""
    from contrastive_kernels.triton import engine, gradient

    launch, both = engine.launch, []

    def seen(kernel, *args, **constants):
        if kernel is gradient.finish_kernel:
            both.append(constants["BOTH"])
        launch(kernel, *args, **constants)

    monkeypatch.setattr(engine, "launch", seen)
    monkeypatch.setattr(backend_rules, "FEW_PRODUCTS", LAUNCH_BOUND)
    whole = randn(40, 48).to(torch.float32)
    given = ops.operands(whole[:30], whole, scale=3.0, normalize=True, backend="triton")
    with torch.no_grad():
        stats = pairs.softmax(given, mean=False, columns=False)
    above = Sweep(lse=randn(30, seed=2).float())
    needs = Needs(x=True, y=True, scale=False, bias=False)
    alone = pairs.softmax_backward(given, stats, above, needs)
    assert any(both)  # as these few pairs are, else
    both.clear()
    total = torch.zeros_like(whole)
    pairs.softmax_backward(given, stats, above, needs, (total[:30], total))
    assert both and not any(both)
    alone.y[:30] += alone.x
    torch.testing.assert_close(total, alone.y, rtol=1e-6, atol=1e-6)
