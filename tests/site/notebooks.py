"""Runs the cells of a notebook in one namespace, without Jupyter: what they print, what they draw.

python tests/site/notebooks.py examples/*.ipynb    # writes the outputs into the notebooks
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any


def run(path: Path) -> tuple[dict, dict[str, Any]]:
    """The notebook with new outputs, and the names that its cells leave."""
    notebook = json.loads(path.read_text())
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(path.parent), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for count, cell in enumerate(code, 1):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), f"{path.name}[{count}]", "exec"), names)
            cell["execution_count"] = count
            cell["outputs"] = [*_text(printed.getvalue()), *_figures()]
    return notebook, names


def _text(printed: str) -> list[dict]:
    if not printed:
        return []
    return [{"name": "stdout", "output_type": "stream", "text": printed.splitlines(True)}]


def _figures() -> list[dict]:
    """The figures of matplotlib that are open, which Jupyter would show."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    plt = sys.modules["matplotlib.pyplot"]
    outputs = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        plt.figure(number).savefig(file, format="png", dpi=70, metadata={"Software": None})
        data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


if __name__ == "__main__":
    import matplotlib

    from benchmarks.baselines.loading import declare_torchvision

    matplotlib.use("agg")
    declare_torchvision()
    for name in sys.argv[1:]:
        result, _ = run(Path(name).resolve())
        Path(name).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
