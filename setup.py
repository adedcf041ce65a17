"""Builds the extension by calling CMake: CMakeLists.txt owns its sources and flags.

CK_SKIP_BUILD=1 leaves the extension out; CK_FORCE_BUILD=1 makes a failed build an error. Otherwise
the package installs without it, and _build_report.json beside the package's modules says why.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / sys.implementation.cache_tag  # kept, so that rebuilds are incremental


def cmake(*arguments: str) -> None:
    # pip puts cmake and ninja beside the interpreter, which need not be on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = ["cmake", *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PATH": path},
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
        super().run()

    def build_extension(self, ext: Extension) -> None:
        report = {"built": False, "reason": None, "torch": None}
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            if os.environ.get("CK_SKIP_BUILD") == "1":
                raise CompileError("left out on request: CK_SKIP_BUILD=1 was set")
            cmake(f"-S{ROOT}", f"-B{BUILD}", "-GNinja", f"-DPython_EXECUTABLE={sys.executable}")
            cmake("--build", str(BUILD))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(BUILD / target.name), str(target))
            report.update(built=True, torch=(BUILD / "torch_version").read_text())
        except Exception as error:
            report["reason"] = str(error)
            for stale in (target, self.report_path.with_name(target.name)):
                stale.unlink(missing_ok=True)
            raise CompileError(str(error)) from error  # the one error an optional build may have
        finally:
            self.report_path.parent.mkdir(parents=True, exist_ok=True)
            self.report_path.write_text(json.dumps(report, indent=1) + "\n")


setup(
    ext_modules=[
        # An optional extension may fail to build: setuptools then warns and goes on.
        Extension("contrastive_kernels._cpu", [], optional=os.environ.get("CK_FORCE_BUILD") != "1")
    ],
    cmdclass={"build_ext": CMakeBuild},
)
