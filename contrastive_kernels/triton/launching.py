"""Starts kernels: those that were started before, past Triton's own binding of arguments.

Triton looks at every argument, writes what it specialises on into a string and asks its cache for
it, which takes a CPU longer than a small kernel takes a GPU. Here the same is asked by a flat key
on the way through the arguments, which also makes numbers of pointers; and what Triton's launcher
hands to its function in C is known from the first time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .configs import INTERPRETED, Tile

PLAIN = {int, float, bool, str}  # constants by their values; all others, as functions, by identity


class Kept(NamedTuple):
    """A compiled kernel: the function that starts it, called with a grid, a stream, all of `fixed`,
    and then the kernel's arguments, in one tuple or `spread`. `constants` are the last of these,
    and kept since the key has some by identity."""

    start: Callable[..., None]
    fixed: tuple[Any, ...]
    spread: bool
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
    active = driver.active
    device = active.get_current_device()
    key = key_of(kernel, device, tile, constants)
    given = numbers(args, key)
    found = tuple(key)
    kept = _kept.get(found)
    if kept is None or _watched():
        compiled = _bound(kernel, grid, args, tile, constants)
        last = [constants[name] for name in kernel.arg_names[len(args) :]]
        kept = learned(compiled, last)
        if kept is not None:
            _kept[found] = kept
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    if kept.spread:
        kept.start(x, y, z, stream, *kept.fixed, *given, *kept.constants)
    else:
        kept.start(x, y, z, stream, *kept.fixed, (*given, *kept.constants))


def key_of(kernel: Any, device: int, tile: Tile | None, constants: dict[str, Any]) -> list[Any]:
    """What a kernel is compiled for, but for its arguments, which `numbers` adds."""
    key = [c if type(c) in PLAIN else id(c) for c in constants.values()]
    key += constants
    key += (id(kernel), device, tile)
    return key


def numbers(args: tuple, key: list[Any]) -> list[Any]:
    """The arguments with numbers for pointers. Adds to the key what Triton makes a kernel of its
    own for: where each is that is not None, its type, whether a pointer or a number is a multiple
    of 16, whether a number is 1 or needs 64 bits; the block of a descriptor."""
    add = key.append
    given = list(args)
    for i, arg in enumerate(args):
        if arg is None:
            continue
        kind = type(arg)
        if kind is int:
            add(i)
            if arg == 1 or not 0 <= arg <= 2147483647:
                add((arg == 1, not arg & 15, arg >> 31))
            else:
                add(arg & 15 == 0)
        elif kind is Tensor or isinstance(arg, Tensor):
            given[i] = pointer = arg.data_ptr()
            add(~i if pointer & 15 else i)
            add(arg.dtype)
        elif isinstance(arg, tuple):
            add(i)
            given[i] = tuple(numbers(arg, key))
            add(None)  # so that the next argument is no field of this one
        else:  # a descriptor for TMA
            key += (i, arg.base.dtype, *arg.block_shape, arg.layout)
    return given


def learned(compiled: Any, constants: list[Any]) -> Kept | None:
    """How Triton's launcher starts a kernel; None where that is not to be seen, as in a version
    which does it otherwise, or if a workspace comes with each launch."""
    first, argument = (11, 12, 13, 14, compiled.function), object()
    handed: list[Any] = []
    try:
        launcher = copy.copy(compiled.run)  # another thread may be using it
        start = launcher.launch
        launcher.launch = lambda *given: handed.extend(given)
        launcher(*first, compiled.packed_metadata, None, None, None, argument)
    except Exception:  # whatever another version raises
        return None
    *front, last = handed or (None,)
    spread = last is argument
    fixed = tuple(front[4:])
    plain = tuple(front[:5]) == first and not any(isinstance(one, Tensor) for one in fixed)
    if not plain or not (spread or (isinstance(last, tuple) and last == (argument,))):
        return None
    return Kept(start, fixed, spread, constants)


def _bound(kernel: Any, grid: tuple, args: tuple, tile: Tile | None, constants: dict) -> Any:
    """Starts a kernel as Triton does, and returns what it has compiled."""
    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    return kernel[grid](*args, **constants, enable_fp_fusion=True, **options)


def _watched() -> bool:
    """Whether a profiler is to be called before or after a launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
