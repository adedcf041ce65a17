"""The build: what it reports when it cannot be done, and what it links when it can."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import pytest
import torch
from fresh import run_python

import contrastive_kernels as ck

backends = import_module("contrastive_kernels.backends")  # the name in the package is a function
ROOT = Path(__file__).resolve().parents[2]
EXTENSIONS = [f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_cpu", "_cuda")]
needs_extension = pytest.mark.skipif(
    backends.CPU_ERROR is not None, reason=f"no extension: {backends.CPU_ERROR}"
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The build files around an empty package, with extensions left by an earlier build."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "contrastive_kernels"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.0.7"\n')
    for name in EXTENSIONS:
        (package / name).write_text("of an earlier build")
    (tmp_path / "README.md").touch()
    return tmp_path


def run_setup(
    project: Path, *arguments: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CK_")}
    return subprocess.run(
        [python, "setup.py", *(arguments or ("build_ext", "--inplace"))],
        cwd=project,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


def read_report(project: Path) -> dict:
    return json.loads((project / "contrastive_kernels" / "_build_report.json").read_text())


def assert_left_out(project: Path, done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert done.returncode == 0, done.stderr
    report = read_report(project)
    assert list(report) == ["_cpu", "_cuda"]
    for extension in report.values():
        assert extension["built"] is False
        assert reason in extension["reason"]
    for name in EXTENSIONS:
        assert not (project / "contrastive_kernels" / name).exists()


def test_skipped_build_says_so(project):
    done = run_setup(project, CK_SKIP_BUILD="1")
    assert_left_out(project, done, "CK_SKIP_BUILD=1")


def test_failing_cmake_is_reported(project):
    (project / "CMakeLists.txt").write_text(
        'cmake_minimum_required(VERSION 3.19)\nmessage(FATAL_ERROR "the reason of this test")\n'
    )
    done = run_setup(project)
    assert_left_out(project, done, "the reason of this test")


def test_missing_cmake_is_reported(project, tmp_path):
    # setup.py looks beside the interpreter and on PATH: give it an interpreter that stands alone
    alone = tmp_path / "bin" / "python"
    alone.parent.mkdir()
    alone.symlink_to(sys.executable)
    done = run_setup(
        project,
        python=str(alone),
        PATH=str(alone.parent),
        PYTHONPATH=os.pathsep.join(filter(None, sys.path)),
        PYTHONHOME=sys.base_prefix,
    )
    assert_left_out(project, done, "cmake could not be run")


def test_python_without_pybind11_is_reported(project, tmp_path):
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "pybind11.py").write_text("raise ImportError('no pybind11 here')\n")
    done = run_setup(project, PYTHONPATH=str(shadow))
    if "CMAKE_CXX_COMPILER" in read_report(project)["_cpu"]["reason"]:
        pytest.skip("no compiler: CMake stops before it asks for pybind11")
    assert_left_out(project, done, "pip install pybind11")


def test_sources_know_no_torch():
    # one build serves every torch
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 20
    for path in sources:
        includes = re.findall(r'#include\s*[<"](.*)[>"]', path.read_text())
        assert not [name for name in includes if re.match("torch|ATen|c10", name)], path


def test_forced_build_fails_aloud(project):
    (project / "CMakeLists.txt").write_text('message(FATAL_ERROR "the reason of this test")\n')
    done = run_setup(project, CK_FORCE_BUILD="1")
    assert done.returncode != 0
    assert "the reason of this test" in done.stderr
    assert read_report(project)["_cpu"]["built"] is False


def test_missing_cuda_compiler_is_no_error(project):
    cpu = EXTENSIONS[0]
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.19)\nproject(without_cuda NONE)\n"
        'file(WRITE ${CMAKE_BINARY_DIR}/cuda_compiler "")\n'
        f"add_custom_target(_cpu COMMAND ${{CMAKE_COMMAND}} -E touch {cpu})\n"
    )
    done = run_setup(project, CK_FORCE_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert read_report(project) == {
        "_cpu": {"built": True, "reason": None},
        "_cuda": {
            "built": False,
            "reason": "no CUDA compiler: nvcc was not found, or does not work",
        },
    }


@needs_extension
def test_cuda_compiler_that_does_not_work_is_as_good_as_none(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["cmake", f"-S{ROOT}", f"-B{tmp_path}", "-GNinja", f"-DPython_EXECUTABLE={sys.executable}"],
        env={**os.environ, "PATH": path, "CUDACXX": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cuda_compiler").read_text() == ""


def test_version_is_written_once(project):
    assert run_setup(project, "--version").stdout.strip().endswith("0.0.7")


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (None, "never built"),
        ("not json", "never built"),
        ({"built": False, "reason": "no compiler"}, "at hand; what failed: no compiler"),
    ],
)
def test_unusable_build_is_explained(report, reason, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    if report is not None:
        path.write_text(report if isinstance(report, str) else json.dumps({"_cpu": report}))
    monkeypatch.setattr(backends, "_REPORT", path)
    assert reason in backends._load("_cpu")


@needs_extension
def test_torch_without_the_thread_functions_is_explained(monkeypatch):
    monkeypatch.setattr(backends, "_THREADS", ("parallel_for", "no_such_function"))
    reason = backends._load("_cpu")
    assert f"torch 2.10 or newer is needed, found {torch.__version__}" in reason
    assert "torch_no_such_function" in reason


def test_extension_is_built_where_a_compiler_is():
    if shutil.which("c++") is None or "CK_SKIP_BUILD" in (backends.CPU_ERROR or ""):
        pytest.skip("no C++ compiler, or left out on request")
    assert backends.CPU_ERROR is None


@needs_extension
def test_build_info():
    info = import_module("contrastive_kernels._cpu").build_info()
    assert info["compiler"] and "-fno-math-errno" in info["flags"]
    assert "march=native" not in info["flags"]
    x86 = platform.machine() in ("x86_64", "AMD64")
    assert info["isa"].split(",") == (["baseline", "avx2", "avx512"] if x86 else ["baseline"])


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF names")
def test_extension_links_neither_torch_nor_an_openmp_runtime():
    # a runtime of its own beside torch's would mean a second pool of threads
    names = Path(import_module("contrastive_kernels._cpu").__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"GOMP_", b"libgomp", b"libomp", b"libiomp"):
        assert library not in names


THREADS = """
import os, threading, torch
import contrastive_kernels as ck
torch.set_num_threads(3)
(torch.randn(999, 999) @ torch.randn(999, 999)).sum()
torch.randn(2**22).exp_()  # starts torch's pool
before = len(os.listdir("/proc/self/task"))
ck.nt_xent(torch.randn(700, 64), torch.randn(700, 64))
from contrastive_kernels import _cpu
print(before, len(os.listdir("/proc/self/task")))
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_engine_starts_no_thread_of_its_own():
    before, after = run_python(THREADS).split()
    assert before == after and int(before) >= 3


def test_report_covers_every_backend():
    report = ck.backends()
    assert list(report) == ["reference", "cpu", "triton", "cuda"]
    for name, backend in report.items():
        assert backend.usable == (backend.reason is None), name
        assert backend.devices, name
        assert backends.unusable_reason(name, backend.devices[0]) == backend.reason, (
            f"{name}: backends() and the dispatch disagree"
        )
    assert report["reference"].usable
    assert "takes cpu tensors only" in backends.unusable_reason("cpu", "cuda")
