"""The plots and the page of `python -m benchmarks.infomin`, from its results."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes

from ..harness import pages, pictures
from ..harness.markdown import table, versions
from ..harness.paths import DOCS, IMAGES, RESULTS
from ..harness.seeds import spread
from .parts import FIXED, FLOWS

PAGE = DOCS / "infomin.md"
TITLES = {  # of each part, and of the first column of its table
    "distance": ("Two patches", "distance in pixels"),
    "colour": ("Colour channels", "views"),
}
TASK_COLORS = {
    "photograph": pictures.OTHERS[0],
    "region": pictures.OURS,
    "direction": pictures.OTHERS[1],
}
FLOW_COLORS = (pictures.OURS, pictures.OTHERS[2], pictures.OTHERS[3])
MARKERS = {"unsupervised": "v", "semi-supervised": "^"}
BACKGROUND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
LABEL_SHIFTS = {  # in points, and which side of the label is there
    "R, GB": ((-7, -3), "right"),
    "G, RB": ((0, -14), "center"),
    "B, RG": ((-7, -12), "right"),
    "Y, DbDr": ((2, 19), "center"),
    "L, ab": ((6, 5), "left"),
    "V, HS": ((-6, -13), "right"),
}


def results() -> dict[str, dict]:
    """The results by part, in the order of the page."""
    paths = {part: RESULTS / "infomin" / f"{part}.json" for part in TITLES}
    return {part: json.loads(path.read_text()) for part, path in paths.items() if path.exists()}


def values(result: dict, views: str, field: str) -> list[float]:
    """One value for each seed."""
    return [r[field] for r in result["records"] if r["views"] == views and field in r]


def kinds(result: dict) -> list[str]:
    """The views of a result, in its order."""
    return list(dict.fromkeys(record["views"] for record in result["records"]))


def mean(numbers: list[float], scale: float = 1, digits: int = 2) -> str:
    """Mean and standard deviation; a dash of nothing."""
    if not numbers:
        return "–"
    text = f"{scale * statistics.fmean(numbers):.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ± {scale * spread(numbers):.{digits}f}"


def rows(result: dict, fields: list[str]) -> Iterable[list[str]]:
    for views in kinds(result):
        accuracy = (mean(values(result, views, field), 100, 1) for field in fields)
        yield [views, mean(values(result, views, "bound")), *accuracy]


def provenance(result: dict) -> str:
    """Device, versions, date, command and settings."""
    environment, settings = result["environment"], result["settings"]
    return (
        f"Measured with `{result['command']}` on {result['note']} of {environment['device']}, in"
        f" {result['cpu_minutes']:.0f} minutes of its time; {versions(environment)};"
        f" {result['date']}, commit {environment['commit']}. {settings['seeds']} seeds,"
        f" {settings['steps']} steps of {settings['batch']} pairs, temperature"
        f" {settings['temperature']}; ± is the standard deviation over the seeds. I_NCE in nats,"
        f" of held-out pairs with {settings['batch']} candidates; accuracy of a linear probe in %"
        " of the held-out patches."
    )


def section(result: dict) -> list[str]:
    title, first = TITLES[result["part"]]
    fields = [name for name in result["records"][-1] if name not in ("views", "seed", "bound")]
    lines = [f"### {title}", "", provenance(result), ""]
    return [*lines, *table([first, "I_NCE", *fields], rows(result, fields)), ""]


def updated(page: str) -> str:
    """The page with the figures of the results."""
    lines = [line for result in results().values() for line in section(result)]
    return pages.replaced(page, "infomin", "\n".join(["", *lines]))


def update(*, check: bool) -> int:
    """Writes the page, or with `check` only compares it; the exit status."""
    command = "python -m benchmarks.infomin --report"
    return pages.update({PAGE: updated}, command, check=check)


def plot() -> list[Path]:
    """Draws each part that there is; the files."""
    return [
        path
        for part, result in results().items()
        for path in {"distance": _plot_distance, "colour": _plot_colour}[part](result)
    ]


def _cross(axes: Axes, result: dict, views: str, task: str, **style) -> tuple[float, float]:
    """Means and deviations of I_NCE and of the accuracy in %; where their middle is."""
    bounds = values(result, views, "bound")
    accuracies = [100 * value for value in values(result, views, task)]
    point = statistics.fmean(bounds), statistics.fmean(accuracies)
    axes.errorbar(*point, spread(accuracies), spread(bounds), elinewidth=1, **style)
    return point


def _plot_distance(result: dict) -> list[Path]:
    distances = [views for views in kinds(result) if views.isdigit()]
    made, axes = pictures.figure(3)
    left, middle, right = axes[0]
    xs = [int(views) for views in distances]
    bounds = [values(result, views, "bound") for views in distances]
    left.errorbar(
        xs, list(map(statistics.fmean, bounds)), list(map(spread, bounds)),
        marker="o", color=pictures.OURS,
    )  # fmt: skip
    left.set_title("What the views share", loc="left")
    left.set(ylabel="I_NCE, nats", ylim=(0, None))
    for task, color in TASK_COLORS.items():
        untrained = statistics.fmean(values(result, "untrained", task))
        accuracies = [values(result, views, task) for views in distances]
        means = [statistics.fmean(each) / untrained for each in accuracies]
        errors = [spread(each) / untrained for each in accuracies]
        middle.errorbar(xs, means, errors, marker="o", color=color)
        pictures.label_end(middle, xs, means, task, color)
        curve = sorted(zip(map(statistics.fmean, bounds), means, strict=True))
        right.plot(*zip(*curve, strict=True), marker="o", color=color)
        pictures.label_end(right, *zip(*curve, strict=True), task, color)
    middle.set_title("What a linear probe finds", loc="left")
    middle.set(ylabel="accuracy / untrained encoder's")
    for each in (left, middle):
        each.set(xscale="log", xticks=xs, xlabel="distance of the patches, pixels")
        each.set_xticklabels(distances)
        each.minorticks_off()
    right.set_title("One against the other", loc="left")
    right.set(xlabel="I_NCE, nats", ylabel="accuracy / untrained encoder's")
    return pictures.save(made, IMAGES / "infomin_distance")


def _plot_colour(result: dict) -> list[Path]:
    made, axes = pictures.figure(2, width=5.0, height=4.4)
    untrained = {"color": pictures.OTHERS[4], "linewidth": 1, "linestyle": ":"}
    for each, task in zip(axes[0], ("photograph", "region"), strict=True):
        for views in FIXED:
            point = _cross(each, result, views, task, marker="o", color=pictures.OTHERS[0])
            shift, side = LABEL_SHIFTS[views]
            each.annotate(
                views, point, xytext=shift, textcoords="offset points", ha=side,
                color=pictures.OTHERS[0], fontsize=8, bbox=BACKGROUND,
            )  # fmt: skip
        for start, color in zip(FLOWS, FLOW_COLORS, strict=True):
            for mode, marker in MARKERS.items():
                views = f"{start}, {mode}"
                style = {"marker": marker, "color": color, "markersize": 7, "linestyle": "none"}
                _cross(each, result, views, task, label=f"from {views}", **style)
        level = 100 * statistics.fmean(values(result, "untrained", task))
        each.axhline(level, label="untrained encoders", **untrained)
        each.set_title(f"Which {task}", loc="left")
        each.margins(0.1)
        each.set(xlabel="I_NCE, nats", ylabel="accuracy, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return pictures.save(made, IMAGES / "infomin_colour")
