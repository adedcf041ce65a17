"""Draws the scaling studies from their JSON: a picture for each, time beside peak memory."""

from collections.abc import Callable
from math import ceil, floor, log10
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..harness import pictures
from ..harness.implementations import OURS
from ..harness.markdown import brief

# Below it a peak is the noise of the system's pages.
LEAST_MB = 1.0


def draw(result: dict, folder: Path) -> list[Path]:
    """Writes scaling_<study>.svg and .png of every study that has points; the files."""
    paths = []
    for name, study in result["studies"].items():
        if study["points"]:
            paths += pictures.save(figure(study, result), folder / f"scaling_{name}")
    return paths


def figure(study: dict, result: dict) -> Figure:
    made, axes = pictures.figure(2, height=3.6)
    environment = result["environment"]
    threads = sorted({point["threads"] for point in study["points"]})
    made.suptitle(
        f"{study['title']}: forward and backward, float32\n{environment['device']}, threads: "
        f"{', '.join(map(str, threads))}; torch {environment['versions']['torch']}, "
        f"{result['date']}",
        fontsize=9, ha="left", x=0.01,
    )  # fmt: skip
    colors = dict(zip(names(result), (pictures.OURS, *pictures.OTHERS), strict=False))
    panel(axes[0, 0], study, colors, "time, ms", lambda r: r["milliseconds"]["median"])
    panel(axes[0, 1], study, colors, "peak memory beyond inputs, MB", memory)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return made


def names(result: dict) -> list[str]:
    """All names of a result, ours first: an implementation looks alike in all pictures."""
    points = [point for study in result["studies"].values() for point in study["points"]]
    return list(dict.fromkeys(name for point in points for name in point["results"]))


def memory(result: dict) -> float | None:
    return None if result["mb"] is None else max(LEAST_MB, result["mb"])


def panel(
    axes: Axes,
    study: dict,
    colors: dict[str, str],
    title: str,
    value: Callable[[dict], float | None],
) -> None:
    """One curve for each implementation; where it ends before the others, why."""
    points = study["points"]
    places = [point["x"] for point in points]
    streamed = [point["x"] for point in points if point["streamed"]]
    label = study["label"]
    if streamed:
        label += f" (from {short(streamed[0])} on ours reads a file)"
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(places, [short(x) for x in places])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
    notes = []
    for name, color in colors.items():
        xs, ys, reason = [], [], None
        for point in points:
            entry = point["results"].get(name)
            if entry is None:
                continue
            if "reason" in entry:
                reason = f"at {short(point['x'])} {brief(entry['reason'])}"
            elif value(entry) is not None:
                xs.append(point["x"])
                ys.append(value(entry))
        if not xs:
            continue
        axes.plot(xs, ys, "o-", color=color, label=name, zorder=3 if name == OURS else 2)
        if reason is not None:
            notes.append((xs[-1], ys[-1], reason, color))
    # whole decades, so that every picture has several marks
    low, high = (log10(y) for y in axes.dataLim.intervaly)
    axes.set_ylim(10 ** floor(low), 10 ** max(ceil(high + 0.3), floor(low) + 1))
    for line, (x, y, reason, color) in enumerate(sorted(notes, key=lambda note: -note[1])):
        axes.plot([x], [y], "x", color=color, markersize=9, markeredgewidth=2, zorder=4)
        # in a corner that growing curves leave free, in the order of the curves
        axes.text(
            0.03, 0.97 - 0.07 * line, f"× {reason}", transform=axes.transAxes, fontsize=7.5,
            color=color, va="top",
        )  # fmt: skip


def short(x: int) -> str:
    """1024 as 1k, 2^20 as 1M."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if x >= size and x % size == 0:
            return f"{x // size}{letter}"
    return str(x)
