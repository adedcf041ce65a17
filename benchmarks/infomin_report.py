"""The plots and the page of `python -m benchmarks.infomin`, from its results."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes

from . import pictures
from .environment import RESULTS, ROOT
from .markdown import table
from .report import replaced

PAGE = ROOT / "docs" / "infomin.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- infomin:begin -->", "<!-- infomin:end -->"
CHANCE_AND_BASELINES = ("colour covariance", "untrained")


def results() -> dict[str, dict]:
    """The results by part."""
    paths = sorted((RESULTS / "infomin").glob("*.json"), reverse=True)
    return {path.stem: json.loads(path.read_text()) for path in paths}


def values(result: dict, views: str, field: str) -> list[float]:
    """One value for each seed."""
    return [r[field] for r in result["records"] if r["views"] == views and field in r]


def kinds(result: dict) -> list[str]:
    """The views of a result, in its order."""
    return list(dict.fromkeys(record["views"] for record in result["records"]))


def spread(numbers: list[float]) -> float:
    """The standard deviation, 0 of a single number."""
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


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
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    return (
        f"Measured with `{result['command']}` on {result['note']} of {environment['device']}, in"
        f" {result['cpu_minutes']:.0f} minutes of its time; {versions}; {result['date']}, commit"
        f" {environment['commit']}. {settings['seeds']} seeds, {settings['steps']} steps of"
        f" {settings['batch']} pairs, temperature {settings['temperature']}; ± is the standard"
        " deviation over the seeds. I_NCE in nats, of held-out pairs with"
        f" {settings['batch']} candidates; accuracy of a linear probe in % of the held-out patches."
    )


TITLES = {
    "distance": ("Two patches", "distance in pixels"),
    "colour": ("Colour channels", "views"),
}


def section(result: dict) -> list[str]:
    title, first = TITLES[result["part"]]
    fields = [name for name in result["records"][-1] if name not in ("views", "seed", "bound")]
    lines = [f"### {title}", "", provenance(result), ""]
    return [*lines, *table([first, "I_NCE", *fields], rows(result, fields)), ""]


def updated(page: str) -> str:
    """The page with the figures of the results."""
    lines = [line for result in results().values() for line in section(result)]
    return replaced(page, "\n".join(["", *lines]), BEGIN, END)


def write() -> None:
    PAGE.write_text(updated(PAGE.read_text()))


def check() -> int:
    """1, with a message, when the page and the results disagree."""
    differs = updated(page := PAGE.read_text()) != page
    if differs:
        print(f"{PAGE.name} disagrees with the results: run python -m benchmarks.infomin --report")
    return int(differs)


def plot() -> list[Path]:
    """Draws each part that there is; the files."""
    return [
        path
        for part, result in results().items()
        for path in {"distance": _plot_distance, "colour": _plot_colour}[part](result)
    ]


def _points(axes: Axes, result: dict, views: str, task: str, **style) -> tuple[float, float]:
    """One cross of means and deviations, I_NCE against accuracy in %; where it is."""
    bounds = values(result, views, "bound")
    accuracies = [100 * value for value in values(result, views, task)]
    x, y = statistics.fmean(bounds), statistics.fmean(accuracies)
    axes.errorbar(
        x, y, xerr=spread(bounds), yerr=spread(accuracies), capsize=0, elinewidth=1, **style
    )
    return x, y


def _plot_distance(result: dict) -> list[Path]:
    distances = [views for views in kinds(result) if views.isdigit()]
    tasks = {
        "photograph": pictures.OTHERS[0],
        "region": pictures.OURS,
        "direction": pictures.OTHERS[1],
    }
    made, axes = pictures.figure(3)
    left, middle, right = axes[0]
    xs = [int(views) for views in distances]
    bounds = [values(result, views, "bound") for views in distances]
    left.errorbar(
        xs, list(map(statistics.fmean, bounds)), list(map(spread, bounds)),
        marker="o", color=pictures.OURS,
    )  # fmt: skip
    left.set(title="What the views share", ylabel="I_NCE, nats", ylim=(0, None))
    for task, color in tasks.items():
        untrained = statistics.fmean(values(result, "untrained", task))
        accuracies = [values(result, views, task) for views in distances]
        means = [statistics.fmean(each) / untrained for each in accuracies]
        errors = [spread(each) / untrained for each in accuracies]
        middle.errorbar(xs, means, errors, marker="o", color=color)
        pictures.label_end(middle, xs, means, task, color)
        curve = sorted(zip(map(statistics.fmean, bounds), means, strict=True))
        right.plot(*zip(*curve, strict=True), marker="o", color=color)
        right.annotate(
            task, curve[0], xytext=(-2, 7), textcoords="offset points", color=color, fontsize=8
        )
    middle.set(title="What a linear probe finds", ylabel="accuracy / untrained encoder's")
    for each in (left, middle):
        each.set(xscale="log", xticks=xs, xlabel="distance of the patches, pixels")
        each.set_xticklabels(distances)
        each.minorticks_off()
    right.set(title="One against the other", xlabel="I_NCE, nats", ylabel="accuracy / untrained's")
    return pictures.save(made, IMAGES / "infomin_distance")


def _plot_colour(result: dict) -> list[Path]:
    made, axes = pictures.figure(2, width=5.4, height=4.2)
    marks = {"unsupervised": "v", "semi-supervised": "^"}
    for each, task in zip(axes[0], ("photograph", "region"), strict=True):
        for views in kinds(result):
            if views in CHANCE_AND_BASELINES:
                continue
            learned = [mark for name, mark in marks.items() if views.endswith(f", {name}")]
            if learned:
                color = pictures.OURS if views.startswith("RGB,") else pictures.OTHERS[2]
                full = "full" if ", affine, " in views else "none"
                style = {"marker": learned[0], "color": color, "fillstyle": full, "markersize": 7}
                _points(each, result, views, task, **style)
            else:
                point = _points(each, result, views, task, marker="o", color=pictures.OTHERS[0])
                each.annotate(
                    views, point, xytext=(5, 5), textcoords="offset points", fontsize=8,
                    color=pictures.OTHERS[0],
                )  # fmt: skip
        untrained = 100 * statistics.fmean(values(result, "untrained", task))
        each.axhline(untrained, color=pictures.OTHERS[4], linewidth=1, linestyle=":")
        each.set(title=f"Which {task}", xlabel="I_NCE, nats", ylabel="accuracy, %")
    return pictures.save(made, IMAGES / "infomin_colour")
