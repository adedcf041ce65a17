"""Starts kernels: those that were started before, past Triton's own binding of arguments.

Triton looks at every argument, writes what it specialises on into a string and asks its cache for
it, which takes a CPU longer than a small kernel takes a GPU. Here the same is asked by a flat key,
and the compiled kernel goes to Triton's launcher, which turns arguments into pointers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .configs import INTERPRETED, Tile

# What a launcher is called with before the arguments of the kernel: Triton 3.9 names all of them,
# 3.6 the first five.
LAUNCHER = ("gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", "launch_metadata",
            "launch_enter_hook", "launch_exit_hook")  # fmt: skip
PLAIN = {int, float, bool, str}  # constants by their values; all others, as functions, by identity


class Kept(NamedTuple):
    """A compiled kernel: what starts it, and the constants that its key has by identity."""

    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: list[Any]


_kept: dict[tuple[Any, ...], Kept] = {}


def device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: makes that the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, tile: Tile | None = None, **constants: Any
) -> None:
    """Starts a kernel: arguments in the order of its parameters, constants by name after them."""
    if INTERPRETED:
        _bound(kernel, grid, args, tile, constants)
        return
    device = driver.active.get_current_device()
    last = in_order(kernel, args, constants)
    key = key_of(kernel, device, args, tile, last)
    kept = _kept.get(key)
    if kept is None or _watched():
        compiled = _bound(kernel, grid, args, tile, constants)
        if _is_known(compiled.run):
            _kept[key] = Kept(compiled.run, compiled.function, compiled.packed_metadata, last)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    kept.run(x, y, z, stream, kept.function, kept.metadata, None, None, None, *args, *last)


def in_order(kernel: Any, args: tuple, constants: dict[str, Any]) -> list[Any]:
    """Constants in the order of the kernel's parameters."""
    return [constants[name] for name in kernel.arg_names[len(args) :]]


def key_of(
    kernel: Any, device: int, args: tuple, tile: Tile | None, constants: list[Any]
) -> tuple[Any, ...]:
    """All that a kernel is compiled for."""
    key = [c if type(c) in PLAIN else id(c) for c in constants]
    key += (id(kernel), device)
    if tile is not None:
        key += (tile.warps, tile.stages)
    _specialise(args, key)
    return tuple(key)


def _specialise(args: tuple, key: list[Any]) -> None:
    """Adds to the key of each argument what Triton makes a kernel of its own for: its type, whether
    a pointer or a number is a multiple of 16, whether a number is 1 or needs 64 bits; the block of
    a descriptor."""
    add = key.append
    for arg in args:
        if arg is None:
            add(None)
        elif type(arg) is int:
            add(1 if arg == 1 else (not arg & 15, arg >> 31))
        elif isinstance(arg, tuple):
            _specialise(arg, key)
        elif isinstance(arg, Tensor):
            add(arg.dtype)
            add(not arg.data_ptr() & 15)
        else:  # a descriptor for TMA
            key += (arg.base.dtype, *arg.block_shape, arg.layout)


def _bound(kernel: Any, grid: tuple, args: tuple, tile: Tile | None, constants: dict) -> Any:
    """Starts a kernel as Triton does, and returns what it has compiled."""
    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    return kernel[grid](*args, **constants, enable_fp_fusion=True, **options)


def _watched() -> bool:
    """Whether a profiler is to be called before or after a launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _is_known(launcher: Callable[..., None]) -> bool:
    """Whether this launcher is called as `launch` does."""
    *first, last = inspect.signature(launcher).parameters
    return tuple(first) in (LAUNCHER, LAUNCHER[:5]) and last == "args"
