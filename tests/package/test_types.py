"""What type checkers and `help` know of the package."""

import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import contrastive_kernels as ck
from contrastive_kernels.losses.base import _described
from contrastive_kernels.losses.table import LOSSES

ROOT = Path(ck.__file__).parents[1]

# what is ignored must be an error: warn_unused_ignores
PROGRAM = """
import torch
from torch import Tensor

import contrastive_kernels as ck

x, y = torch.randn(8, 4), torch.randn(8, 4)
loss: Tensor = ck.info_nce(x, y, temperature=0.1, reduction="mean")
value, found = ck.info_nce(x, y, negatives=[y], return_stats=True)
sum_of_both: Tensor = loss + value
accuracy: Tensor | None = found.accuracy
stats: ck.LossStats = found
ck.info_nce(x, y, temprature=0.1)  # type: ignore[call-overload]
ck.info_nce(x, y, temperature="cold")  # type: ignore[call-overload]
distilled: Tensor = ck.clip_distill(x, y, 1.0, x, y, 1.0)
ck.clip_distill(x, y, 1.0, x, y)  # type: ignore[call-arg]

module = ck.InfoNCE(temperature=0.2)
loss = module(x, y)

rows: ck.RowStats = ck.row_stats(x, y, scale=2.0)
both: ck.RowColumnStats = ck.row_stats(x, y, columns=True)
wrong: ck.RowStats = ck.row_stats(x, y, columns=True)  # type: ignore[assignment]
ck.row_stats(x, y, scales=2.0)  # type: ignore[call-overload]

z: Tensor = ck.whiten(x)
z, ok = ck.whiten(x, return_info=True)
failed: Tensor = ~ok

queue = ck.FeatureQueue(16, 4, dtype=torch.bfloat16)
queue.enqueue(x)
negatives: Tensor = queue.negatives
source: ck.NegativeSource = ck.FileNegatives("rows.npy")
loss = ck.info_nce(x, y, negatives=source)
"""


def functions(owner: object) -> list[object]:
    """A function, or the methods of a class."""
    if not inspect.isclass(owner):
        return [owner] if callable(owner) else []
    members = (getattr(member, "fget", member) for member in vars(owner).values())
    members = (getattr(member, "__func__", member) for member in members)
    return [owner, *(member for member in members if inspect.isfunction(member))]


@pytest.mark.parametrize("name", ck.__all__)
def test_hints_of_what_is_public_can_be_read(name):
    for function in functions(getattr(ck, name)):
        typing.get_type_hints(function)


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_hints_of_losses_are_complete(row):
    hints = typing.get_type_hints(row.function)
    assert hints.keys() == {*inspect.signature(row.function).parameters, "return"}
    assert "return" in typing.get_type_hints(row.module.forward)


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_help_describes_every_argument(row):
    described = _described(inspect.getdoc(row.function))
    assert described.keys() == inspect.signature(row.function).parameters.keys()
    assert all(described.values())


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="an installed package")
def test_a_typed_program(tmp_path):
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(program)],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
