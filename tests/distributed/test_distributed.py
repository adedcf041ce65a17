"""Losses over the ranks of a group, on gloo: every number beside one process on the whole batch."""

from __future__ import annotations

from functools import cache
from statistics import median_high

import comparisons
import faults
import gloo
import overlap
import pytest
import torch
import torch.distributed as dist
import traffic
import training
from oracles import BACKENDS

import contrastive_kernels as ck
from benchmarks.traffic import Step
from contrastive_kernels.distributed import Shards, join
from contrastive_kernels.distributed.exchange import Gather, KeyShard, Ring, choose, plan

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no gloo",
)
WORLDS = (1, 2, 3, 4)
TOLERANCE = 1e-10
PEAK_ROWS, PEAK_DIM = 512, 1024


@cache
def results(world: int) -> list[dict]:
    """One start of the processes, which takes longer than most tests, serves many of them."""
    return gloo.run(world, everything)


def everything() -> dict:
    report = comparisons.everything()
    if dist.get_world_size() == 2:
        report["trainings"] = training.everything()
        report["queues"] = training.queues()
        report["modules"] = training.modules()
        report["compiled"] = training.compiled()
        if "triton" in BACKENDS:
            report["autocast"] = comparisons.under_autocast()
            report["autocast traffic"] = traffic.under_autocast()
    if dist.get_world_size() == 3:
        report["faults"] = faults.differences()
        report["errors"] = faults.errors()
        report["overlap"] = overlap.everything()
    if dist.get_world_size() > 1:
        report["traffic"] = traffic.everything()
    if dist.get_world_size() in (3, 4):
        report["peak"] = peaks(("ring", "gather"))
    return report


def peaks(exchanges: tuple[str, ...]) -> dict[str, tuple[float, int]]:
    return {e: traffic.peak(PEAK_ROWS, PEAK_DIM, e) for e in exchanges}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", comparisons.CASES)
def test_loss_and_gradients_are_those_of_one_process(world, name):
    checked = 0
    for rank, report in enumerate(results(world)):
        for setup, outcome in report["losses"].items():
            if setup.name == name:
                for what, (error, _, _) in outcome.items():
                    assert error <= TOLERANCE, (rank, setup, what)
                    checked += 1
    assert checked >= 8 * world


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    "name", [name for name, (row, _) in comparisons.CASES.items() if row.takes("return_stats")]
)
def test_statistics_are_those_of_one_process(world, name):
    for rank, report in enumerate(results(world)):
        found = {s: fields for s, fields in report["statistics"].items() if s.name == name}
        assert len(found) == 2 and all(found.values())
        for setup, fields in found.items():
            for field, error in fields.items():
                assert error <= TOLERANCE, (rank, setup, field)


@pytest.mark.parametrize("world", WORLDS)
def test_two_runs_give_equal_bits_and_ranks_one_value(world):
    for report in results(world):
        runs = [comparisons.exchanges(name) for name in comparisons.BITS]
        assert len(report["bits"]) == sum(map(len, runs))
        assert all(report["bits"].values())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 32), (torch.bfloat16, 2)])
def test_shorter_types_lose_their_own_rounding_only(world, dtype, roundings):
    """Gradients of ranks are added in float32, and rounded to the type of the features once."""
    for report in results(world):
        found = {setup: e for (setup, of), e in report["dtypes"].items() if of == dtype}
        assert len(found) >= 2 * (len(comparisons.FEW) - 1)
        for setup, errors in found.items():
            for what, error in errors.items():
                assert error <= roundings * torch.finfo(dtype).eps, (setup, what)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not usable here")
def test_autocast_is_that_of_one_process():
    for report in results(2):
        for setup, errors in report["autocast"].items():
            for what, error in errors.items():
                dtype, roundings = (torch.float32, 32) if what == "loss" else (torch.bfloat16, 2)
                assert error <= roundings * torch.finfo(dtype).eps, (setup, what)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not usable here")
def test_keys_travel_in_the_type_of_the_autocast_region():
    step = Step(2, traffic.ROWS, traffic.DIM, 2, "ring", columns=True)
    for report in results(2):
        assert report["autocast traffic"] == [step.sent(), step.collectives()]


def test_table_of_ratios(capsys):
    """<gradient, expected> / <expected, expected>, all ranks and sizes together."""
    lines = [f"{'gradient over that of one process':40}" + "".join(f"W={w:<6}" for w in WORLDS)]
    tables = [ratios(world) for world in WORLDS]
    for (name, what), _ in tables[0].items():
        row = [table[name, what] for table in tables]
        lines.append(f"{name + ', ' + what:40}" + "".join(f"{ratio:<8.3f}" for ratio in row))
        assert row == pytest.approx([1.0] * len(row), abs=1e-9), name
    with capsys.disabled():
        print("", *lines, sep="\n")


def ratios(world: int) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], list[float]] = {}
    for report in results(world):
        for setup, outcome in report["losses"].items():
            for what, (_, product, square) in outcome.items():
                both = sums.setdefault((setup.name, what), [0.0, 0.0])
                both[0] += product
                both[1] += square
    return {key: product / square for key, (product, square) in sums.items()}


@pytest.mark.parametrize("name", ["ddp", "accumulated", "fsdp", "cached"])
def test_training_steps_are_those_of_one_process(name):
    for report in results(2):
        assert len(report["trainings"][name]) == 6
        for parameter, error in report["trainings"][name].items():
            assert error <= TOLERANCE, parameter


@pytest.mark.parametrize("name", ["NCE", "MNRL", "GIST"])
def test_modules_pass_the_group(name):
    for report in results(2):
        assert report["modules"][name] <= TOLERANCE


def test_a_compiled_step():
    assert all(report["compiled"] <= TOLERANCE for report in results(2))


def test_queues_over_ranks_are_one_queue():
    expected = {"copies": True, "parts": True, "losses": True, "start": True}
    assert [report["queues"] for report in results(2)] == [expected, expected]


def test_a_sharded_queue_needs_a_group():
    with pytest.raises(ValueError, match="sharded needs a group"):
        ck.FeatureQueue(8, 3, sharded=True)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("dtype", "image_features must be the same on every rank of group, got float64 (*, 5) on "
         "cpu on rank 0, float32 (*, 5) on cpu on rank 1, float64 (*, 5) on cpu on rank 2"),
        ("features", "z1 must be the same on every rank of group, got float64 (*, 5) on cpu on "
         "rank 0, float64 (*, 6) on cpu on rank 1"),
        ("option", "temperature must be the same on every rank of group, got 0.1 on rank 0, 0.2 on "
         "rank 1"),
        ("gradient", "image_features must be the same on every rank of group, got float64 (*, 5) "
         "on cpu on rank 0, float64 (*, 5) on cpu with gradient on rank 1"),
        ("exchange", "exchange must be the same on every rank of group, got gather on rank 0, ring "
         "on rank 1"),
        ("negatives", "got 3 on rank 0, 2 on rank 1, 3 on rank 2"),
        ("documents", "documents must be as many for each query on every rank of group, got "
         "[3, 6, 3] for [3, 3, 3] rows of query"),
        ("no rows", "a rank of group must have rows, got none on any"),
        ("loss", "loss must be the same on every rank of group, got nt_xent on rank 0, dcl on "
         "rank 1"),
    ],
)  # fmt: skip
def test_what_differs_is_named_on_every_rank(what, text):
    for seen in (report["faults"] for report in results(3)):
        assert seen[what].startswith("ValueError: ") and text in seen[what], seen[what]
        assert seen["after all"] == "no error"


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("shape", "ValueError: z1 and z2 must have the same number of rows, got 4 and 3"),
        ("type", "TypeError: image_features must be a tensor, got list"),
        ("missing", "TypeError: clip_loss() missing 1 required positional argument: 'logit_scale'"),
        ("option", "ValueError: temperature must be a finite number > 0, got 0.0"),
        ("reduction", "ValueError: reduction must be \"mean\", \"sum\" or \"none\", got 'avg'"),
        ("exchange", 'ValueError: exchange must be "auto" or "gather" for gist, got "ring"'),
        ("weight", "ValueError: weight must have shape (8,), got (3,)"),
        ("module", "ValueError: query and negatives must have the same number of features D, got 5 "
         "and 2"),
        ("covariance", "ValueError: the covariance of group 0 of 2 is not positive definite: its "
         "features must be linearly independent; use eps > 0, larger groups or fewer features"),
        ("queue", "ValueError: features must have shape (N, 5), got (4, 2)"),
    ],
)  # fmt: skip
def test_an_error_of_one_rank_reaches_all(what, error):
    for rank, report in enumerate(results(3)):
        seen, seconds = report["errors"][what]
        assert seen == (error if rank == 1 else f"ValueError: rank 1 of group raised {error}")
        assert seconds < 10  # the backend would wait for 60
        assert report["errors"]["after all"][0] == "no error"


def test_a_rank_that_does_not_come_is_an_error_within_the_timeout(tmp_path):
    (seen, seconds), _ = gloo.run(2, faults.never_comes, str(tmp_path), timeout=2)
    assert seen.startswith("RuntimeError: ") and seconds < 10


def test_a_rank_that_dies_is_an_error(tmp_path):
    seen, seconds = gloo.run(2, faults.dies_before_backward, timeout=5)[0]
    assert seen.startswith("RuntimeError: ") and seconds < 15


@pytest.mark.parametrize("world", WORLDS[1:])
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


def test_memory_of_a_ring_does_not_grow_with_the_ranks():
    """In shards of keys: a gather holds three more for each rank, a ring the same from W = 4 on,
    when there are always keys under way and gradients behind them."""

    def peak(reports: list[dict], exchange: str) -> float:
        shard = 4 * PEAK_ROWS * PEAK_DIM
        # on a busy machine a rank may come when the others have let their keys go
        return median_high(report[exchange][1] / shard for report in reports)

    three, four = ([report["peak"] for report in results(world)] for world in (3, 4))
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


def test_no_group_is_no_collective(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("a collective")

    monkeypatch.setattr("contrastive_kernels.distributed.call.all_gather", fail)
    x = torch.randn(4, 3)
    ck.clip_loss(x, x, 2.0, group=None, exchange="ring")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"group": "world"}, TypeError, "group must be a torch.distributed process group"),
        ({"exchange": "tree"}, ValueError, 'exchange must be "auto", "gather" or "ring"'),
    ],
)
def test_bad_groups(options, error, text):
    with pytest.raises(error, match=text):
        ck.nt_xent(torch.randn(4, 3), torch.randn(4, 3), **options)


def test_losses_without_a_ring():
    x = torch.randn(4, 3)
    for loss, inputs in ((ck.gist, (x, x, x, x)), (ck.clip_distill, (x, x, 1.0, x, x, 1.0))):
        with pytest.raises(
            ValueError, match=f'exchange must be "auto" or "gather" for {loss.__name__}, got "ring"'
        ):
            loss(*inputs, exchange="ring")


def test_sharded_negatives_need_a_group():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="sharded_negatives needs a group and negatives"):
        ck.gist(x, x, x, x, negatives=x, negatives_guide=x, sharded_negatives=True)
    for loss in (ck.info_nce, ck.eqco, ck.cacr):
        with pytest.raises(ValueError, match="sharded_negatives needs a group"):
            loss(x, x, negatives=x, sharded_negatives=True)


def test_join_without_a_group():
    batch, more = join(None, 3, 5)
    assert (batch.total, more.total) == (3, 5)
    assert not isinstance(batch, Shards) and not isinstance(more, Shards)
