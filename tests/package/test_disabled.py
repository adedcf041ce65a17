"""CK_DISABLE=1: every loss is the dense reference, every drop-in the package's own code."""

import json

import pytest
from fresh import run_python

SCRIPT = """
import json, os, warnings
os.environ["CK_DISABLE"] = "1"
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
    return json.loads(run_python(SCRIPT))


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
