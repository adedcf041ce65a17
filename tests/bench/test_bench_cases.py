"""The table of cases: every row, pass and dtype is right, and what a step times."""

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.cases.step import DTYPES
from benchmarks.cases.table import CASES
from benchmarks.harness import check, timing

pytestmark = pytest.mark.usefixtures("short")


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.group != "swap"])
def test_every_row_is_right_at_tiny_sizes(name):
    row = CASES[name]
    case = row.resized(row.sizes.tiny())
    tensors = case.tensors()
    step = case.step(case.under_test, tensors)
    assert check.reason(step, case.truth(tensors), check.TOLERANCE[case.dtype]) is None


@pytest.mark.parametrize("passes", ["forward", "backward", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["nt_xent", "info_nce_frozen", "cacr_small"])
def test_passes_and_dtypes_are_right(name, dtype, passes):
    row = CASES[name]
    case = replace(row.resized(row.sizes.tiny()), dtype=dtype, passes=passes)
    tensors = case.tensors()
    truth = case.truth(tensors)
    assert bool(truth.gradients) == (passes != "forward")
    step = case.step(case.under_test, tensors)
    for _ in range(2):
        assert check.reason(step, truth, check.TOLERANCE[dtype]) is None


def test_operations_of_the_passes_add_up():
    for name in ("info_nce", "nt_xent", "whiten_64", "w_mse"):
        row = CASES[name]
        parts = [replace(row, passes=p).operations() for p in ("forward", "backward", "both")]
        assert parts[0] + parts[1] == pytest.approx(parts[2]) and parts[0] > 0
    assert CASES["info_nce"].operations() == 8 * 8192**2 * 128
    assert CASES["info_nce_forward_1000000"].operations() == 2 * 1024 * 1_000_000 * 128


def test_the_backward_pass_is_timed_alone():
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.05)
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.expand(4)

    case = replace(CASES["info_nce_small"], passes="backward", options={})
    tensors = {"x": torch.rand(4).requires_grad_()}
    step = case.step(lambda x: Slow.apply(x), tensors)
    both = replace(case, passes="both").step(step.loss, tensors)
    timings = timing.interleave({"one": step, "both": both}, 0.0, print)
    assert timings["one"].median < 25 < 50 <= timings["both"].median
    assert torch.equal(step.gradients()["x"], torch.ones(4))


def test_a_long_call_runs_once_a_round():
    calls = []

    def slow():
        calls.append(time.sleep(0.02))

    timings = timing.interleave({"slow": slow}, 0.0, print, min_rounds=3)
    assert len(calls) == timings["slow"].samples == 3
    calls.clear()
    timings = timing.interleave({"slow": slow}, 1.0, print, min_rounds=3)
    # there is time: the first call is for finding out
    assert len(calls) == timings["slow"].samples + 1


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_the_rate_of_matrix_products(dtype, monkeypatch):
    monkeypatch.setattr(timing, "GEMM_SHAPES", ((64, 64, 64),))
    sample = timing.host_sample
    monkeypatch.setattr(timing, "host_sample", lambda call, repeats: sample(call, 2))
    assert timing.gemm_flops(dtype) > 0
