"""Options of `pytest benchmarks/`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sizes",
        choices=("table", "quick", "tiny"),
        default="table",
        help="sizes of the cases: those of the table, a fraction of a second each, or the least",
    )
