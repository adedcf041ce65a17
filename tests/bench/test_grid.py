"""The grid: the order of its points, what a later run goes on with, what is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from allocations import peak_of
from grid_records import CHUNKS, COMPILED, EAGER, head, record_of, timed
from oracles import DEVICE

from benchmarks import options, run
from benchmarks.baselines import dense
from benchmarks.baselines.baseline import Baseline
from benchmarks.cases.grid import CASES, dense_bytes
from benchmarks.cases.inputs import Sizes
from benchmarks.grid import order, point
from benchmarks.grid import run as grid_run
from benchmarks.grid.verdict import verdict
from benchmarks.harness import timing
from benchmarks.harness.measure import Effort

pytestmark = [
    pytest.mark.usefixtures("short"),
    pytest.mark.skipif(DEVICE != "cpu", reason="the grid is of a CPU"),
]
NOTHING = Effort(0.0, 3)


def chosen(*arguments: str):
    return options.parse(["--grid", *arguments])[1]


# The order of the points


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([8], {8: 0}),
        ([8, 9], {8: 0, 9: 1}),
        (order.WHOLE.n, {1024: 0, 256: 1, 16384: 1, 4096: 2}),
        (order.WHOLE.d, {512: 0, 64: 1, 4096: 1, 128: 2, 1024: 2, 256: 3, 2048: 3}),
    ],
)
def test_the_middle_comes_first_then_the_ends_then_the_gaps(values, expected):
    assert order.levels(set(values)) == expected


def test_what_is_done_early_covers_the_grid():
    cases = chosen()
    assert len({grid_run.key(case.record()) for case in cases}) == len(cases) == 8 * 3 * 4 * 7
    places = [(case.sizes.n, case.sizes.d) for case in cases]
    each = 8 * 3  # losses and dtypes
    assert set(places[:each]) == {(1024, 512)}
    assert {case.name for case in cases[:each]} == set(CASES)
    # the ends of both, of which the long ones come a level later, or more
    ends = {(n, d) for n in (256, 1024) for d in (64, 512, 4096)}
    assert set(places[: len(ends) * each]) == ends
    level = [order.guess(case) for case in cases[each : len(ends) * each]]
    assert level == sorted(level) and level[-1] < order.LONG_SECONDS
    half = set(places[: len(places) // 2])
    assert {n for n, _ in half} == set(order.WHOLE.n) and {d for _, d in half} >= {64, 512, 4096}
    assert (16384, 4096) not in half


def test_columns_follow_the_rows():
    columns = {case.name: case.sizes.m for case in chosen("-N", "512", "-D", "32")}
    twice, queue = {"nt_xent", "mnrl"}, {"info_nce_frozen"}
    assert columns == {
        name: 512 * (2 if name in twice else 4 if name in queue else 1) for name in CASES
    }
    assert {case.sizes.d for case in chosen("-D", "32")} == {32}


def test_options_choose_points():
    quick = chosen("--quick", "--loss", "nt_xent")
    assert {(case.name, case.sizes.n, case.sizes.d) for case in quick} == {
        ("nt_xent", n, d) for n in order.QUICK.n for d in order.QUICK.d
    }
    assert {str(case.dtype) for case in quick} == {"torch.float32"}
    names = [baseline.name for baseline in chosen("--case", "info_nce")[0].baselines]
    assert names == [EAGER, COMPILED, CHUNKS]
    words = "--grid --minutes 3 -N 8 16 --dtype float16 --threads 1".split()
    command = run.command_line(options.parse([*words, "--again"])[0])
    assert command == f"{options.PROGRAM} {' '.join(words)}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--minutes 3", "--minutes goes with --grid"),
        ("--again", "--again goes with --grid"),
        ("--grid --group small", "--group does not go with --grid"),
        ("--grid -M 8", "-M does not go with --grid"),
        ("--grid --base main", "--base does not go with --grid"),
        ("--grid --loss whiten", "--loss must be one of info_nce, clip_loss, "),
        ("--grid --minutes 0", "argument --minutes: must be an integer > 0, got 0"),
    ],
)
def test_what_does_not_go_with_it_gets_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        options.parse(arguments.split())
    assert sentence in capsys.readouterr().err


# The run


@pytest.fixture
def made_up(monkeypatch):
    """Points that take 10 s of a clock of their own, and the places that were measured."""
    places, clock = [], [0.0]

    def measure(case, earlier, effort, count):
        places.append((case.sizes.n, case.sizes.d))
        clock[0] += 10.0
        peers = [timed(baseline.name, 2.0, 0.5) for baseline in case.baselines]
        return record_of(case.sizes.n, case.sizes.d, *peers, name=case.name)

    monkeypatch.setattr(grid_run, "measure", measure)
    monkeypatch.setattr(grid_run.time, "monotonic", lambda: clock[0])
    return places


def go(path, cases, *, again=False, seconds=None) -> list[float]:
    """Runs; the seconds that were left after each point."""
    begun = grid_run.Run(cases, path, head(), again=again)
    return [rest for _, rest in begun.measure(NOTHING, seconds)]


def test_a_later_run_goes_on(made_up, tmp_path):
    path = tmp_path / "grid.json"
    few = chosen("--case", "info_nce", "-N", "16", "-D", "4", "8", "--dtype", "float32")
    rest = go(path, few)
    assert made_up == [(16, 4), (16, 8)] and rest[1] == 0 < rest[0]
    more = chosen("--case", "info_nce", "-N", "16", "-D", "4", "8", "12", "--dtype", "float32")
    assert grid_run.Run(more, path, head(), again=False).skipped == 2
    go(path, more)
    assert made_up[2:] == [(16, 12)]
    points = json.loads(path.read_text())["points"]
    assert [record["sizes"]["d"] for record in points] == [4, 8, 12]
    go(path, few, again=True)
    assert len(made_up) == 5 and len(json.loads(path.read_text())["points"]) == 3


def test_what_failed_or_lacks_a_baseline_is_measured_again(made_up, tmp_path):
    path = tmp_path / "grid.json"
    cases = chosen("--case", "info_nce", "-N", "16", "-D", "4", "8", "12", "--dtype", "float32")
    whole = [timed(name, 2.0, 0.5) for name in (EAGER, COMPILED, CHUNKS)]
    kept = [record_of(16, 4, *whole[:1]), record_of(16, 8, failed="why"), record_of(16, 12, *whole)]
    path.write_text(json.dumps(head() | {"commands": ["before"], "points": kept}))
    go(path, cases)
    assert sorted(made_up) == [(16, 4), (16, 8)]
    assert json.loads(path.read_text())["commands"] == ["before", "bench --grid"]


def test_results_of_something_else_are_not_mixed(tmp_path, monkeypatch):
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(head() | {"commands": [], "points": []}))
    for other in ({"capability": "AVX2"}, {"threads": 1}, {"versions": {"torch": "3"}}):
        with pytest.raises(ValueError, match="grid.json is of Imaginary CPU.*, not of Imaginary"):
            grid_run.Run([], path, head(**other), again=False)
        assert grid_run.result_path(head(**other)["environment"]) != grid_run.result_path(
            head()["environment"]
        )
    name = grid_run.result_path(head()["environment"]).name
    assert name == "imaginary-cpu-family-1-model-2-2-threads-avx9-torch-2-99.json"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    limited = head()["environment"]
    limited["isa"] = grid_run.isa(limited)
    assert "-avx9-onednn-max-cpu-isa-avx2-torch-" in grid_run.result_path(limited).name


def test_minutes_pass_over_what_does_not_fit(made_up):
    cases = chosen("--case", "info_nce", "--dtype", "float32", "--peer", "dense")
    rest = go(None, cases, seconds=100.0)
    assert 100.0 >= 10.0 * len(made_up) and len(made_up) > 5
    assert set(made_up[:3]) == {(1024, 512), (256, 64), (256, 512)}
    places = [(case.sizes.n, case.sizes.d) for case in cases]
    passed_over = set(places[: places.index(made_up[-1])]) - set(made_up)
    assert (16384, 64) in passed_over  # and what costs less comes after
    assert all(0 <= each <= 100 for each in rest)
    assert go(None, cases, seconds=1e-9) == []


def test_an_interrupt_leaves_what_is_done(made_up, monkeypatch, tmp_path, capsys):
    first = grid_run.measure

    def measure(*arguments):
        if made_up:
            raise KeyboardInterrupt
        return first(*arguments)

    monkeypatch.setattr(grid_run, "measure", measure)
    path = tmp_path / "grid.json"
    words = ["--grid", "--case", "info_nce", "-N", "16", "-D", "4", "8", "--dtype", "float32"]
    words += ["--threads", "1", "--json", str(path), "--plot", str(tmp_path / "drawn.png")]
    assert run.main(words) == 130
    assert len(json.loads(path.read_text())["points"]) == 1
    drawn = {"drawn_float32.svg", "drawn_float32.png"}
    assert {file.name for file in tmp_path.iterdir()} == drawn | {"grid.json"}
    assert "stopped: 1 of 2 points are measured" in capsys.readouterr().out


def test_a_small_grid_of_every_loss_and_dtype(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid_run, "measure", lambda *given: point.measure(*given[:2], NOTHING))
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 0.0)
    path = tmp_path / "grid.json"
    words = ["--grid", "-N", "16", "-D", "8", "--peer", "dense", "F.linear"]
    assert run.main([*words, "--threads", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert len(result["points"]) == 8 * 3
    for record in result["points"]:
        (eager, *others) = record["peers"]
        ours = record["ours"]["milliseconds"]["median"]
        assert eager["ratio"] == pytest.approx(ours / eager["milliseconds"]["median"])
        assert verdict(record).text == "eager" and "seconds" in record
        assert [peer["name"] for peer in others] == [CHUNKS] * (record["name"] == "info_nce")
    capability = torch.backends.cpu.get_cpu_capability()
    assert result["environment"]["isa"]["capability"] == capability
    out = capsys.readouterr().out
    assert "24 of 24 points are measured" in out and "of 24 points" in out


def test_a_wrong_loss_has_no_number():
    case = replace(CASES["siglip_loss"].resized(Sizes(16, 16, 8)), baselines=())
    case = replace(case, loss=lambda **tensors: 2 * CASES["siglip_loss"].loss(**tensors))
    record = point.measure(case, (), NOTHING)
    assert record["failed"].startswith("differs from float64: value") and "ours" not in record
    assert verdict(record) == (None, "FAILED", None)


def test_every_shape_is_compiled():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    form = torch.compile(dense.info_nce, backend=backend, dynamic=False)
    case = replace(CASES["info_nce"], baselines=(Baseline(COMPILED, lambda: form),))
    with torch._dynamo.config.patch(recompile_limit=1):
        for n in (16, 24, 32):
            record = point.measure(case.resized(Sizes(n, n, 8)), (), NOTHING)
            assert "ratio" in record["peers"][0]
    assert len(compiled) == 3


def test_float16_has_a_loss_scale():
    case = replace(CASES["info_nce"].resized(Sizes(16, 16, 8)), dtype=torch.float16)
    tensors = case.tensors()
    step = case.step(case.under_test, tensors)
    step()
    scaled = step.gradients()["query"].double()
    plain = replace(step, loss_scale=1.0)
    plain()
    torch.testing.assert_close(
        scaled, 2**15 * plain.gradients()["query"].double(), rtol=0.01, atol=1
    )
    expected = case.truth(tensors).gradients["query"]
    torch.testing.assert_close(scaled, expected, rtol=0.002, atol=1)


# What is left out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_the_dense_form_needs_what_is_estimated(name, dtype):
    case = replace(
        CASES[name].resized(replace(CASES[name].sizes.with_rows(512), d=16)), dtype=dtype
    )
    step = case.step(case.baseline(EAGER).load(), case.tensors())
    step()

    def gradients() -> tuple[torch.Tensor, ...]:
        step()
        return tuple(step.gradients().values())

    assert 0.6 < peak_of(gradients) / dense_bytes(case) < 1.1


def test_half_features_need_half():
    case = CASES["nt_xent"].resized(Sizes(1024, 2048, 64))
    half = replace(case, dtype=torch.float16)
    assert dense_bytes(case) == 2 * dense_bytes(half) > 3 * 4 * 2048**2


def small() -> object:
    """info_nce without the baseline that takes long to compile, as though that were there."""
    case = CASES["info_nce"].resized(Sizes(16, 16, 8))
    return replace(case, baselines=tuple(b for b in case.baselines if not b.compiles))


def test_what_does_not_fit_is_won(monkeypatch):
    for needed, fits in ((2**45, False), (1, True)):
        monkeypatch.setattr(point, "dense_bytes", lambda case, needed=needed: needed)
        record = point.measure(small(), (), NOTHING)
        peers = {peer["name"]: peer for peer in record["peers"]}
        assert ("ratio" in peers[EAGER]) == fits and "ratio" in peers[CHUNKS]
        if not fits:
            assert peers[EAGER]["reason"].startswith(
                "dense does not fit: about 35184.4 GB, at most"
            )
            assert verdict(record) == (None, "dense does not fit", True)
    oom = "RuntimeError: can't allocate memory: you tried to allocate 17179869184 bytes. Error"
    assert verdict(record_of(1, 1, {"name": EAGER, "reason": oom})).won


def test_half_of_what_is_free_may_be_needed(monkeypatch):
    monkeypatch.setattr(point.memory_limit, "free_bytes", lambda: 1000)
    for needed, left_out in ((500, set()), (501, {EAGER, COMPILED})):
        monkeypatch.setattr(point, "dense_bytes", lambda case, needed=needed: needed)
        assert set(point._left_out(CASES["info_nce"], (), 1.0)) == left_out


def test_what_a_call_takes_is_expected_from_smaller_points():
    earlier = [record_of(n, d, timed(EAGER, ms, 0.5)) for n, d, ms in [
        (100, 8, 900.0),  # the point with more rows says more
        (200, 8, 400.0), (200, 16, 600.0), (400, 8, 5000.0), (200, 64, 5000.0),
    ]]  # fmt: skip
    case = CASES["info_nce"].resized(Sizes(300, 300, 32))
    per_pair = (0.6 + (0.6 - 0.4) * 2) / 200**2
    assert point.expected_seconds(case, EAGER, earlier) == pytest.approx(per_pair * 300**2)
    assert point.expected_seconds(case, COMPILED, earlier) == 0
    assert point.expected_seconds(replace(case, dtype=torch.float16), EAGER, earlier) == 0
    one = point.expected_seconds(case, EAGER, earlier[:1])
    assert one == pytest.approx(0.9 * 9)


def test_what_is_far_slower_is_left_out(monkeypatch):
    case = CASES["info_nce"]
    monkeypatch.setattr(point, "expected_seconds", lambda case, name, earlier: 60.0)
    assert set(point._left_out(case, (), 1.0)) == {EAGER, COMPILED, CHUNKS}
    assert point._left_out(case, (), 30.0) == {}  # ours is not faster by so much
    slow = [{"name": name} | why for name, why in point._left_out(case, (), 1.0).items()]
    assert verdict(record_of(1, 1, *slow)) == (None, "dense too slow", True)
    monkeypatch.setattr(point, "expected_seconds", lambda case, name, earlier: 10.0)
    assert point._left_out(case, (), 0.1) == {}
