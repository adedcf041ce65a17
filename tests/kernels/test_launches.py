"""Every loss of the table starts its kernels as on a GPU, without one: see launches, fake_cuda."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loss_calls import FIRST
from torch._subclasses.fake_tensor import FakeTensorMode

from contrastive_kernels.backends import TRITON_ERROR
from contrastive_kernels.losses.table import CASES

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(TRITON_ERROR is not None, reason=f"no Triton: {TRITON_ERROR}")
NAMES = [n for n, (row, case) in CASES.items() if "triton" in (case.backends or row.backends)]
# The most kernels that value and gradients of a few rows take.
MOST = {
    "info_nce": 5, "info_nce frozen": 5, "info_nce own": 9, "clip_loss": 5, "siglip_loss": 8,
    "nt_xent": 5, "sup_con": 5, "cacr": 5, "dcl": 5,
}  # fmt: skip
OF_ANY_CASE = 45  # three prefixes, in four directions each
# Of 1,024 rows, where the other side is cut into parts: kernels of ours, and torch's own.
OF_1024 = {"info_nce": (6, 9), "clip_loss": (6, 17), "nt_xent": (6, 11)}
# Those that are compiled and launched here. CK_PROOF=1: one case of every loss.
LAUNCHED = ["info_nce", "siglip_loss", "info_nce own"]
TIMED = "info_nce"
# of a launch: functions of Python and of C that are called, and the host's time
FUNCTIONS, MICROSECONDS = 120, 15.0
if os.environ.get("CK_PROOF") == "1":
    LAUNCHED = [name for name in FIRST.values() if name in NAMES]


def printed(program: str, *arguments: str) -> list[dict]:
    """What a program beside this file prints, in a process without the interpreter."""
    environment = dict(os.environ, PYTHONPATH=str(HERE.parents[1]))
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, HERE / program, *arguments], env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def counted() -> list[dict]:
    return printed("launches.py")


def test_every_loss_binds_its_kernels(counted):
    cases = [found for found in counted if "name" in found]
    assert list(dict.fromkeys(found["name"] for found in cases)) == NAMES
    assert {found["dtype"] for found in cases} == {"bfloat16", "float16", "float32"}
    assert not [found for found in cases if "error" in found]
    assert all(found["launches"] for found in cases)


def test_no_loss_waits_for_a_gpu(counted):
    waiting = {found["name"]: found["waits"] for found in counted if found.get("waits")}
    assert not waiting


def test_losses_take_few_kernels(counted):
    counts = {found["name"]: len(found["launches"]) for found in counted if "name" in found}
    assert {name: counts[name] for name in MOST if counts[name] > MOST[name]} == {}
    assert max(counts.values()) <= OF_ANY_CASE


def test_a_small_batch_takes_few_kernels(counted):
    found = {
        one["batches"]: (len(one["launches"]), len(one["started"]))
        for one in counted if "batches" in one
    }  # fmt: skip
    assert found == OF_1024


def test_batches_share_kernels(counted):
    """Powers of two from 256 to 8,192: a count of tiles or parts makes no kernel of its own."""
    kernels = {found["batches"]: found["kernels"] for found in counted if "batches" in found}
    assert len(kernels) == 3
    assert {loss: len(made) for loss, made in kernels.items() if len(made) > 15} == {}


def test_a_kept_kernel_is_started_for_what_it_was_compiled_for(counted):
    """What Triton tells apart has keys of its own: over every loss, and one argument at a time."""
    assert not {found["name"]: found["mixed"] for found in counted if found.get("mixed")}
    (found,) = [found for found in counted if "changed" in found]
    assert found["changed"] > found["made"] > 100 and not found["mixed"]


def test_kernels_are_launched_on_the_device_of_their_tensors(counted):
    assert not {str(found): found["unguarded"] for found in counted if found.get("unguarded")}
    (beside,) = [found["beside"] for found in counted if "beside" in found]
    assert "top_k_kernel" in beside


def test_the_device_of_tensors_is_made_current():
    from contrastive_kernels.triton import launching

    with FakeTensorMode():
        second = torch.empty(3, device="cuda:1")
    made = launching.device_of(second)
    assert isinstance(made, torch.cuda.device) and made.idx == 1
    assert not isinstance(launching.device_of(torch.empty(3)), torch.cuda.device)


class Launcher:
    """As Triton's, which hands its function in C more than it was given."""

    def __init__(self, handed: Callable[..., tuple]):
        self.handed, self.started = handed, []

    def launch(self, *given) -> None:
        self.started.append(given)

    def __call__(self, x, y, z, stream, function, metadata, *rest) -> None:
        self.launch(*self.handed((x, y, z, stream, function), (metadata,), rest[:3], rest[3:]))


@pytest.mark.parametrize(
    ("handed", "spread"),
    [
        (lambda first, metadata, hooks, args: (*first, 0, *metadata, *hooks, *args), True),
        (lambda first, metadata, hooks, args: (*first, *metadata, *hooks, b"i", args), False),
        (lambda first, metadata, hooks, args: (*first[::-1], *metadata, *hooks, *args), None),
        (lambda first, metadata, hooks, args: (*first, *metadata, *args, *hooks), None),
        (lambda first, *_: (*first, torch.empty(3), *_[-1]), None),  # a workspace of each launch
        (lambda first: (), None),
    ],
)
def test_launchers_of_other_versions_are_left_to_triton(handed, spread):
    from contrastive_kernels.triton import launching

    compiled = SimpleNamespace(run=Launcher(handed), function=7, packed_metadata=(4, 1, 0))
    kept = launching.learned(compiled, [128])
    assert (kept is None) == (spread is None)
    assert not compiled.run.started  # nothing ran
    if kept is not None:
        assert kept.spread == spread and kept.constants == [128]
        kept.start(*"xyzs", *kept.fixed, *((1,) if spread else ((1,),)))
        assert compiled.run.started == [handed((*"xyzs", 7), ((4, 1, 0),), (None,) * 3, (1,))]


@pytest.fixture(scope="module")
def launched() -> dict[str, dict]:
    if torch.cuda.is_available():
        pytest.skip("there is a real driver")
    if shutil.which("gcc") is None:
        pytest.skip("the driver is built by gcc")
    found = printed("fake_cuda.py", *LAUNCHED, f"{TIMED}:1024")
    return {one.get("name", "host"): one for one in found}


def test_kernels_are_launched(launched):
    for name in LAUNCHED:
        first, again, elsewhere = (launched[name][k] for k in ("first", "again", "on another"))
        assert first["launched"] == again["launched"] == len(first["asked"]) > 0, name
        assert not again["bound"], name  # past Triton's binder
        assert elsewhere["launched"] == first["launched"] and elsewhere["bound"], name


def test_a_launch_takes_the_host_little(launched):
    """A bound of what does not depend on the machine, and of the shortest of many on a busy one."""
    host = launched["host"]
    assert host["loss"] == TIMED and len(host["functions"]) == len(host["microseconds"]) == 5
    assert max(host["functions"].values()) <= FUNCTIONS
    assert max(host["microseconds"].values()) <= 4 * MICROSECONDS
