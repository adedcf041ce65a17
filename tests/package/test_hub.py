"""The kernel repository for the Hub: what `kernels` reads of it, and the package under its name."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from fresh import run_python

ROOT = Path(__file__).resolve().parents[2]

# as the kernels package imports a variant
LOAD = """
import importlib.util, os, sys
os.environ["TRITON_INTERPRET"] = "1"
os.chdir(sys.argv[1])
spec = importlib.util.spec_from_file_location("kernel_1a2b3c", sys.argv[1] + "/__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = kernel
spec.loader.exec_module(kernel)

import torch
generator = torch.Generator().manual_seed(0)
x, y = (torch.randn(19, 8, generator=generator, requires_grad=True) for _ in range(2))
numbers = {}
for backend in ("triton", "reference"):
    loss = kernel.nt_xent(x, y, backend=backend)
    numbers[backend] = [loss.detach(), *torch.autograd.grad(loss, (x, y))]
for fused, dense in zip(numbers["triton"], numbers["reference"], strict=True):
    torch.testing.assert_close(fused, dense)
kernel.patch_status()
print(sorted({name for name in sys.modules if name.split(".")[0] == "contrastive_kernels"}))
"""


def test_build_toml():
    path = ROOT / "hub" / "build.toml"
    settings = tomllib.loads(path.read_text())
    assert settings["general"]["name"] == "contrastive-kernels"  # the package's, with a dash
    assert settings["general"]["edition"] == 5
    assert settings["torch-noarch"] == {}
    try:
        from kernels._rust import Build
    except ImportError:
        return
    assert len(Build.open(path.parent).general.backends) == 1


def test_make_hub_lays_out_the_python_files(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make")
    done = subprocess.run(
        ["make", "-s", "hub", f"HUB={tmp_path / 'hub'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    package = tmp_path / "hub" / "torch-ext" / "contrastive_kernels"
    found = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    sources = ROOT / "contrastive_kernels"
    assert found == {path.relative_to(sources) for path in sources.rglob("*.py")}
    assert (tmp_path / "hub" / "build.toml").exists()

    assert run_python(LOAD, str(package)).strip() == "[]"  # nothing of the installed package
