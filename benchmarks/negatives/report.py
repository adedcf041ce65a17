"""The plot and the page of `python -m benchmarks.negatives`, from its results."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes

from contrastive_kernels.demo.data import PATCH

from ..harness import pages, pictures
from ..harness.markdown import table, versions
from ..harness.paths import DOCS, IMAGES, RESULTS
from ..harness.seeds import spread

PAGE = DOCS / "negatives.md"
PICTURE = IMAGES / "negatives"
MISSING = "–"  # of a run that was stopped
MEASURES = {
    "neighbours": "5 nearest neighbours",
    "probe": "linear probe, 10 labels a class",
    "moved_neighbours": "5 nearest neighbours, moved images",
}
COLORS = {"InfoNCE": pictures.OTHERS[0], "EqCo": pictures.OURS, "CACR": pictures.OTHERS[1]}


class Study:
    """A result, by loss and number of negatives."""

    def __init__(self, result: dict):
        self.result = result
        self.settings = result["settings"]
        self.losses = list(dict.fromkeys(r["loss"] for r in result["trainings"]))
        self.counts = list(dict.fromkeys(r["negatives"] for r in result["trainings"]))

    def values(self, kind: str, loss: str, count: int, field: str) -> list[float]:
        """One value for each seed, in their order."""
        records = self.result[kind]
        return [r[field] for r in records if (r["loss"], r["negatives"]) == (loss, count)]

    def baseline(self, name: str, field: str) -> list[float]:
        return [r[field] for r in self.result["baselines"] if r["name"] == name]

    def gains(self, loss: str, few: int, field: str) -> list[float]:
        """What the most negatives give beyond `few`, for each seed."""
        pairs = (self.values("trainings", loss, count, field) for count in (few, self.counts[-1]))
        return [most - fewer for fewer, most in zip(*pairs, strict=False)]


def shares(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation in %, or in percentage points with sign="+"."""
    if not values:
        return MISSING
    return f"{100 * statistics.fmean(values):{sign}.1f} ± {100 * spread(values):.1f}"


def mean(values: list[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}}" if values else MISSING


def accuracy_rows(study: Study, field: str) -> Iterable[list[str]]:
    for count in study.counts:
        cells = (shares(study.values("trainings", x, count, field)) for x in study.losses)
        yield [f"{count:,}", *cells]
    for few in study.counts[:2]:
        gains = (shares(study.gains(loss, few, field), "+") for loss in study.losses)
        yield [f"{study.counts[-1]:,} less {few}", *gains]


def baseline_rows(study: Study) -> Iterable[list[str]]:
    for name in dict.fromkeys(r["name"] for r in study.result["baselines"]):
        yield [name, *(shares(study.baseline(name, field)) for field in MEASURES)]


def gradient_rows(study: Study) -> Iterable[list[str]]:
    for count in study.counts:
        row = [f"{count:,}"]
        for loss in study.losses:
            row.append(mean(study.values("gradients", loss, count, "length"), ".2f"))
            row.append(mean(study.values("gradients", loss, count, "noise"), ".1%"))
        yield row


def cost_rows(study: Study) -> Iterable[list[str]]:
    for count in study.counts:
        row = [f"{count:,}"]
        for loss in study.losses:
            row.append(mean(study.values("costs", loss, count, "loss_ms"), ".3g"))
            row.append(mean(study.values("trainings", loss, count, "step_ms"), ".0f"))
        yield row


def provenance(study: Study) -> str:
    """Device, versions, date and command."""
    result, settings, crops = study.result, study.settings, study.result["crops"]
    environment = result["environment"]
    again = [
        f" The {part} were measured on {source['date']} with `{source['command']}`, commit"
        f" {source['commit']}."
        for part, source in result.get("again", {}).items()
    ]
    seeds = len({r["seed"] for r in result["trainings"]})
    return (
        f"Measured with `{result['command']}` on one thread of {environment['device']};"
        f" {versions(environment)}; {result['date']}, commit {environment['commit']}."
        f" {len(study.result['trainings'])} trainings: {seeds} seeds, {settings['steps']} steps of"
        f" {settings['batch']} queries,"
        f" D = {settings['dim']}, {settings['fresh']} keys a step into a queue of"
        f" {settings['queue']:,}. Training crops: {crops['positions']:,} positions of {PATCH} x"
        f" {PATCH} pixels, on an area of {crops['pixels'] // PATCH**2:,} crops side by side."
        f" {settings['test']:,} test crops. ± is the standard deviation over the seeds; the"
        " differences in the last rows are paired by seed." + "".join(again)
    )


def section(result: dict) -> str:
    """The generated part of the page."""
    study = Study(result)
    lines = [provenance(study), ""]
    for field, title in MEASURES.items():
        lines += [f"### Accuracy: {title}", "", "In % of the test crops.", ""]
        lines += [*table(["negatives", *study.losses], accuracy_rows(study, field)), ""]
    lines += ["### For scale", ""]
    lines += [*table(["encoder", *MEASURES.values()], baseline_rows(study)), ""]
    lines += ["### The gradient", ""]
    head = [f"{loss}{part}" for loss in study.losses for part in (", length", ", noise")]
    lines += [*table(["negatives", *head], gradient_rows(study)), ""]
    lines += [
        "### Time",
        "",
        "CPU milliseconds: the loss alone, forward and backward, and a step.",
        "",
    ]
    head = [f"{loss}{part}" for loss in study.losses for part in ("", ", step")]
    lines += [*table(["negatives", *head], cost_rows(study)), ""]
    return "\n".join(["", *lines])


def results() -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((RESULTS / "negatives").glob("*.json"))]


def updated(page: str) -> str:
    """The page with the figures of the results."""
    return pages.replaced(page, "negatives", "".join(map(section, results())))


def update(*, check: bool) -> int:
    """Writes the page, or with `check` only compares it; the exit status."""
    command = "python -m benchmarks.negatives --report"
    return pages.update({PAGE: updated}, command, check=check)


def plot() -> list[Path]:
    """Draws the first result; the files."""
    return draw(Study(results()[0]), PICTURE)


def draw(study: Study, stem: Path) -> list[Path]:
    """Three accuracies above, gradient and time below, all over the number of negatives."""
    made, axes = pictures.figure(3, 2)
    for one, (field, title) in zip(axes[0], MEASURES.items(), strict=True):
        curves(one, study, "trainings", field, 100)
        one.set_title(f"{title}, %", loc="left")
        scale_lines(one, study, field)
    length, noise, cost = axes[1]
    curves(length, study, "gradients", "length", 1)
    length.set_title("length of a query's expected gradient", loc="left")
    length.set_ylim(bottom=0)
    curves(noise, study, "gradients", "noise", 100)
    noise.set_title("its noise, % of the mean square", loc="left")
    curves(cost, study, "costs", "loss_ms", 1)
    cost.set_yscale("log")
    cost.set_title("CPU ms of the loss, one thread", loc="left")
    for one in axes.flat:
        one.set_xscale("log", base=4)
        one.set_xticks(study.counts, [f"{count:,}" for count in study.counts], rotation=45)
        one.minorticks_off()
    for one in axes[1]:
        one.set_xlabel("negatives K")
    axes[0, 0].legend(frameon=False, fontsize=8, loc=(0.05, 0.2))
    return pictures.save(made, stem)


def curves(axes: Axes, study: Study, kind: str, field: str, factor: float) -> None:
    """The mean over the seeds of each loss, with the standard deviation where there are seeds."""
    for loss in study.losses:
        series = {k: values for k in study.counts if (values := study.values(kind, loss, k, field))}
        means = [factor * statistics.fmean(values) for values in series.values()]
        bars = [factor * spread(values) for values in series.values()]
        axes.errorbar(
            list(series), means, bars, color=COLORS[loss], marker="o", capsize=2, label=loss
        )


def scale_lines(axes: Axes, study: Study, field: str) -> None:
    """The encoder with labels and the one without training."""
    for name, style in (("supervised", "--"), ("untrained", ":")):
        height = 100 * statistics.fmean(study.baseline(name, field))
        axes.axhline(height, color="#999999", linestyle=style, linewidth=1, label=name)
