"""Imports run one way: no circle, and no arrow upwards between the rooms of a package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILED = ("contrastive_kernels._cpu", "contrastive_kernels._cuda")
# Each room, a folder or a file of a package, may import those of the lines before its own.
LAYERS = {
    "contrastive_kernels": (
        ("types", "autograd"),
        ("files", "engines"),
        ("sources", "backends"),
        ("checks", "reference", "cpu", "triton", "workspace"),
        ("distributed",),
        ("ops",),
        ("whitening",),
        ("losses",),
        ("queue", "cached", "integrations", "selfcheck"),
        ("__init__",),
        ("demo",),
        ("__main__",),
    ),
    "benchmarks": (
        ("baselines",),
        ("cases",),
        ("harness",),
        ("traffic", "rank_files", "gpu", "grid", "scaling", "claims"),
        ("negatives", "infomin"),
        ("base", "options", "report", "folds"),
        ("run",),
        ("conftest", "test_cases"),
    ),
}


def modules(package: str) -> dict[str, Path]:
    """The files of a package by their dotted names, that of a folder for its __init__."""
    folder = ROOT / package
    found = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """The full names of all that a file imports, also within functions and by import_module."""
    base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            constants = (a.value for a in node.args if isinstance(a, ast.Constant))
            yield from (resolve_name(name, ".".join(base)) for name in constants)


def arrows(package: str) -> dict[str, set[str]]:
    """For each file the files of the package that it imports."""
    known = modules(package)

    def file_of(target: str) -> str | None:
        while target not in known and "." in target:
            target = target.rpartition(".")[0]
        return target if target in known else None

    return {
        name: {file_of(target) for target in imported(name, path) if target not in COMPILED}
        - {name, None}
        for name, path in known.items()
    }


def room(name: str) -> str:
    _, _, rest = name.partition(".")
    return rest.split(".")[0] if rest else "__init__"


@pytest.mark.parametrize("package", LAYERS)
def test_there_is_no_circle(package):
    try:
        order = list(TopologicalSorter(arrows(package)).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert len(order) == len(modules(package))


@pytest.mark.parametrize("package", LAYERS)
def test_no_arrow_goes_up(package):
    level = {name: i for i, layer in enumerate(LAYERS[package]) for name in layer}
    level.setdefault("__init__", -1)  # of benchmarks, which is empty
    wrong = [
        f"{source} imports {target}"
        for source, targets in arrows(package).items()
        for target in targets
        if room(source) != room(target) and level[room(source)] <= level[room(target)]
    ]
    assert not wrong, "\n".join(wrong)


def test_an_arrow_within_a_function_is_seen(tmp_path):
    path = tmp_path / "late.py"
    path.write_text(
        "def f():\n    from ..ops import sweep\n    import_module('p.cpu')\n"
        "    import_module('..triton', __package__)\n"
    )
    assert set(imported("p.losses.late", path)) == {"p.ops.sweep", "p.cpu", "p.triton"}
