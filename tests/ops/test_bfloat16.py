"""Products of bfloat16 where the processor has them, though they may not be the faster ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import BACKENDS

HERE = Path(__file__).parent
FILES = (
    HERE / "bfloat16_cases.py",
    HERE / "test_nested.py",
    HERE.parent / "losses" / "test_losses.py",
)
CASES = "bfloat16_cases or products_of_bfloat16 or (error_budget and cpu and bfloat16)"
NONE = 77
PROGRAM = f"""
import sys
import pytest
from contrastive_kernels import _cpu
sys.exit({NONE} if _cpu.bfloat16() is None else pytest.main(sys.argv[1:]))
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built here")
def test_in_a_process_that_takes_them():
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", CASES]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *options, *FILES],
        cwd=HERE.parents[1],
        env={**os.environ, "CK_BFLOAT16": "avx512"},
        text=True,
        capture_output=True,
    )
    if done.returncode in (NONE, -signal.SIGILL):
        pytest.skip("no AVX-512 BF16 here")
    assert done.returncode == 0, done.stdout
