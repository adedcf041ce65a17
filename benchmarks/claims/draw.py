"""A picture of each part."""

import statistics
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes

from ..harness import pictures
from ..harness.paths import IMAGES
from ..harness.seeds import spread
from .data import FACTORS
from .eqco import APART
from .infomin import SHARED
from .part import Study

COLORS = {
    "InfoNCE": pictures.OTHERS[0], "EqCo": pictures.OURS, "SiMo": pictures.OTHERS[2],
    "debiased": pictures.OTHERS[1], "HCL": pictures.OTHERS[3], "CACR": pictures.OURS,
    "W-MSE": pictures.OURS, "MSE": pictures.OTHERS[2],
    "digit": pictures.OURS, "place": pictures.OTHERS[0], "background": pictures.OTHERS[1],
}  # fmt: skip
KNN = "5 nearest neighbours, %"


def curve(
    axes: Axes,
    study: Study,
    field: str,
    name: str,
    over: str,
    xs: list,
    factor: float = 100,
    label: str | None = None,
    style: str = "-",
    marker: str = "o",
    **where: object,
) -> None:
    """Mean and deviation over the seeds, where there are records."""
    points = [(x, list(study.series(field, **{over: x}, **where).values())) for x in xs]
    points = [(x, values) for x, values in points if values]
    if points:
        means = [factor * statistics.fmean(values) for _, values in points]
        bars = [factor * spread(values) for _, values in points]
        axes.errorbar(
            [x for x, _ in points], means, bars,
            marker=marker, linestyle=style, capsize=2, color=COLORS[name], label=label or name,
        )  # fmt: skip


def log_axis(axes: Axes, xs: list[int], base: int, label: str) -> None:
    axes.set_xscale("log", base=base)
    axes.set_xticks(xs, [f"{x:,}" for x in xs], rotation=45 if len(xs) > 6 else 0)
    axes.minorticks_off()
    axes.set_xlabel(label)


def dots(axes: Axes, rows: list[tuple[str, list[float]]], colors: list[str]) -> None:
    """A row for each name, with the deviation over the seeds, in per cent."""
    for place, ((_, values), color) in enumerate(zip(rows, colors, strict=True)):
        if values:
            middle, width = 100 * statistics.fmean(values), 100 * spread(values)
            axes.errorbar(middle, place, xerr=width, marker="o", capsize=2, color=color)
    axes.set_yticks(range(len(rows)), [text for text, _ in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color="#e4e4e4")


def eqco(study: Study, settings: dict) -> object:
    made, axes = pictures.figure(3)
    counts = settings["counts"]
    for one, field, title in zip(
        axes[0], ("neighbours", "probe"), (KNN, "linear probe, %"), strict=False
    ):
        for loss in ("InfoNCE", "EqCo", "SiMo"):
            where = {"loss": loss, "kind": "training", "times": 1}
            curve(one, study, field, loss, "negatives", counts, **where)
        where = {"loss": "EqCo", "kind": APART}
        curve(one, study, field, "EqCo", "negatives", counts, label="EqCo, drawn for each query",
              style="", marker="x", **where)  # fmt: skip
        one.set_title(title)
        log_axis(one, counts, 4, "negatives K")
    axes[0, 0].legend(fontsize=8)
    pulls = [p | {"seed": r["seed"]} for r in study.find(kind="gradient") for p in r["pulls"]]
    for loss in ("InfoNCE", "EqCo"):
        curve(axes[0, 2], Study(pulls), "length", loss, "negatives", counts, 1, loss=loss)
    axes[0, 2].set_title("length of a query's expected gradient")
    axes[0, 2].set_ylim(bottom=0)
    log_axis(axes[0, 2], counts, 4, "negatives K")
    return made


def cacr(study: Study, settings: dict) -> object:
    made, axes = pictures.figure(4, width=3.9)
    rows, colors = [], []
    for ratio in settings["ratios"]:
        for k in settings["positives"]:
            for loss in settings["losses"]:
                where = {"kind": "training", "loss": loss, "positives": k, "ratio": ratio}
                values = list(study.series("neighbours", **where).values())
                tail = "balanced" if ratio == 1 else f"tail {ratio}"
                rows.append((f"{loss}, K = {k}, {tail}", values))
                colors.append(COLORS[loss])
    dots(axes[0, 0], rows, colors)
    axes[0, 0].set_title(KNN)
    counts = settings["negatives"]
    for loss in ("InfoNCE", "CACR"):
        for choice, style in (("all", "-"), ("one photograph", ":")):
            where = {"kind": "negatives", "loss": loss, "choice": choice}
            alike = choice == "all"
            curve(axes[0, 1], study, "neighbours", loss, "negatives", counts,
                  label=loss if alike else f"{loss}, of one photograph", style=style,
                  marker="o" if alike else "x", **where)  # fmt: skip
    axes[0, 1].set_title(KNN)
    log_axis(axes[0, 1], counts, 4, "negatives given")
    axes[0, 1].legend(fontsize=7)
    for record in study.find(kind="weights"):
        w = record["weights"]
        axes[0, 2].plot(w["positive_distance"], w["positive_weight"], ".", color=pictures.OURS)
        for same, color in ((0, pictures.OTHERS[0]), (1, pictures.OTHERS[2])):
            chosen = [i for i, s in enumerate(w["negative_same"]) if s == same]
            text = "same photograph" if same else "another photograph"
            axes[0, 3].plot(
                [w["negative_distance"][i] for i in chosen],
                [w["negative_weight"][i] for i in chosen],
                ".", color=color, label=text, markersize=2,
            )  # fmt: skip
        axes[0, 3].legend(fontsize=7)
    for one, text in ((axes[0, 2], "positives pull"), (axes[0, 3], "negatives push")):
        one.set_title(f"CACR's weights: {text}")
        one.set(xlabel="squared distance", ylabel="weight, 1 = all alike")
    return made


def infomin(study: Study, settings: dict) -> object:
    made, axes = pictures.figure(4, width=3.6)
    for one, task in zip(axes[0], FACTORS, strict=False):
        rows, colors = [], []
        for shared in [[], *SHARED]:
            values = list(study.series(task, kind="factors", shared=shared).values())
            rows.append((" + ".join(shared) or "untrained", values))
            alone = shared == [task]
            colors.append(pictures.OURS if alone else pictures.OTHERS[0 if task in shared else 6])
        dots(one, rows, colors)
        one.set_title(f"probe for the {task}, %")
    xs = settings["strengths"]
    for field, color, text in (("neighbours", "digit", "neighbours"), ("probe", "place", "probe")):
        curve(axes[0, 3], study, field, color, "strength", xs, label=text, kind="strength")
    axes[0, 3].set_xscale("symlog", linthresh=0.25, base=2)
    axes[0, 3].set_xticks(xs, [f"{x:g}" for x in xs])
    axes[0, 3].set(xlabel="strength of augmentation", title="accuracy, %")
    axes[0, 3].legend(fontsize=8)
    return made


def wmse(study: Study, settings: dict) -> object:
    made, axes = pictures.figure(4, width=3.6)
    rows, colors = [], []
    usual = settings["batch"]
    for loss in ("W-MSE", "MSE", "InfoNCE"):
        for positives in (2, 4):
            where = {"loss": loss, "positives": positives, "batch": 2 * usual // positives}
            where |= {"group": settings["group"] if loss == "W-MSE" else 0, "kind": "training"}
            values = list(study.series("neighbours", **where).values())
            rows.append((f"{loss}, {positives} views", values))
            colors.append(COLORS[loss])
            if positives == 2:
                for record in study.find(seed=0, **where):
                    share = [max(x, 1e-8) for x in record["spectrum_embeddings"]]
                    axes[0, 3].plot(range(1, len(share) + 1), share, color=COLORS[loss], label=loss)
    dots(axes[0, 0], rows, colors)
    axes[0, 0].set_title(KNN)
    for loss in ("W-MSE", "InfoNCE"):
        where = {"loss": loss, "positives": 2, "kind": "training"}
        where["group"] = settings["group"] if loss == "W-MSE" else 0
        curve(axes[0, 1], study, "neighbours", loss, "batch", settings["batches"], **where)
    log_axis(axes[0, 1], settings["batches"], 2, "batch")
    axes[0, 1].legend(fontsize=8)
    where = {"loss": "W-MSE", "positives": 2, "batch": usual, "kind": "training"}
    curve(axes[0, 2], study, "neighbours", "W-MSE", "group", settings["groups"], **where)
    log_axis(axes[0, 2], settings["groups"], 2, "group size of W-MSE")
    for one in axes[0, 1:3]:
        one.set_title(KNN)
    axes[0, 3].set(yscale="log", xlabel="dimension", title="spectrum of embeddings, shares")
    axes[0, 3].legend(fontsize=8)
    return made


DRAW: dict[str, Callable[[Study, dict], object]] = {
    "eqco": eqco, "cacr": cacr, "infomin": infomin, "wmse": wmse
}  # fmt: skip


def has(name: str, study: Study) -> bool:
    """Whether there is anything to draw."""
    return any(record["kind"] != "tuning" for record in study.records)


def picture(name: str, study: Study, settings: dict, folder: Path = IMAGES) -> list[Path]:
    """Draws a part; the files."""
    return pictures.save(DRAW[name](study, settings), folder / f"claims_{name}")
