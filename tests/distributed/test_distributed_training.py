"""Trainings, modules and queues on two ranks beside one process."""

from __future__ import annotations

from functools import cache

import gloo
import pytest
import torch.distributed as dist
import training
from comparisons import FIRST

import contrastive_kernels as ck

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no gloo",
)
TOLERANCE = 1e-10


@cache
def results() -> list[dict]:
    return gloo.run(2, training.everything)


PARAMETERS = dict.fromkeys(("ddp", "accumulated", "fsdp"), 6)
PARAMETERS |= {function.__name__: count for function, count in training.CACHED.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_training_steps_are_those_of_one_process(name):
    for report in results():
        assert len(report["trainings"][name]) == PARAMETERS[name]
        for parameter, error in report["trainings"][name].items():
            assert error <= TOLERANCE, parameter


def test_a_cached_loss_leaves_the_parameters_of_ddp_alone():
    for report in results():
        assert "loss must not use module.scale of a Distributed" in report["cached wrong"]


@pytest.mark.parametrize("name", ["NCE", "MNRL", "GIST"])
def test_modules_pass_the_group(name):
    for report in results():
        assert report["modules"][name] <= TOLERANCE


def test_a_compiled_step():
    assert all(report["compiled"] <= TOLERANCE for report in results())


def test_queues_over_ranks_are_one_queue():
    expected = {"copies": True, "parts": True, "losses": True, "start": True}
    assert [report["queues"] for report in results()] == [expected, expected]


def test_a_bank_over_ranks_is_one_bank():
    assert [report["bank"] for report in results()] == 2 * [{"equal": True, "start": True}]


def test_modules_with_a_group_are_copied_and_saved():
    for report in results():
        assert len(report["kept groups"]) == 4 * (1 + 2 * 5)
        assert all(report["kept groups"].values()), report["kept groups"]


def test_a_whitening_layer_follows_buffers_that_ddp_copies():
    assert [report["whitening"] for report in results()] == [0.0, 0.0]


def test_every_module_with_a_group_is_copied_and_saved():
    for report in results():
        assert report["copied modules"] == dict.fromkeys(sorted(FIRST), True)


def test_a_sharded_queue_needs_a_group():
    with pytest.raises(ValueError, match="sharded needs a group"):
        ck.FeatureQueue(8, 3, sharded=True)
