"""What the benchmark command prints and draws of its records."""

import sys
from dataclasses import replace

import pytest

from benchmarks.cases.inputs import Sizes
from benchmarks.cases.table import CASES
from benchmarks.harness import console, plot
from benchmarks.harness.implementations import implementations


def record_of(name: str, sizes: Sizes, **entries) -> dict:
    return replace(CASES["info_nce_small"], name=name).resized(sizes).record() | entries


def timed(median: float, **entries) -> dict:
    times = {"median": median, "p20": median, "p80": median, "samples": 5}
    return {"milliseconds": times} | entries


def made_up_records() -> list[dict]:
    eager = timed(8.0, name="dense eager torch", at_most=0.2, ratio=0.25)
    absent = {"name": "other", "at_most": None, "reason": "not installed: pip install other"}
    ours = timed(2.0, gflops=50.0, gemm_fraction=0.5)
    memory = {"ours": {"mb": 3.0}, "dense eager torch": {"mb": 70.0}}
    entries = {"ours": ours, "peers": [eager, absent], "memory": memory}
    return [record_of("a", Sizes(8, 8), **entries), record_of("b", Sizes(8, 8), failed="why")]


def test_the_rows_of_a_case():
    good, failed = made_up_records()
    title, ours, dense_row, other = console.rows(good, 64)
    assert title == "a  N=8 M=8 D=128 K=1  float32"
    assert ours.split()[1:3] == ["2.00", "ms"] and "3.0 MB" in ours and "50%" in ours
    assert ours.endswith("at most 64 MB: met")
    assert "0.250" in dense_row and dense_row.endswith("at most 0.20: NOT MET")
    assert other.split(maxsplit=1) == ["other", "not installed: pip install other"]
    assert console.rows(failed, None) == [title.replace("a", "b", 1), "  FAILED: why"]
    assert console.summary([good, failed]) == (
        "Ours took 0.25 of the time of dense eager torch, and at most 3 MB beyond inputs and "
        "gradients where it took 70."
    )
    assert console.summary([failed]) is None


def test_implementations_of_a_gpu_record():
    record = record_of("a", Sizes(8, 8), ours=timed(2.0, tflops=0.3, memory_mb=5.0), peers=[])
    (ours,) = implementations(record)
    assert (ours.memory_mb, ours.rate) == (5.0, 3e11)


def test_pictures_of_cases_without_a_sweep(tmp_path):
    result = {"environment": {"device": "Imaginary"}, "cases": made_up_records()}
    files = plot.draw(result, tmp_path / "dots")
    assert [file.name for file in files] == ["dots.svg", "dots.png"]
    text = files[0].read_text()
    assert "dense eager torch" in text and "a  N=8" in text and "b  N=8" not in text
    assert "peak memory" in text
    del result["cases"][0]["memory"]
    assert "peak memory" not in plot.draw(result, tmp_path / "dots")[0].read_text()


def test_a_sweep_of_two_sizes_has_a_panel_for_each_of_the_second():
    base = made_up_records()[0]
    records = [base | {"sizes": vars(Sizes(n, 2 * n, d))} for d in (4, 5) for n in (8, 16)]
    assert plot._swept(records) == "n"
    assert [text for text, _ in plot._panels(records, "n")] == [
        "a, float32\nD=4 K=1",
        "a, float32\nD=5 K=1",
    ]
    assert plot._swept([base]) is None


class Terminal:
    def __init__(self, is_one: bool):
        self.is_one, self.text = is_one, ""

    def isatty(self) -> bool:
        return self.is_one

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("is_one", [True, False])
def test_progress_is_one_line_on_a_terminal_and_a_log_elsewhere(is_one, monkeypatch):
    stream = Terminal(is_one)
    monkeypatch.setattr(sys, "stderr", stream)
    progress = console.Progress("case")
    progress("first")
    progress.passing("round 1")
    progress.close()
    assert stream.text.count("\n") == (0 if is_one else 1)
    assert ("round 1" in stream.text) == is_one
    assert stream.text.endswith("\r\033[K") == is_one
