"""The examples run, and compute what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from oracles import assert_equal_in_double, randn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


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
