"""The benchmarks as a package: installed, and under pytest-benchmark."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks.cases.inputs import Groups
from benchmarks.cases.table import CASES
from benchmarks.harness.paths import ROOT


def packages(folder: Path) -> set[str]:
    """Every folder with an __init__.py, as a dotted name that begins with that of `folder`."""
    files = folder.rglob("__init__.py")
    return {".".join(file.parent.relative_to(folder.parent).parts) for file in files}


def test_the_packages_are_all_named():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {f"contrastive_kernels.{name}" for name in packages(ROOT / "benchmarks")}
    found |= packages(ROOT / "contrastive_kernels")
    assert set(settings["packages"]) == found
    assert settings["package-dir"] == {"contrastive_kernels.benchmarks": "benchmarks"}


def test_no_module_of_the_benchmarks_imports_them_by_name():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "benchmarks" for name in names), path.name


def test_the_command_of_an_installed_package(tmp_path):
    package = tmp_path / "contrastive_kernels"
    no_caches = shutil.ignore_patterns("__pycache__", "*.so", "results")
    shutil.copytree(ROOT / "contrastive_kernels", package, ignore=no_caches)
    shutil.copytree(ROOT / "benchmarks", package / "benchmarks", ignore=no_caches)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "contrastive_kernels", "bench", "--list", "--loss", "dcl"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dcl_small ")


def test_the_table_under_pytest_benchmark(tmp_path):
    path = tmp_path / "x.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks"]
    command += ["--sizes", "tiny", "-k", "whiten_64 and (ours or batched)"]
    # pytest-benchmark measures nothing in a worker of pytest-xdist
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "--benchmark-json", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours, batched = sorted(
        json.loads(path.read_text())["benchmarks"], key=lambda one: "batched" in one["name"]
    )
    assert ours["extra_info"]["sizes"] == {"n": 8, "m": 128, "d": 64, "k": 1}
    assert ours["extra_info"]["flops"] == CASES["whiten_64"].flops(Groups(8, 128, 64))
    ratio = ours["stats"]["median"] / batched["stats"]["median"]
    assert batched["extra_info"]["ratio"] == pytest.approx(ratio)
