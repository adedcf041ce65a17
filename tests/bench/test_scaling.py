"""The scaling studies: processes that may be cut short, oracles of samples, pictures of a JSON."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from oracles import DEVICE

from benchmarks.cases.inputs import Sizes
from benchmarks.cases.table import CASES
from benchmarks.harness.apart import apart
from benchmarks.harness.memory import unsupported
from benchmarks.scaling import oracle, plot, run
from benchmarks.scaling.point import First, write_keys

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the studies are of a CPU")
SIZES = Sizes(40, 40, 7)


@pytest.mark.parametrize("name, symmetric", [("info_nce", False), ("clip_loss", True)])
def test_the_oracle_of_a_sample_has_rows_of_the_whole(name, symmetric):
    case = CASES[name]
    tensors = replace(case, sizes=SIZES).tensors()
    first, second = list(tensors)[:2]
    sampled = oracle.directions(first, second, symmetric=symmetric)
    truth = sampled(tensors, case.options)
    whole = case.oracle(tensors, case.options)
    expected = whole.gradients[first][truth.rows]
    torch.testing.assert_close(truth.gradients[first], expected, rtol=1e-10, atol=1e-14)
    assert len(truth.rows) == oracle.SAMPLE
    assert truth.value == pytest.approx(whole.value, rel=1e-12) or not symmetric


@pytest.mark.parametrize("chunked", [False, True])
def test_the_oracle_of_a_sample_against_negatives(chunked, monkeypatch):
    monkeypatch.setattr(oracle, "KEYS", 20)
    case = CASES["info_nce_frozen"]
    tensors = replace(case, sizes=replace(SIZES, m=90)).tensors()
    whole = case.oracle(tensors, case.options)
    if chunked:
        tensors["negatives"] = Chunks(tensors["negatives"])
    truth = oracle.negatives(tensors, case.options)
    expected = whole.gradients["query"][truth.rows]
    torch.testing.assert_close(truth.gradients["query"], expected, rtol=1e-10, atol=1e-14)


class Chunks:
    def __init__(self, keys: torch.Tensor) -> None:
        self.keys, self.shape, self.dtype = keys, tuple(keys.shape), keys.dtype

    def __iter__(self):
        return iter(self.keys.split(13))


def test_first_rows_of_a_source(tmp_path):
    keys = torch.randn(60, 3)
    for rows in (1, 13, 20, 60):
        first = First(Chunks(keys), rows)
        assert first.shape == (rows, 3)
        assert torch.equal(first.read(), keys[:rows])
    write_keys(tmp_path / "keys", 5, 4)
    norms = torch.from_file(str(tmp_path / "keys"), size=20).view(5, 4).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(5))


def wait(seconds: float) -> dict:
    time.sleep(seconds)
    return {"waited": seconds}


def fail() -> dict:
    raise ValueError("what failed\nand more")


def leave() -> dict:
    raise SystemExit(3)


def test_work_in_processes_of_their_own():
    assert apart(30, wait, 0.0) == {"waited": 0.0}
    assert apart(30, fail) == {"reason": "ValueError: what failed"}
    assert apart(30, leave) == {"reason": "its process ended with 3"}
    start = time.monotonic()
    assert apart(0.2, wait, 60.0) == {"reason": "took more than 0 s"}
    assert time.monotonic() - start < 30


def test_a_smoke_run_writes_numbers_and_pictures(tmp_path, capsys):
    path = tmp_path / "result.json"
    options = ["--quick", "--study", "negatives", "--threads", "1", "--json", str(path)]
    options += ["--images", str(tmp_path), "--folder", str(tmp_path)]
    assert run.main(options) == 0
    result = json.loads(path.read_text())
    (study,) = result["studies"].values()
    assert [point["x"] for point in study["points"]] == [1024, 4096]
    for point in study["points"]:
        assert list(point["results"]) == ["ours", "dense eager torch"]
        for entry in point["results"].values():
            assert entry["milliseconds"]["median"] > 0
            assert unsupported() or entry["mb"] > 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "result.json", "scaling_negatives.svg", "scaling_negatives.png"
    }  # fmt: skip
    (tmp_path / "scaling_negatives.svg").unlink()
    assert run.main(["--plot", "--json", str(path), "--images", str(tmp_path)]) == 0
    assert (tmp_path / "scaling_negatives.svg").exists()
    assert run.main(["--plot", "--json", str(tmp_path / "none")]) == 1
    assert "none does not exist" in capsys.readouterr().out


def entry(ms: float, mb: float) -> dict:
    return {"milliseconds": {"median": ms}, "mb": mb}


REASON = "RuntimeError: can't allocate memory: you tried to allocate 17179869184 bytes. Error"
STUDY = {
    "label": "batch N", "title": "InfoNCE",
    "points": [
        {"x": 256, "threads": 2, "streamed": False,
         "results": {"ours": entry(1.0, 7.0), "dense": entry(2.0, 9.0)}},
        {"x": 65536, "threads": 2, "streamed": True,
         "results": {"ours": entry(900.0, 8.0), "dense": {"reason": REASON}}},
    ],
}  # fmt: skip


def test_a_curve_ends_with_its_reason(tmp_path):
    environment = {"device": "a processor", "versions": {"torch": "2"}}
    result = {"environment": environment, "date": "today", "studies": {"batch": STUDY}}
    svg, _ = plot.draw(result, tmp_path)
    text = svg.read_text()
    assert "at 64k out of memory: asked for 17 GB" in text
    assert "from 64k on ours reads a file" in text
    (axes, _) = plot.figure(STUDY, result).axes
    assert {line.get_label(): list(line.get_xdata()) for line in axes.lines[:2]} == {
        "ours": [256, 65536], "dense": [256]
    }  # fmt: skip


def test_a_stopped_run_keeps_what_it_has(monkeypatch, tmp_path):
    calls = []

    def measure(task, names, budget, progress):
        calls.append(task.index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {name: entry(1.0, 2.0) for name in names}

    monkeypatch.setattr(run, "measure", measure)
    path = tmp_path / "result.json"
    options = ["--quick", "--json", str(path), "--images", str(tmp_path)]
    assert run.main(options) == 0
    assert [p["x"] for p in json.loads(path.read_text())["studies"]["negatives"]["points"]] == [
        1024
    ]


def test_an_implementation_that_failed_is_left_out_from_then_on(monkeypatch, tmp_path):
    asked = []

    def measure(task, names, budget, progress):
        asked.append((task.study, names))
        return {n: entry(1.0, 2.0) if n == "ours" else {"reason": REASON} for n in names}

    monkeypatch.setattr(run, "measure", measure)
    options = run.arguments(["--quick", "--study", "negatives", "--folder", str(tmp_path)])
    run.run(options, lambda result: None)
    assert asked == [
        ("negatives", ["ours", "dense eager torch"]), ("negatives", ["ours"])
    ]  # fmt: skip
