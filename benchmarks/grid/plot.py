"""Heat maps of a grid: a picture for each dtype, a panel for each loss."""

from math import log2
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from ..harness import pictures
from .verdict import Places, by_loss, columns, dtypes, number, verdict

COLUMNS = 4
# A ratio of 2^-LIMIT, or 2^LIMIT, has the full colour.
LIMIT = 3.0
NORM = TwoSlopeNorm(0.0, -LIMIT, LIMIT)
# Blue where ours is faster, red where it is slower.
COLORS = colormaps["RdBu_r"]
SHORT = {"dense does not fit": "no fit", "dense too slow": "slow"}


def draw(result: dict, stem: Path) -> list[Path]:
    """Writes stem_<dtype>.svg and .png of each dtype; the files."""
    stem = stem.with_suffix("") if stem.suffix in (".svg", ".png") else stem
    paths = []
    for dtype in dtypes(result["points"]):
        paths += pictures.save(figure(result, dtype), stem.with_name(f"{stem.name}_{dtype}"))
    return paths


def figure(result: dict, dtype: str) -> Figure:
    losses = by_loss(result["points"], dtype)
    across = min(COLUMNS, len(losses))
    made, axes = pictures.figure(across, -(-len(losses) // across), width=3.7, height=2.4)
    environment = result["environment"]
    made.suptitle(
        f"Time of ours / the faster of dense eager torch and torch.compile, forward and backward, "
        f"{dtype}\n{environment['device']} ({environment['capability']}), threads: "
        f"{environment['threads']}; torch {environment['versions']['torch']}, {result['date']}",
        fontsize=9, ha="left", x=0.01,
    )  # fmt: skip
    for axis, (name, records) in zip(axes.flat, losses.items(), strict=False):
        panel(axis, name, records)
    for axis in list(axes.flat)[len(losses) :]:
        axis.set_visible(False)
    return made


def panel(axes: Axes, name: str, records: Places) -> None:
    """A cell for each point: blue where ours is faster, with the ratio."""
    rows, features = (sorted({place[axis] for place in records}) for axis in (0, 1))
    colors = np.full((len(rows), len(features)), np.nan)
    for (n, d), record in records.items():
        y, x = rows.index(n), features.index(d)
        found = verdict(record)
        if found.won is not None:
            height = -LIMIT if found.ratio is None else log2(found.ratio)
            colors[y, x] = min(LIMIT, max(-LIMIT, height))
        text = SHORT.get(found.text, "–") if found.ratio is None else number(found.ratio)
        dark = abs(np.nan_to_num(colors[y, x])) > 0.6 * LIMIT
        axes.text(
            x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7,
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set_facecolor("#eeeeee")
    axes.pcolormesh(colors, cmap=COLORS, norm=NORM, edgecolors="white", linewidth=0.5)
    axes.set_xticks(np.arange(len(features)) + 0.5, [str(d) for d in features], fontsize=7)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [f"{n:,}" for n in rows], fontsize=7)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"{name}, {columns(records)}", fontsize=9)
    axes.set(xlabel="features D", ylabel="rows N")
