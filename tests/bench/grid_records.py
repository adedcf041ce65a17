"""Made-up records of the grid."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases.grid import CASES
from benchmarks.grid.verdict import DENSE_FORMS

EAGER, COMPILED = DENSE_FORMS
CHUNKS = "F.linear_cross_entropy, automatic chunks"


def timed(name: str, ms: float, ratio: float) -> dict:
    return {"name": name, "at_most": None, "ratio": ratio, "milliseconds": {"median": ms}}


def record_of(n: int, d: int, *peers: dict, name: str = "info_nce", **entries) -> dict:
    case = CASES[name].resized(replace(CASES[name].sizes.with_rows(n), d=d))
    stamps = {"date": "2026-01-02", "commit": "abc"}
    ours = {"milliseconds": {"median": 1.0}}
    return case.record() | {"ours": ours, "peers": list(peers)} | stamps | entries


def head(**changes) -> dict:
    environment = {
        "device": "Imaginary CPU, family 1 model 2", "capability": "AVX9", "threads": 2,
        "backend": "cpu", "versions": {"torch": "2.99"}, "commit": "abc",
        "isa": {"capability": "AVX9"},
    }  # fmt: skip
    return {
        "command": "bench --grid",
        "date": "2026-01-02",
        "environment": environment | changes,
    }
