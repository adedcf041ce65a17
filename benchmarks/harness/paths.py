"""Where results and pages lie; nothing here imports torch."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
IMAGES = DOCS / "images"
# An installed package has no folder for results, and no commit.
IN_CHECKOUT = (ROOT / "pyproject.toml").exists()
