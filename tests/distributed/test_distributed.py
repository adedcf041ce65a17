"""Losses over the ranks of a group, on gloo: every number beside one process on the whole batch."""

from __future__ import annotations

from functools import cache, partial

import comparisons
import gloo
import pytest
import torch
import torch.distributed as dist
from oracles import BACKENDS

from contrastive_kernels.losses.cases import LEARNED

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no gloo",
)
WORLDS = (1, 2, 3, 4)
TOLERANCE = 1e-10


@cache
def results(world: int) -> list[dict]:
    """One start of the processes, which takes longer than most tests, serves many of them."""
    return gloo.run(world, comparisons.everything, before=partial(comparisons.define, world))


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
    _, case = comparisons.CASES[name]
    learned = sum(given.kind in LEARNED for given in case.inputs.values())
    settings = range(3 if case.coupled else 5)  # of sizes, exchange and reduction, at least
    assert checked >= world * len(comparisons.share(name, settings, world)) * (1 + learned)


@pytest.mark.parametrize("kind", ["losses", "statistics", "bits"])
def test_three_ranks_and_four_share_settings_of_two(kind):
    two, three, four = (set(results(world)[0][kind]) for world in (2, 3, 4))
    assert three | four <= two
    assert {setup.name for setup in three & four} <= set(comparisons.FEW)
    if kind != "bits":
        assert {setup.name for setup in three | four} == {setup.name for setup in two}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    "name", [name for name, (row, _) in comparisons.CASES.items() if row.takes("return_stats")]
)
def test_statistics_are_those_of_one_process(world, name):
    for rank, report in enumerate(results(world)):
        found = {s: fields for s, fields in report["statistics"].items() if s.name == name}
        assert len(found) == len(comparisons.share(name, [0, 1], world)) and all(found.values())
        for setup, fields in found.items():
            for field, error in fields.items():
                assert error <= TOLERANCE, (rank, setup, field)


@pytest.mark.parametrize("world", WORLDS)
def test_two_runs_give_equal_bits_and_ranks_one_value(world):
    for report in results(world):
        names = comparisons.BITS
        runs = [comparisons.share(n, comparisons.exchanges(n), world) for n in names]
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
    for report in gloo.run(2, comparisons.under_autocast):
        for setup, errors in report.items():
            for what, error in errors.items():
                dtype, roundings = (torch.float32, 32) if what == "loss" else (torch.bfloat16, 2)
                assert error <= roundings * torch.finfo(dtype).eps, (setup, what)


def test_the_reference_keeps_its_precision_under_autocast():
    for report in gloo.run(2, comparisons.reference_under_autocast):
        assert len(report) >= len(comparisons.FIRST)
        assert all(report.values()), [setup for setup, equal in report.items() if not equal]


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
