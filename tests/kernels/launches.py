"""What each case of the table of losses launches in forward and backward, without a GPU.

Run as a program: prints a line of JSON for each case and dtype, and one for each loss of BATCHES.
Triton binds and specialises the arguments of every launch as on an sm_90; nothing is compiled, and
nothing runs.
"""

from benchmarks.gpu import stand_in  # noqa: F401, I001  first of all

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive_kernels as ck
from contrastive_kernels import checks
from contrastive_kernels import triton as operators
from contrastive_kernels.losses import distances
from contrastive_kernels.losses.cases import call, tensors
from contrastive_kernels.losses.table import CASES
from contrastive_kernels.ops.registration import ARGUMENTS
from contrastive_kernels.triton.compile import counting

ARCHITECTURE = 90
# Rows of batches that one kernel of each kind should serve, as far as it can.
BATCHES = {"info_nce": (), "clip_loss": (10.0,), "nt_xent": ()}
POWERS = [2**k for k in range(8, 14)]
# What needs to know a number that is on the device, by the operators that it comes to.
WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """The operators within it that would wait for a GPU."""

    def __init__(self, found: set[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator._schema.name.split("::")[1]
        masks = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        lengths = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or masks or lengths:
            self.found.add(name)
        return operator(*args, **kwargs)


@contextmanager
def waits() -> Iterator[set[str]]:
    """Those that run within it, in the operators of this package too."""
    found: set[str] = set()

    def seen(function):
        def run(*arguments):
            with Waits(found):
                return function(*arguments)

        return run

    with ExitStack() as stack:
        for name in ARGUMENTS:
            stack.enter_context(patch.object(operators, name, seen(getattr(operators, name))))
        # looks at the numbers themselves on a CPU alone
        plain = patch.object(checks, "check_numbers", lambda name, numbers, *_: numbers.long())
        stack.enter_context(plain)
        stack.enter_context(patch.object(distances, "_may_look", lambda x: False))
        stack.enter_context(Waits(found))
        yield found


def step(name: str, dtype: torch.dtype) -> Tensor:
    """The value of a case, whose gradients are taken."""
    row, case = CASES[name]
    value = call(row.function, case, tensors(case, dtype=dtype), backend="triton")
    value.backward()
    return value


def results() -> Iterator[dict]:
    for name, (row, case) in CASES.items():
        if "triton" not in (case.backends or row.backends):
            continue
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found = {"name": name, "dtype": str(dtype)[6:]}
            with counting(ARCHITECTURE) as counted, waits() as waiting:
                try:
                    step(name, dtype)
                except Exception as failure:
                    found["error"] = f"{type(failure).__name__}: {failure}"
            found |= {"launches": counted.launches, "waits": sorted(waiting)}
            yield found | {"kernels": list(counted.kernels)}


def batches() -> Iterator[dict]:
    for loss, more in BATCHES.items():
        with counting(ARCHITECTURE) as counted:
            for rows in POWERS:
                x, y = (torch.randn(rows, 128).bfloat16().requires_grad_() for _ in range(2))
                getattr(ck, loss)(x, y, *more, backend="triton").backward()
        yield {"batches": loss, "kernels": list(counted.kernels)}


if __name__ == "__main__":
    for result in chain(results(), batches()):
        print(json.dumps(result), flush=True)
