"""Builds the extensions by calling CMake: CMakeLists.txt owns their sources and flags.

CK_SKIP_BUILD=1 leaves them out; CK_FORCE_BUILD=1 makes a failed build an error. Otherwise the
package installs without them, and _build_report.json beside its modules says why. Without a CUDA
compiler `_cuda` is always left out.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / sys.implementation.cache_tag  # kept, so that rebuilds are incremental


# pip puts cmake and ninja beside the interpreter, which need not be on PATH.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def cmake(*arguments: str) -> None:
    command = ["cmake", *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PATH": PATH},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        raise CompileError(f"cmake could not be run: {error}") from error
    print(done.stdout)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise CompileError(f"`{' '.join(command)}` failed:\n{tail}")


class CMakeBuild(build_ext):
    def run(self) -> None:
        in_source = self.inplace or self.editable_mode  # build_ext resets inplace while it runs
        package_root = ROOT if in_source else Path(self.build_lib)
        self.report_path = package_root / "contrastive_kernels" / "_build_report.json"
        self.report = {}
        super().run()

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        self.report[name] = {"built": False, "reason": None}
        try:
            self.build_target(ext, name, target)
            self.report[name]["built"] = True
        except Exception as error:
            self.report[name]["reason"] = str(error)
            for stale in (target, self.report_path.with_name(target.name)):
                stale.unlink(missing_ok=True)
            raise CompileError(str(error)) from error  # the one error an optional build may have
        finally:
            self.report_path.parent.mkdir(parents=True, exist_ok=True)
            self.report_path.write_text(json.dumps(self.report, indent=1) + "\n")

    def build_target(self, ext: Extension, name: str, target: Path) -> None:
        if os.environ.get("CK_SKIP_BUILD") == "1":
            raise CompileError("left out on request: CK_SKIP_BUILD=1 was set")
        # named each time: that of an earlier build may be gone with pip's environment
        ninja = shutil.which("ninja", path=PATH) or "ninja"
        cmake(
            f"-S{ROOT}", f"-B{BUILD}", "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        )  # fmt: skip
        if name == "_cuda" and not (BUILD / "cuda_compiler").read_text():
            ext.optional = True
            raise CompileError("no CUDA compiler: nvcc was not found, or does not work")
        cmake("--build", str(BUILD), "--target", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(BUILD / target.name), str(target))


# An optional extension may fail to build: setuptools then warns and goes on.
OPTIONAL = os.environ.get("CK_FORCE_BUILD") != "1"
setup(
    ext_modules=[
        Extension(f"contrastive_kernels.{name}", [], optional=OPTIONAL)
        for name in ("_cpu", "_cuda")
    ],
    cmdclass={"build_ext": CMakeBuild},
)
