"""What each case of the table of losses launches in forward and backward, without a GPU.

Run as a program: prints a line of JSON for each case and dtype, one for each loss of BATCHES, one
of changed arguments, and one of what no loss launches. Triton binds and specialises the arguments
of every launch as on an sm_90; nothing is compiled, and nothing runs.
"""

from benchmarks.gpu import stand_in  # noqa: F401, I001  first of all

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive_kernels as ck
from contrastive_kernels import checks, ops
from contrastive_kernels import triton as operators
from contrastive_kernels.losses.cases import call, tensors
from contrastive_kernels.losses.table import CASES
from contrastive_kernels.ops.schemas import ARGUMENTS
from contrastive_kernels.triton import engine, nested
from contrastive_kernels.triton.compile import Counted, counting

ARCHITECTURE = 90
# Rows of batches that one kernel of each kind should serve, as far as it can.
BATCHES = {"info_nce": (), "clip_loss": (10.0,), "nt_xent": ()}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
POWERS = [2**k for k in range(8, 14)]
# What starts no kernel, though it returns no view.
WITHOUT = {"empty", "empty_strided", "empty_like", "new_empty", "detach"}
# What needs to know a number that is on the device, by the operators that it comes to.
WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip


class Operators(NamedTuple):
    """torch's own: those that would wait for a GPU, and those that would start kernels."""

    waiting: set[str]
    started: list[str]


class Watched(TorchDispatchMode):
    """Looks at the operators within it."""

    def __init__(self, found: Operators):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        space, name = operator._schema.name.split("::")
        views = [r.alias_info for r in operator._schema.returns if r.alias_info is not None]
        if space == "aten" and not (views and not views[0].is_write) and name not in WITHOUT:
            self.found.started.append(name)
        masks = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        lengths = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or masks or lengths:
            self.found.waiting.add(name)
        return operator(*args, **kwargs)


@contextmanager
def watched() -> Iterator[Operators]:
    """Those that run within it, in the operators of this package too."""
    found = Operators(set(), [])

    def seen(function):
        def run(*arguments):
            with Watched(found):
                return function(*arguments)

        return run

    with ExitStack() as stack:
        of_nested = ("nested_stats", "nested_stats_backward")
        for module, names in ((operators, ARGUMENTS), (nested, of_nested)):
            for name in names:
                stack.enter_context(patch.object(module, name, seen(getattr(module, name))))
        # looks at the numbers themselves on a CPU alone
        plain = patch.object(checks, "check_numbers", lambda name, numbers, *_: numbers.long())
        stack.enter_context(plain)
        stack.enter_context(Watched(found))
        yield found


@contextmanager
def elsewhere() -> Iterator[list[str]]:
    """Tensors are on another device than the current one: the kernels that are launched without
    making theirs current."""
    wrong: list[str] = []
    current = 0
    launch = engine.launch

    @contextmanager
    def device_of(_: Tensor) -> Iterator[None]:
        nonlocal current
        before, current = current, 1
        yield
        current = before

    def checked(kernel, *arguments, **options) -> None:
        if current == 0:
            wrong.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("contrastive_kernels.triton") and hasattr(module, "device_of"):
                stack.enter_context(patch.object(module, "device_of", device_of))
        stack.enter_context(patch.object(engine, "launch", checked))
        yield wrong


def step(name: str, dtype: torch.dtype) -> Tensor:
    """The value of a case, whose gradients are taken."""
    row, case = CASES[name]
    value = call(row.function, case, tensors(case, dtype=dtype), backend="triton")
    value.backward()
    return value


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """Those of a case: the first of a loss has all, the others one each in turn."""
    row, _ = CASES[name]
    place = list(row.cases).index(name)
    return DTYPES if place == 0 else (DTYPES[place % len(DTYPES)],)


def results() -> Iterator[dict]:
    for name, (row, case) in CASES.items():
        if "triton" not in (case.backends or row.backends):
            continue
        for dtype in dtypes_of(name):
            found = {"name": name, "dtype": str(dtype)[6:]}
            with counting(ARCHITECTURE) as counted, watched() as own, elsewhere() as unguarded:
                try:
                    step(name, dtype)
                except Exception as failure:
                    found["error"] = f"{type(failure).__name__}: {failure}"
            found |= {"launches": counted.launches, "waits": sorted(own.waiting)}
            found |= {"unguarded": unguarded, "mixed": mixed(counted)}
            yield found | {"kernels": list(counted.kernels)}


def beside() -> dict:
    """What no loss of the table launches."""
    x, y = (torch.randn(n, 32).bfloat16() for n in (64, 100))
    with counting(ARCHITECTURE) as counted, elsewhere() as unguarded:
        ops.top_k(x, y, 4, backend="triton")
    return {"beside": counted.launches, "unguarded": unguarded}


def mixed(counted: Counted) -> list[str]:
    """Kernels that are compiled apart, but have a key of `launching` in common."""
    seen: dict[tuple, tuple] = {}
    return [
        kernel[0]
        for kernel, keys in counted.kernels.items()
        for key in keys
        if seen.setdefault(key, kernel) != kernel
    ]


def changes(arg) -> list:
    """Other arguments in the place of one, of which Triton makes kernels of their own."""
    if isinstance(arg, Tensor):
        narrow = {4: torch.int16, 2: torch.int8, 8: torch.float16}[arg.element_size()]
        return [None, arg.new_empty(arg.numel() + 1)[1:].view(arg.shape), arg.to(narrow)]
    return [1, 2, 16, 3 << 31, 1 << 35] if isinstance(arg, int) else [torch.zeros(1)]


def changed(args: tuple) -> Iterator[tuple]:
    """The arguments, and with every one of them changed in turn, those within tuples too."""
    yield args
    for i, arg in enumerate(args):
        if isinstance(arg, tuple):
            inner = (type(arg)(*each) for each in changed(arg))
        else:
            inner = changes(arg)
        yield from ((*args[:i], each, *args[i + 1 :]) for each in inner)


def specialised() -> dict:
    """Each launch of a step again with changed arguments, constants, warps and devices."""
    given = []
    with counting(ARCHITECTURE) as counted:
        launch = engine.launch
        with patch.object(engine, "launch", lambda *a, **k: given.append((a, k))):
            x, y = (torch.randn(64, 32).bfloat16().requires_grad_() for _ in range(2))
            ck.info_nce(x, y, backend="triton").backward()
        for (kernel, grid, *args), options in given:
            for each in changed(tuple(args)):
                launch(kernel, grid, *each, **options)
            others = [{name: 3} for name in options if name != "tile"]
            if "tile" in options:
                tile = options["tile"]
                others += [{"tile": tile._replace(warps=2)}, {"tile": tile._replace(stages=7)}]
            for other in others:
                launch(kernel, grid, *args, **options | other)
    return {"changed": len(counted.launches), "made": len(counted.kernels), "mixed": mixed(counted)}


def batches() -> Iterator[dict]:
    for loss, more in BATCHES.items():
        with counting(ARCHITECTURE) as counted:
            for rows in POWERS:
                x, y = (torch.randn(rows, 128).bfloat16().requires_grad_() for _ in range(2))
                getattr(ck, loss)(x, y, *more, backend="triton").backward()
        kernels = list(counted.kernels)
        x, y = (torch.randn(1024, 128).bfloat16().requires_grad_() for _ in range(2))
        with counting(ARCHITECTURE) as counted, watched() as own:
            getattr(ck, loss)(x, y, *more, backend="triton").backward()
        small = {"launches": counted.launches, "started": own.started}
        yield {"batches": loss, "kernels": kernels, **small}


if __name__ == "__main__":
    for result in chain(results(), batches(), [specialised(), beside()]):
        print(json.dumps(result), flush=True)
