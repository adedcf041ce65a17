"""Draws the pictures of docs/grid.md from its results: python -m benchmarks.grid"""

import sys

from ..harness.paths import IMAGES
from .plot import draw
from .report import picture, results


def main() -> int:
    for stem, result in results().items():
        for file in draw(result, IMAGES / picture(stem)):
            print(f"wrote {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
