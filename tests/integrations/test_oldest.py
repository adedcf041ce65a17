"""The oldest versions of the packages that the integrations serve, in the environment of theirs
that `make test` sets up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matrix
import pytest

PYTHON = Path(sys.prefix, "oldest", "bin", "python")
OLDEST = [
    (peer, versions[-1])
    for peer, package in matrix.PACKAGES.items()
    if len(versions := package.versions.split()) > 1
]


@pytest.mark.skipif(not PYTHON.exists(), reason="`make test` installs the oldest versions")
def test_a_few_of_the_tests():
    records, text = matrix.run_tests(str(PYTHON), *(peer for peer, _ in OLDEST), few=True)
    for peer, record in records.items():
        assert matrix.passed(record), text
        assert record["fused"], peer


def test_the_oldest_are_installed():
    pins = (matrix.ROOT / "requirements-oldest.txt").read_text().split()
    for peer, version in OLDEST:
        assert f"{matrix.PACKAGES[peer].distribution}=={version}" in pins


def test_the_table_is_that_of_the_record():
    page = matrix.PAGE.read_text()
    results = json.loads(matrix.RESULTS.read_text())
    assert matrix.with_table(page, results) == page
    for peer, records in results.items():
        assert set(records) <= set(matrix.PACKAGES[peer].versions.split())
