"""What ranks send one another, what they hold, and what they compute meanwhile."""

from __future__ import annotations

from functools import cache
from statistics import median_high

import gloo
import overlap
import pytest
import torch
import torch.distributed as dist
import traffic
from oracles import BACKENDS

from benchmarks.traffic import Step
from contrastive_kernels.distributed import Shards
from contrastive_kernels.distributed.exchange import Gather, KeyShard, Ring, choose, plan

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no gloo",
)
PEAK_ROWS, PEAK_DIM = 512, 1024


@cache
def results(world: int) -> list[dict]:
    """One start of the processes serves several tests."""
    return gloo.run(world, everything)


def everything() -> dict:
    world, report = dist.get_world_size(), {"traffic": traffic.everything()}
    if world == 2 and "triton" in BACKENDS:
        report["autocast traffic"] = traffic.under_autocast()
    if world == 3:
        report["overlap"] = overlap.everything()
    return report


def peaks(exchanges: tuple[str, ...]) -> dict[str, tuple[float, int]]:
    return {e: traffic.peak(PEAK_ROWS, PEAK_DIM, e) for e in exchanges}


@pytest.mark.parametrize("world", (2, 3, 4))
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("loss", traffic.LOSSES)
def test_bytes_and_collectives_are_those_on_paper(world, exchange, loss):
    rows = traffic.ROWS * (2 if loss == "nt_xent" else 1)
    kind = {"symmetric": loss == "nt_xent", "columns": loss == "clip_loss"}
    for size in (8, 4, 2):
        step = Step(world, rows, traffic.DIM, size, exchange, **kind)
        for report in results(world):
            counts = report["traffic"][loss, exchange, size]
            assert counts == [step.sent(), step.collectives()]


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not usable here")
def test_keys_travel_in_the_type_of_the_autocast_region():
    step = Step(2, traffic.ROWS, traffic.DIM, 2, "ring", columns=True)
    for report in results(2):
        assert report["autocast traffic"] == [step.sent(), step.collectives()]


def test_memory_of_a_ring_does_not_grow_with_the_ranks():
    """In shards of keys: a gather holds three more for each rank, a ring the same from W = 4 on,
    when there are always keys under way and gradients behind them."""

    def peak(reports: list[dict], exchange: str) -> float:
        shard = 4 * PEAK_ROWS * PEAK_DIM
        # on a busy machine a rank may come when the others have let their keys go
        return median_high(report[exchange][1] / shard for report in reports)

    three, four = (gloo.run(world, peaks, ("ring", "gather")) for world in (3, 4))
    six = gloo.run(6, peaks, ("ring",))
    assert abs(peak(four, "gather") - peak(three, "gather") - 3) < 0.7
    assert abs(peak(six, "ring") - peak(four, "ring")) < 0.7
    assert peak(four, "ring") < 9
    values = {report[exchange][0] for report in four for exchange in ("ring", "gather")}
    assert max(values) - min(values) < 1e-5


def test_a_ring_computes_while_keys_are_under_way(monkeypatch):
    events = []

    class Transfer:
        def __init__(self, shards, tensors, steps, rows):
            events.append("send")
            self.received = [t.new_zeros(rows, *t.shape[1:]) for t in tensors]

        def wait(self):
            events.append("wait")
            return self.received

    monkeypatch.setattr("contrastive_kernels.distributed.exchange._Transfer", Transfer)
    shards = Shards(None, 0, [2, 2, 2], "ring")
    ring = Ring(shards, 2, symmetric=False)
    ring.run(KeyShard(torch.ones(2, 3)), lambda *_: events.append("compute"), None, torch.add)
    assert events == ["send", "compute", "wait", "send", "compute", "wait", "compute"]


def test_on_a_slow_link_a_ring_waits_only_where_there_is_nothing_to_compute():
    """That is for the sizes and the loss, and in each pass for what comes home last. A gather waits
    for all of its transfers."""
    steps = {e: Step(3, 4, 5, 8, e, columns=True).collectives() for e in ("gather", "ring")}
    for report in results(3):
        transfers, idle, _ = report["overlap"]["gather"]
        assert transfers == idle == steps["gather"]
        transfers, idle, waited = report["overlap"]["ring"]
        assert transfers == steps["ring"] and idle == 2 + 2
        # by the clock too: what had a block to hide behind has added nothing, the rest its delay
        assert waited <= idle * overlap.DELAY


@pytest.mark.parametrize("world", range(1, 8))
def test_every_pair_is_computed_once(world):
    """Counts the visits of each pair of rows, itself as its transpose where that is implied."""
    sizes = [3, 0, 2, 5, 1, 4, 2][:world]
    starts = [sum(sizes[:rank]) for rank in range(world)]
    for symmetric in (False, True):
        visits = torch.zeros(sum(sizes), sum(sizes))
        for rank in range(world):
            shards = Shards(None, rank, sizes, "gather")
            for block in plan(shards, rank, sizes[rank], symmetric):
                rows = torch.arange(sizes[rank])[block.rows] + starts[rank]
                keys = torch.arange(sizes[block.shard])[block.keys] + starts[block.shard]
                visits[rows[:, None], keys] += 1
                if symmetric and not block.own:
                    visits[keys[:, None], rows] += 1
        assert torch.equal(visits, torch.ones_like(visits))


def test_auto_gathers_small_batches_and_rings_large_ones():
    def chosen(rows: int) -> type:
        keys = torch.empty(1, 64)  # only its width and type count
        return type(choose(Shards(None, 0, [rows, rows], "auto"), keys, rows, False))

    assert chosen(2**19) is Gather and chosen(2**19 + 1) is Ring
