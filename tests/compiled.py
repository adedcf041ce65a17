"""C++ that a test compiles and runs by itself, for the instruction sets of this processor.

CXX names another compiler. Where it is for another processor, CK_EMULATOR runs its programs, of
which there is the plain vector path alone: `make aarch64`.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
EMULATOR = os.environ.get("CK_EMULATOR", "").split()
HEADERS = Path(__file__).parents[1] / "csrc" / "cpu"
CPUINFO = Path("/proc/cpuinfo")

# What CMakeLists.txt gives the compiler, and how this processor calls it.
ISAS = {
    "baseline": ([], None),
    "avx2": (["-mavx2", "-mfma"], "avx2"),
    "avx512": (["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"], "avx512f"),
}

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


def isa_flags(isa: str) -> list[str]:
    """Those for the compiler; skips the test where the processor lacks the instruction set."""
    flags, capability = ISAS[isa]
    if capability is not None:
        if EMULATOR:
            pytest.skip("another processor")
        if not CPUINFO.exists():
            pytest.skip("cannot tell what the processor has")
        if capability not in CPUINFO.read_text().split():
            pytest.skip(f"no {capability} here")
    return [*flags, f"-DCK_ISA={isa}"]


def build(source: Path, program: Path, *flags: str | Path) -> None:
    command = [COMPILER, "-std=c++20", "-O2", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
    command += ["-Wextra", "-Werror", *flags, "-I", HEADERS, source, "-o", program]
    subprocess.run(command, check=True)


def run(program: Path) -> None:
    """It must print "ok"; what else it prints says what was wrong."""
    done = subprocess.run([*EMULATOR, program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", (done.returncode, done.stdout)
