"""The examples run, and compute what they say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_equal_in_double, randn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loss(capsys):
    example = load("own_loss")

    def dense(z, t=2.0):
        return torch.pdist(F.normalize(z, dim=-1)).square().mul(-t).exp().mean().log()

    assert_equal_in_double(example.uniformity, dense, [randn(37, 5)])
    example.main(64)
    assert capsys.readouterr().out.startswith("64 x 128: loss ")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is not distributed")
def test_clip_ddp_trains_alike_on_one_and_two_processes():
    pytest.importorskip("sklearn")
    one, two = (launch(start, "clip_ddp.py", "--epochs", "2") for start in (ALONE, TOGETHER))
    assert len(one) == 3 and one[0].startswith("epoch 1: loss ")
    for a, b in zip(one, two, strict=True):
        a, b = (float(line.split()[-1].rstrip("%")) for line in (a, b))
        assert abs(a - b) <= 1e-3 * a, (one, two)
    assert float(one[1].split()[-1]) < 0.5 * float(one[0].split()[-1])


TOGETHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ALONE = ("-c", """
import os, runpy, socket, sys
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
""")  # fmt: skip


def launch(start: tuple[str, ...], example: str, *arguments: str) -> list[str]:
    command = [sys.executable, *start, str(EXAMPLES / example), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
