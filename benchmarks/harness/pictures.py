"""How every plot looks: light, few lines, labels beside the curves, as SVG and as PNG."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "savefig.facecolor": "white",
    # equal data gives equal files, and text stays text
    "svg.hashsalt": "contrastive_kernels",
    "svg.fonttype": "none",
}
OURS = "#c1121f"
OTHERS = ("#4c6a92", "#7a9e7e", "#b08968", "#8d7ba8", "#5f6b6d", "#c9a227", "#89a8c7")


def figure(columns: int, rows: int = 1, *, width: float = 4.2, height: float = 3.2) -> tuple:
    """A figure and its axes, an array (rows, columns)."""
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = made.subplots(rows, columns, squeeze=False)
    return made, axes


def label_end(axes: Axes, xs: np.ndarray, ys: np.ndarray, text: str, color: str) -> None:
    """Names a curve at its last point."""
    axes.annotate(
        text, (xs[-1], ys[-1]), xytext=(5, 0), textcoords="offset points",
        va="center", color=color, fontsize=8, annotation_clip=False,
    )  # fmt: skip


def save(made: Figure, stem: Path) -> list[Path]:
    """Writes stem.svg and stem.png; the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    with matplotlib.rc_context(STYLE):
        made.savefig(paths[0], metadata={"Date": None})
        made.savefig(paths[1], dpi=110)
    return paths
