"""CK_DISABLE=1: every loss is the dense reference, every drop-in the package's own code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys, warnings
sys.path.insert(0, "tests")
import torch
import contrastive_kernels as ck
import loss_calls

said = {"losses": [], "drop-in": []}
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for name in loss_calls.CASES:
        given = loss_calls.inputs(name, torch.float32)
        named = {"backend": "reference"} if "reference" in loss_calls.backends(name) else {}
        expected = loss_calls.ours(name, **named)(*given)
        assert torch.equal(loss_calls.ours(name)(*given), expected), name
said["losses"] = [str(line.message) for line in seen if "contrastive" in str(line.message)]

x = torch.randn(7, 5)
try:
    ck.nt_xent(x, x, backend="cpu")
except RuntimeError as error:
    said["named"] = str(error)

try:
    from info_nce import InfoNCE
except ImportError:
    pass
else:
    expected = InfoNCE()(x, x)
    ck.patch("info_nce")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(InfoNCE()(x, x), expected)
    (status,) = ck.patch_status()["info_nce"].values()
    said["drop-in"] = [status.fused, status.fallback, *(str(line.message) for line in seen)]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "CK_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_loss_is_the_reference_and_says_so_once(said):
    (line,) = said["losses"]
    assert line.endswith("backend 'cpu' cannot be used: CK_DISABLE=1 is set")


def test_a_named_engine_is_refused(said):
    assert said["named"] == 'backend="cpu" cannot run on cpu tensors: CK_DISABLE=1 is set'


def test_a_drop_in_runs_the_package_and_says_so_once(said):
    pytest.importorskip("info_nce")
    fused, reasons, warning = said["drop-in"]
    assert (fused, reasons) == (0, {"CK_DISABLE=1 is set": 2})
    assert warning.endswith(" runs unfused: CK_DISABLE=1 is set")
