"""Every loss of the table starts its kernels as on a GPU, without one: see launches, fake_cuda."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_calls import FIRST

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
    assert [found["name"] for found in cases] == [name for name in NAMES for _ in range(3)]
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


def test_launchers_of_other_versions_are_left_to_triton():
    from contrastive_kernels.triton import launching

    def known(gridX, gridY, gridZ, stream, function, *args):  # noqa: N803
        pass

    def other(grid, stream, function, *args):
        pass

    assert launching._is_known(known) and not launching._is_known(other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real driver")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the driver is built by gcc")
def test_kernels_are_launched():
    found = printed("fake_cuda.py", *LAUNCHED)
    assert [one["name"] for one in found] == LAUNCHED
    for one in found:
        assert one["launched"] == one["again"] == len(one["asked"]) > 0, one
        assert not one["bound again"], one  # past Triton's binder
