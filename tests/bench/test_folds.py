"""The table of folds.py: what it asks for is in the table of cases, and what it says."""

from __future__ import annotations

import json

import pytest

from benchmarks import folds, report
from benchmarks.cases.table import CASES

MET = folds.Row("top_k", "faiss IndexFlatIP", "time", 0.75, 1.0)
MISSED = MET._replace(value=1.25)
ABSENT = MET._replace(value="not installed: pip install faiss-cpu")


@pytest.mark.parametrize("contest", folds.CONTESTS.values(), ids=folds.CONTESTS)
def test_every_contest_has_a_bound(contest):
    case = CASES[contest.case]
    assert any(baseline.at_most for baseline in case.baselines)
    assert case.memory or contest.memory is None


def test_what_is_told():
    assert "0.750 of 1" in folds.told(MET) and "MISSED" not in folds.told(MET)
    assert folds.told(MISSED).endswith("MISSED")
    assert folds.told(ABSENT).endswith("pip install faiss-cpu")


def test_the_table_of_the_page(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.folds() == "\nNo results yet.\n"
    (tmp_path / "folds").mkdir()
    environment = {"device": "a processor", "capability": "AVX512", "threads": 2, "commit": "c"}
    environment["versions"] = {"torch": "2.13"}
    rows = [row._asdict() for row in (MET, MISSED, ABSENT)]
    result = {"command": "x", "date": "d", "environment": environment, "rows": rows}
    (tmp_path / "folds" / "a.json").write_text(json.dumps(result))
    text = report.folds()
    assert "| top_k | faiss IndexFlatIP | time | 0.75 | 1 |" in text
    assert "| **1.25** | 1 |" in text and "pip install faiss-cpu" in text
