"""The tables of the pages are those that the results give, and pages name what there is."""

import re
from pathlib import Path

import pytest
from fresh import run_python

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_agree_with_the_results():
    module = "benchmarks.report"
    run_python(f"import runpy\nrunpy.run_module({module!r}, run_name='__main__')", "--check")


def test_pages_show_pictures_that_there_are():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = [
        page.parent / target
        for page in pages
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    ]
    assert len(shown) > 5 and [path for path in shown if not path.exists()] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_lead_somewhere(name):
    """Those of the pages in docs/ are looked at when the site is built."""
    page = ROOT / name
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert targets and [target for target in targets if not (page.parent / target).exists()] == []


def test_guarantees_name_tests_that_there_are():
    text = (ROOT / "docs" / "guarantees.md").read_text()
    found = re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", text)
    path, count = "", 0
    for file, name in found:
        path = file or path
        count += bool(name)
        if name or file:
            assert f"def {name}(" in (ROOT / path).read_text() if name else (ROOT / path).exists()
    assert count > 20
