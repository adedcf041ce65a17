"""Runs Gluon kernels on tensors of a CPU, from their own source: a warp or warpgroup is a thread.

Gluon has no interpreter. Here its operations are those of torch, layouts mean nothing, and one
thread runs at a time: at each operation on a barrier, a buffer or a product the next is drawn.
Copies by TMA end at any time, with NaN in the buffer until then; a product reads its buffers when
it is waited for, and must find there what it found when it was started. Each part's operations are
recorded, so that `schedules.py` can go through all of their orders.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

PACKAGE = Path(__file__).resolve().parents[2] / "contrastive_kernels" / "triton"
# What kernels are made of; each imports only from those before it.
SOURCES = ("folds", "tiles", "gradient", "sweep", "hopper_sweep")


class Value(torch.Tensor):
    """A tensor whose augmented assignments make a new one, as those of a kernel do."""

    type = SimpleNamespace(layout=None)

    def __iadd__(self, other):
        return self + other

    def __imul__(self, other):
        return self * other

    def __isub__(self, other):
        return self - other


def value(data: Any, dtype: torch.dtype | None = None) -> Value:
    return torch.as_tensor(data, dtype=dtype).as_subclass(Value)


class Pointer:
    def __init__(self, data: torch.Tensor, offset: Any = 0):
        self.data, self.offset = data, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + offset)


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Value:
    """Every address that is read must be there."""
    at = value(pointer.offset, torch.int64)
    if mask is not None:
        at, mask = torch.broadcast_tensors(at, mask)
        return value(torch.where(mask, pointer.data[torch.where(mask, at, 0)], other))
    assert int(at.min()) >= 0 and int(at.max()) < len(pointer.data)
    return value(pointer.data[at])


def store(pointer: Pointer, what: Any, mask: Any = None) -> None:
    at, what = torch.broadcast_tensors(value(pointer.offset, torch.int64), value(what))
    keep = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand(at.shape)
    pointer.data[at[keep]] = what[keep].to(pointer.data.dtype)


class Memory:
    """Shared memory, whole or one buffer of it; `content` says what lies in a buffer."""

    def __init__(self, data: torch.Tensor, name: str, contents: dict[str, Any]):
        self.data, self.name, self.contents = data, name, contents
        self.shape, self.dtype = tuple(data.shape), data.dtype

    def index(self, at: Any) -> Memory:
        return Memory(self.data[int(at)], f"{self.name}[{int(at)}]", self.contents)

    def permute(self, order: tuple[int, int]) -> Memory:
        return Memory(self.data.permute(order), self.name, self.contents)

    def load(self, _layout: Any) -> Value:
        current.step(Operation("read", contents=((self.name, self.content),)))
        assert self.content is not None, "a buffer is not full"
        return value(self.data.clone())

    @property
    def content(self) -> Any:
        return self.contents.get(self.name)


class Descriptor(NamedTuple):
    data: torch.Tensor
    block_shape: list[int]
    layout: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def block(self, start: int) -> torch.Tensor:
        """Zeros beyond the end."""
        made = self.data.new_zeros(self.block_shape)
        rows = self.data[start : start + self.block_shape[0]]
        made[: len(rows)] = rows
        return made


class Barrier(NamedTuple):
    """Arrivals in all and pending, bytes still to come, and the parity of the present phase."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def after(self, arrivals: int = 0, more: int = 0) -> Barrier:
        now = self._replace(pending=self.pending - arrivals, bytes=self.bytes + more)
        assert now.pending >= 0, "more arrive than the barrier counts"
        if now.pending == 0 and now.bytes == 0:
            return now._replace(pending=self.count, phase=1 - self.phase)
        return now

    def passed(self, parity: int) -> bool:
        return self.phase != parity


class Operation(NamedTuple):
    """Of one part: what it does to which barrier or buffers, and with what."""

    kind: str
    name: str = ""
    number: int = 0
    contents: tuple[tuple[str, Any], ...] = ()


class Product(NamedTuple):
    a: Any
    b: Memory
    sum: torch.Tensor
    read: tuple[Memory, ...]
    found: list[Any]

    def result(self) -> Value:
        assert [one.content for one in self.read] == self.found, "a buffer was overwritten"
        a = self.a.data if isinstance(self.a, Memory) else self.a
        return value(self.sum + a.float() @ self.b.data.float())


class Program:
    """One program: its barriers and buffers, its parts, and who runs."""

    def __init__(self, grid: tuple[int, int], seed: int):
        self.grid, self.random = grid, random.Random(seed)
        self.barriers: dict[str, Barrier] = {}
        self.contents: dict[str, Any] = {}
        self.copies: list[Callable[[], None]] = []
        self.traces: list[list[Operation]] = []
        self.names = 0
        self.local = threading.local()

    def run(self, parts: list[Callable[[], None]]) -> None:
        """Until all are done; raises what a part raises, and where nobody can go on."""
        self.conditions: list[Callable[[], bool] | None] = [lambda: True] * len(parts)
        self.traces = [[] for _ in parts]
        self.baton = [threading.Semaphore(0) for _ in parts]
        self.back = threading.Semaphore(0)
        self.errors: list[BaseException] = []

        def body(index: int, part: Callable[[], None]) -> None:
            self.local.index = index
            self.baton[index].acquire()
            try:
                part()
            except BaseException as error:
                self.errors.append(error)
            self.conditions[index] = None
            self.back.release()

        for index, part in enumerate(parts):
            threading.Thread(target=body, args=(index, part), daemon=True).start()
        while any(self.conditions) and not self.errors:
            able = [i for i, ready in enumerate(self.conditions) if ready is not None and ready()]
            if self.copies and (not able or self.random.random() < 0.3):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            assert able, "nobody can go on"
            self.baton[self.random.choice(able)].release()
            self.back.acquire()
        if self.errors:
            raise self.errors[0]

    def step(self, operation: Operation, ready: Callable[[], bool] = lambda: True) -> None:
        """Lets others run before a part's operation, until it is possible."""
        index = self.local.index
        self.conditions[index] = ready
        self.back.release()
        self.baton[index].acquire()
        self.traces[index].append(operation)

    def name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}{self.names}"


current: Program


class mbarrier:
    MBarrierLayout = staticmethod(lambda: None)

    @staticmethod
    def init(barrier: Memory, count: int) -> None:
        current.barriers[barrier.name] = Barrier(count, count)

    @staticmethod
    def wait(barrier: Memory, parity: Any) -> None:
        name, parity = barrier.name, int(parity)
        operation = Operation("wait", name, parity)
        current.step(operation, lambda: current.barriers[name].passed(parity))

    @staticmethod
    def arrive(barrier: Memory, count: int = 1) -> None:
        current.step(Operation("arrive", barrier.name, count))
        current.barriers[barrier.name] = current.barriers[barrier.name].after(count)

    @staticmethod
    def expect(barrier: Memory, size: int) -> None:
        current.step(Operation("expect", barrier.name, int(size)))
        current.barriers[barrier.name] = current.barriers[barrier.name].after(1, int(size))


def async_load(tiles: Descriptor, at: list[Any], barrier: Memory, buffer: Memory) -> None:
    start = int(at[0])
    block = tiles.block(start)
    size = block.numel() * block.element_size()
    made = (buffer.name, start)
    current.step(Operation("copy", barrier.name, size, (made,)))
    program = current
    buffer.data.fill_(float("nan"))
    program.contents[buffer.name] = None

    def end() -> None:
        buffer.data.copy_(block)
        program.contents[buffer.name] = start
        program.barriers[barrier.name] = program.barriers[barrier.name].after(0, -size)

    program.copies.append(end)


def warpgroup_mma(a, b, total, *, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    read = tuple(one for one in (a, b) if isinstance(one, Memory))
    current.step(Operation("multiply", contents=tuple((m.name, m.content) for m in read)))
    assert all(m.content is not None for m in read), "a buffer is not full"
    start = total if use_acc else torch.zeros_like(total)
    return Product(a, b, start, read, [m.content for m in read])


def warpgroup_mma_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
    assert outstanding == 0
    current.step(Operation("finish"))
    done = tuple(one.result() if isinstance(one, Product) else one for one in deps)
    return done[0] if len(done) == 1 else done


def warp_specialize(parts: list[tuple[Callable, tuple]], warps: Any, registers: Any) -> None:
    current.run([lambda part=part, args=args: part(*args) for part, args in parts])


def jit(function: Callable | None = None, **_options: Any) -> Callable:
    return (lambda made: made) if function is None else function


def language() -> ModuleType:
    """What both `triton.language` and Gluon's have."""
    module = ModuleType("language")
    identity = lambda x: x  # noqa: E731
    operations = {
        "constexpr": identity, "load": load, "store": store, "static_range": range,
        "arange": lambda a, b, _layout=None: value(torch.arange(a, b)),
        "zeros": lambda shape, dtype, _layout=None: value(torch.zeros(shape, dtype=dtype)),
        "where": lambda c, a, b: value(torch.where(value(c), value(a), value(b))),
        "maximum": lambda a, b: torch.maximum(value(a), value(b)),
        "minimum": lambda a, b: torch.minimum(value(a), value(b)),
        "max": lambda x, axis: x.amax(axis), "sum": lambda x, axis: x.sum(axis),
        "exp2": torch.exp2, "log2": torch.log2, "abs": torch.abs,
        "cast": lambda x, dtype: value(x, dtype), "cdiv": lambda a, b: -(-a // b),
        "expand_dims": torch.unsqueeze,
        "program_id": lambda axis: value(current.grid[axis]),
        "convert_layout": lambda x, _layout: x, "warp_specialize": warp_specialize,
    }  # fmt: skip
    for name, operation in operations.items():
        setattr(module, name, operation)
    for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64"):
        setattr(module, name, getattr(torch, name))
    for name in ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout"):
        setattr(module, name, lambda *_arguments: None)
    module.tensor = module.dtype = torch.Tensor

    def allocate_shared_memory(dtype: torch.dtype, shape: list[int], _layout: Any) -> Memory:
        data = torch.full(shape, -1 if dtype == torch.int64 else float("nan"), dtype=dtype)
        kind = "barrier" if dtype == torch.int64 else "buffer"
        return Memory(data, current.name(kind), current.contents)

    module.allocate_shared_memory = allocate_shared_memory
    return module


def emulated(changes: dict[str, tuple[str, str]] | None = None) -> dict[str, ModuleType]:
    """The modules of the kernels on these operations; `changes` of their text, by their names."""
    names = language()
    triton = ModuleType("triton")
    triton.jit, triton.language = jit, names
    gluon = ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.language = jit, names
    hopper = ModuleType("hopper")
    hopper.mbarrier, hopper.tma = mbarrier, SimpleNamespace(async_load=async_load)
    hopper.fence_async_shared = lambda: None
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = warpgroup_mma, warpgroup_mma_wait
    experimental = ModuleType("triton.experimental")
    experimental.gluon, triton.experimental = gluon, experimental
    root = "emulated_kernels"
    configs = ModuleType(f"{root}.configs")
    configs.INTERPRETED = True
    package = ModuleType(root)
    package.__path__ = []
    replaced = {
        "triton": triton, "triton.language": names, "triton.experimental": experimental,
        "triton.experimental.gluon": gluon, "triton.experimental.gluon.language": names,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        root: package, configs.__name__: configs,
    }  # fmt: skip
    before = {name: sys.modules.get(name) for name in replaced}
    made: dict[str, ModuleType] = {}
    sys.modules.update(replaced)
    try:
        for name in SOURCES:
            module = ModuleType(f"{root}.{name}")
            module.__package__ = root
            path = PACKAGE / f"{name}.py"
            sys.modules[module.__name__] = made[name] = module
            text = path.read_text()
            if changes and name in changes:
                assert changes[name][0] in text
                text = text.replace(*changes[name])
            exec(compile(text, str(path), "exec"), module.__dict__)
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name)
            else:
                sys.modules[name] = module
        for name in SOURCES:
            sys.modules.pop(f"{root}.{name}")
    return made


def launch(kernel: Callable, grid: tuple[int, ...], seed: int, *arguments: Any, **constants: Any):
    """Every program of a grid, one after another; returns the last, for its record."""
    global current
    for first in range(grid[0]):
        for second in range(grid[1]):
            current = Program((first, second), seed)
            kernel(*arguments, **constants)
    return current
