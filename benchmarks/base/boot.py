"""The process of a worker: python -P boot.py PACKAGE BENCHMARKS

Loads the package of one build and these benchmarks out of their two folders, whatever the search
path has under their names, and serves.
"""

import importlib.util
import sys
from pathlib import Path


def load(name: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    for name, folder in zip(("contrastive_kernels", "benchmarks"), sys.argv[1:], strict=True):
        load(name, Path(folder))
    importlib.import_module("benchmarks.base.serve").serve()
