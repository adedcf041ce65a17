"""Compiles what the host code would launch, for any NVIDIA GPU, on a machine that needs none.

Tensors on the "meta" device take the place of real ones. For a process of its own: Triton's driver
is replaced for good, and the interpreter must be off.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

from ..types import known
from . import configs, engine, launching
from .configs import Properties, Tile

# Multiprocessors of a GPU that is compiled for: they decide into how many parts work is split.
PROCESSORS = 132
L2 = 50 << 20  # bytes, of the GPUs that products of a library are compiled for
INSTRUCTIONS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}
TENSOR_COLUMNS = 512  # of tensor memory, for each multiprocessor of sm_100


class Compiled(NamedTuple):
    """A kernel as the compiler made it.

    Registers and `spilled` bytes are of one thread; `shared` bytes and `tensor` columns (of tensor
    memory) of one program. `instruction` multiplies matrices, "" where none of the tensor cores'
    does; `calls` counts functions that were not inlined. `error`: why it did not compile. `grid`:
    that of its first launch. `key`: of all that its code depends on.
    """

    kernel: str
    tile: Tile | None
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor: int = 0
    instruction: str = ""
    calls: int = 0
    error: str = ""
    grid: tuple[int, ...] = ()
    key: str = ""

    def programs(self, architecture: int) -> int:
        """How many programs one multiprocessor holds at once."""
        warps = known(self.tile).warps
        registers = -(-self.registers // 8) * 8 * 32 * warps
        # each program takes 1 KiB more than its own
        shared = (configs.SHARED_KIB[architecture] + 1) * 1024 // (self.shared + 1024)
        return min(64 // warps, 65536 // registers, shared, TENSOR_COLUMNS // max(self.tensor, 1))


class Driver:
    """In the place of the driver of a GPU; Triton keeps the kernels of devices apart, and this is
    one of its own."""

    numbers = itertools.count()

    def __init__(self, architecture: int):
        self.architecture = architecture
        self.device = next(self.numbers)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class Counted(NamedTuple):
    """What host code launched: the kernels' names in their order, and each that has to be compiled,
    by its name and what it is compiled for, with the keys that `launching` has for it."""

    launches: list[str]
    kernels: dict[tuple[str, str], set[tuple[Any, ...]]]


@contextmanager
def counting(architecture: int) -> Iterator[Counted]:
    """Host code that is called within it launches and compiles nothing, and is counted.

    What kernels would have written is never written: a workspace holds any numbers.
    """
    counted = Counted([], {})
    own_key: tuple[Any, ...] = ()

    def compile_nothing(kernel: Any, key: str, *_others: Any) -> None:
        counted.kernels.setdefault((kernel.fn.__name__, key), set()).add(own_key)

    def launch(
        kernel: Any, grid: Any, *args: Any, tile: Tile | None = None, **constants: Any
    ) -> None:
        nonlocal own_key
        counted.launches.append(kernel.fn.__name__)
        found = launching.key_of(kernel, architecture, tile, constants)
        launching.numbers(args, found)
        own_key = tuple(found)
        kernel.warmup(*args, **constants, **_options(tile), grid=grid)

    with (
        _in_place(architecture, launch),
        patch.object(triton.JITFunction, "_do_compile", compile_nothing),
    ):
        yield counted


@contextmanager
def compiling(
    architecture: int, only: str = "", look: Callable[[Compiled, Any], None] | None = None,
    l2: int = 0, record: Mapping[str, Compiled] = MappingProxyType({}),
) -> Iterator[list[Compiled]]:  # fmt: skip
    """Host code that is called within it compiles its kernels, or the one of a name; each is listed
    once, and `look` sees what Triton has to make. `l2`: bytes of the GPU's, 0 where no library
    is to multiply long vectors. `record`: what need not be compiled again, by its key."""
    made: list[Compiled] = []
    seen: set[Any] = set()
    compile_ = triton.JITFunction._do_compile
    key = ""

    def compile_unknown(kernel: Any, cached: Any, signature: Any, device: Any, constants: Any,
                        options: Any, attributes: Any, warmup: bool) -> Any:  # fmt: skip
        nonlocal key
        source = kernel.ASTSource(kernel, signature, constants, attributes).hash()
        key = _key(source, options, architecture)
        if key in record:
            return None
        return compile_(kernel, cached, signature, device, constants, options, attributes, warmup)

    def launch(
        kernel: Any, grid: Any, *args: Any, tile: Tile | None = None, **constants: Any
    ) -> None:
        nonlocal key
        name, key = kernel.fn.__name__, ""
        if only not in ("", name):
            return
        found, error = None, ""
        try:
            found = kernel.warmup(*args, **constants, **_options(tile), grid=grid)
        except Exception as raised:  # whatever a compiler raises
            error = _reason(raised)
        key = key or error  # of arguments that do not bind; "" of what is compiled already
        if not key or key in seen:
            return
        seen.add(key)
        if found is not None:
            result = _report(name, tile, found)
        else:
            result = Compiled(name, tile, error=error) if error else record[key]
        result = result._replace(grid=grid, key=key)
        made.append(result)
        if look is not None and found is not None:
            look(result, found)

    with (
        _in_place(architecture, launch, l2),
        patch.object(triton.JITFunction, "_do_compile", compile_unknown),
    ):
        yield made


def _key(source: str, options: Any, architecture: int) -> str:
    """Of a source's hash, by Triton, and how it is compiled; the same on every machine."""
    paths = "extern_libs"
    chosen = {name: value for name, value in vars(options).items() if name != paths}
    text = repr((triton.__version__, architecture, source, sorted(chosen.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _options(tile: Tile | None) -> dict[str, Any]:
    """As `launching.launch` gives them."""
    pipeline = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    return {"enable_fp_fusion": True, **pipeline}


@contextmanager
def _in_place(architecture: int, launch: Callable[..., None], l2: int = 0) -> Iterator[None]:
    """A launch in the place of the engine's, and a GPU in that of the machine's."""
    triton.runtime.driver.set_active(Driver(architecture))
    properties = Properties(architecture, PROCESSORS, l2)
    with (
        patch.object(engine, "launch", launch),
        patch.object(configs, "properties", lambda device: properties),
    ):
        yield


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def _report(kernel: str, tile: Tile | None, found: Any) -> Compiled:
    ptx = found.asm["ptx"]
    used = _usage(found.asm["cubin"])
    return Compiled(
        kernel,
        tile,
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=found.metadata.shared,
        tensor=getattr(found.metadata, "tmem_size", None) or 0,
        instruction=next((name for name, text in INSTRUCTIONS.items() if text in ptx), ""),
        calls=len(re.findall(r"^\s*call\b", ptx, re.MULTILINE)),
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """Resources of the only kernel of a binary, by the tool that comes with Triton."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
