"""The matrix products of csrc/cpu for each instruction set: against sums in float64, with operands
between pages that cannot be touched, in all layouts; the bits of an entry, which depend on the
number of terms alone; and how operands of bfloat16 are made. And the whole engine without Python,
for processors that an emulator runs."""

import subprocess
from pathlib import Path

import pytest

from tests import compiled

SOURCES = Path(__file__).parent / "products"
QUICK = "-O1"  # to compile: loops of every size are instantiated
# of the module, and for instruction sets that are not everywhere
OTHERS = ("module", "whiten_module", "bfloat16_avx512", "bfloat16_amx")

pytestmark = compiled.needs_compiler


@pytest.mark.parametrize("isa", compiled.ISAS)
def test_products_of_numbers(tmp_path, isa):
    program = tmp_path / "numbers"
    compiled.build(SOURCES / "numbers.cpp", program, QUICK, *compiled.isa_flags(isa))
    compiled.run(program)


def test_engine(tmp_path):
    """Elsewhere than in an emulator it is compiled for its types alone: other tests run it."""
    source, flags = SOURCES / "engine.cpp", compiled.isa_flags("baseline")
    if not compiled.EMULATOR:
        compiled.build(source, tmp_path / "engine", "-fsyntax-only", *flags)
        return
    engine = [path for path in compiled.HEADERS.glob("*.cpp") if path.stem not in OTHERS]
    compiled.build(source, tmp_path / "engine", *flags, *engine)
    compiled.run(tmp_path / "engine")


def bfloat16_program(folder: Path, kind: str, *flags: str) -> Path:
    program = folder / "bfloat16"
    kernels = f'-DKERNELS="bfloat16_{kind}.cpp"'
    compiled.build(SOURCES / "bfloat16.cpp", program, QUICK, kernels, *flags)
    return program


def test_products_of_bfloat16_by_avx512(tmp_path):
    flags = compiled.isa_flags("avx512")
    probe = [compiled.COMPILER, "-mavx512bf16", "-E", "-x", "c++", "/dev/null"]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("the compiler does not know AVX-512 BF16")
    program = bfloat16_program(tmp_path, "avx512", *flags, "-mavx512bf16")
    # some processors hide what they can do
    if subprocess.run([program, "probe"], capture_output=True).returncode < 0:
        pytest.skip("no AVX-512 BF16 here")
    compiled.run(program)


def test_products_of_bfloat16_by_tiles(tmp_path):
    """With tile registers emulated, which takes longer than to compile: few machines have them."""
    flags = ["-O2", "-DCK_ISA=bfloat16_amx", '-DCK_TILES="tiles.h"', f"-I{SOURCES}"]
    compiled.run(bfloat16_program(tmp_path, "amx", *flags))
