"""Sharded queues in a model: under DDP and FSDP2, and in checkpoints for other numbers of ranks."""

from __future__ import annotations

import pickle
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gloo
import pytest
import queues
import torch
import torch.distributed as dist
import torch.distributed.tensor  # noqa: F401  torch.load needs it

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no gloo",
)
ORDER = ((1, ()), (2, (1,)), (4, (1, 2)), (1, (2, 4)))  # (ranks, what they load)


@cache
def folder() -> TemporaryDirectory:
    return TemporaryDirectory()  # removed with the process


@cache
def results() -> list[tuple[int, list[dict]]]:
    root, found = Path(folder().name), []
    for i, (world, of) in enumerate(ORDER):
        (root / str(world)).mkdir(exist_ok=True)
        found.append((world, gloo.run(world, queues.everything, root, of, i + 1 < len(ORDER))))
    return found


def of_world(world: int, name: str) -> list:
    return next([r[name] for r in reports] for ranks, reports in results() if ranks == world)


@pytest.mark.parametrize("name, checks", [("losses", 4), ("moves", 13)])
def test_a_part_survives_what_happens_to_a_model(name, checks):
    for report in of_world(2, name):
        assert len(report) == checks
        assert all(report.values()), report


def test_parts_of_a_submesh():
    for report in of_world(4, "submeshes"):
        assert all(report.values()), report


def test_a_queue_that_differs_between_ranks_is_an_error_on_all():
    for report in of_world(2, "refusals"):
        assert report["loaded by one"] == (
            "state must be the same on every rank of group, got 'position 9, seen 12' on rank 0, "
            "'position 0, seen 0' on rank 1"
        )
        assert report["module of another rank"].endswith(
            "a sharded queue made on rank 0 of 2 is used on rank 1 of 2: make it anew and load its "
            "state_dict"
        )


@pytest.mark.parametrize("run", range(1, len(ORDER)))
def test_checkpoints_load_on_other_numbers_of_ranks(run):
    world, reports = results()[run]
    for report in reports:
        assert list(report["loaded"]) == list(ORDER[run][1])
        for of, loaded in report["loaded"].items():
            assert len(loaded) == 3 * 5 + 3 * 5 + 2 * 3 + 1
            wrong = [how for how, right in loaded.items() if not right]
            assert not wrong, f"{of} -> {world}: {wrong}"


# Rows from 0 on are what a smaller queue has, too.
SMALLER = "It may be all of a queue of size 6, where this one is 12, or the first part of one. "


@pytest.mark.parametrize("world", [2, 4])
def test_what_one_rank_saved_alone_says_what_it_has(world):
    rows = queues.SIZE // world
    for rank, report in enumerate(of_world(world, "parts")):
        for i, got in enumerate(report):
            has = i == rank * 2 // world
            assert got["loaded"] == [has] * rows and got["kept"] == [not has] * rows
            said = (
                f"the state has rows {6 * i} to {6 * i + 5}, and not rows {rank * rows} to "
                f"{(rank + 1) * rows - 1} of this queue, which stay as they were. "
                f"{SMALLER * (i == 0)}One rank's state has its part alone: save by all ranks with "
                "torch.distributed.checkpoint, or get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)), as docs/distributed.md shows"
            )
            assert got["warned"] == [said] * (not has)
            assert (
                f'Missing key(s) in state_dict: "queue.features: {said}"' in got["error"]
            ) != has
            assert bool(got["error"]) != has


def unsharded(size: int = queues.SIZE) -> torch.nn.Module:
    return queues.Model(group=None, sharded=False, size=size)


def saved(name: str) -> dict:
    results()
    return torch.load(Path(folder().name) / name, weights_only=True)


def test_files_of_ranks_are_read_without_a_group():
    model = unsharded()
    model.load_state_dict(saved("1/rank0.pt"))
    assert queues.holds(model.queue, queues.one())
    with pytest.raises(RuntimeError, match="the state has rows 0 to 5, and not rows 6 to 11"):
        with pytest.warns(UserWarning, match="which stay as they were"):
            unsharded().load_state_dict(saved("2/rank0.pt"))


@pytest.mark.filterwarnings("ignore:the state has rows")
@pytest.mark.parametrize("name", ["1/rank0.pt", "2/rank1.pt", "4/whole.pt", "4/one.pt"])
@pytest.mark.parametrize("size", [6, 24])
def test_a_state_of_another_size(name, size):
    alone = size > queues.SIZE and name[:2] == "4/"  # it may as well be a part
    wrong = "all of a queue of size 12, where this one is 24" if alone else "size mismatch"
    with pytest.raises(RuntimeError, match=f"queue.features: .*{wrong}|{wrong} for queue.features"):
        unsharded(size).load_state_dict(saved(name))


def test_a_part_without_its_row_numbers():
    state = saved("2/rank0.pt")
    del state["queue.rows"]
    with pytest.raises(RuntimeError, match="queue.features: the state has 6 rows, and no entry"):
        parted().load_state_dict(state)


def parted() -> torch.nn.Module:
    """A sharded model of rank 0 of 2, in a process that has no group."""
    results()
    return pickle.loads((Path(folder().name) / "2" / "module.pkl").read_bytes())


def test_the_part_is_saved_when_the_group_is_gone():
    model = parted()
    state = model.state_dict()
    assert state["queue.features"].shape == (6, queues.DIM)
    assert state["queue.rows"].tolist() == list(range(6))
    again = parted()
    again.queue.features.zero_()
    again.load_state_dict(state)
    assert torch.equal(again.queue.features, model.queue.features)
