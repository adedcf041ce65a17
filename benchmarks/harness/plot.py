"""The picture of a result: curves where a size was swept, and dots elsewhere."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .console import title
from .implementations import OURS, Implementation, implementations
from .pictures import OTHERS, figure, save
from .pictures import OURS as OUR_COLOR

MEASURES = {"time, ms": "time", "peak memory beyond inputs, MB": "memory"}
Panel = tuple[str, list[dict]]


def draw(result: dict, stem: Path) -> list[Path]:
    """Writes stem.svg and stem.png; the files."""
    if stem.suffix in (".svg", ".png"):
        stem = stem.with_suffix("")
    records = [record for record in result["cases"] if "failed" not in record]
    swept = _swept(records)
    made = _dots(records) if swept is None else _curves(records, swept)
    made.suptitle(result["environment"]["device"], fontsize=9, x=0.01, ha="left")
    return save(made, stem)


def _swept(records: list[dict]) -> str | None:
    """The first size in which records of one case differ; None without such records."""
    by_case: dict[str, list[dict]] = {}
    for record in records:
        by_case.setdefault(record["name"], []).append(record["sizes"])
    for name in ("n", "m", "d", "k"):
        if any(len({sizes[name] for sizes in same}) > 1 for same in by_case.values()):
            return name
    return None


def _value(one: Implementation, measure: str) -> float | None:
    if measure == "memory":
        return one.memory_mb
    return one.milliseconds["median"] if one.milliseconds else None


def _measures(records: list[dict]) -> dict[str, str]:
    """Those of MEASURES that any record has."""
    every = [one for record in records for one in implementations(record)]
    return {
        label: measure
        for label, measure in MEASURES.items()
        if any(_value(one, measure) is not None for one in every)
    } or MEASURES


def _colors(records: list[dict]) -> dict[str, str]:
    """Ours in a colour of its own, and every other name in one."""
    names = {one.name: None for record in records for one in implementations(record)}
    others = (name for name in names if name != OURS)
    return {OURS: OUR_COLOR} | {n: OTHERS[i % len(OTHERS)] for i, n in enumerate(others)}


def _panels(records: list[dict], swept: str) -> list[Panel]:
    """What differs in nothing but the swept size; columns that come with the rows differ too."""
    panels: dict[tuple, list[dict]] = {}
    for record in records:
        sizes = record["sizes"]
        fixed = {name: value for name, value in sizes.items() if name != swept}
        if swept == "n" and sizes["m"] % sizes["n"] == 0 and _follows(records, record):
            del fixed["m"]
        text = " ".join(f"{name.upper()}={value}" for name, value in fixed.items())
        panels.setdefault((record["name"], record["dtype"], text), []).append(record)
    return [(f"{name}, {dtype}\n{text}", same) for (name, dtype, text), same in panels.items()]


def _follows(records: list[dict], record: dict) -> bool:
    """Whether m is in proportion to n in every record of the case."""
    same = (r["sizes"] for r in records if r["name"] == record["name"])
    return len({sizes["m"] / sizes["n"] for sizes in same}) == 1


def _curves(records: list[dict], swept: str) -> Figure:
    """One column for each panel: time, and below it memory."""
    panels, colors, measures = _panels(records, swept), _colors(records), _measures(records)
    made, axes = figure(len(panels), len(measures), width=4.6, height=2.8)
    for column, (text, same) in enumerate(panels):
        for row, (label, measure) in enumerate(measures.items()):
            _curve(axes[row, column], same, swept, measure, colors)
            axes[row, column].set(xlabel=swept.upper(), ylabel=label)
        axes[0, column].set_title(text)
    names = [Line2D([], [], color=color, marker="o", label=name) for name, color in colors.items()]
    made.legend(handles=names, loc="outside lower center", ncols=3, fontsize=8)
    return made


def _curve(axes: Axes, records: list[dict], swept: str, measure: str, colors: dict) -> None:
    points: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for one in implementations(record):
            value = _value(one, measure)
            if value is not None and value > 0:
                points.setdefault(one.name, []).append((record["sizes"][swept], value))
    for name, pairs in points.items():
        xs, ys = zip(*sorted(pairs), strict=True)
        axes.plot(xs, ys, marker="o", color=colors[name], zorder=3 if name == OURS else 2)
    if points:
        sizes = sorted({record["sizes"][swept] for record in records})
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_yscale("log")


def _dots(records: list[dict]) -> Figure:
    """Time and memory side by side, a dot for each implementation of each case."""
    colors = _colors(records)
    entries, names, place = [], [], 0.0
    for record in records:
        names.append((place, title(record)))
        for one in implementations(record):
            place += 1.0
            entries.append((place, one))
        place += 1.8
    measures = _measures(records)
    made, axes = figure(1, len(measures), width=9.0, height=1.0 + 0.17 * max(place, 6.0))
    for axis, (label, measure) in zip(axes[:, 0], measures.items(), strict=True):
        drawn = [(y, one, _value(one, measure)) for y, one in entries]
        drawn = [(y, one, value) for y, one, value in drawn if value is not None and value > 0]
        for y, one, value in drawn:
            # dots: a bar would need a zero, which a logarithmic axis has not
            axis.plot(value, y, "o", markersize=7, color=colors[one.name])
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axis.annotate(
                text, (value, y), xytext=(7, 0), textcoords="offset points",
                va="center", fontsize=7,
            )  # fmt: skip
        axis.grid(axis="x", color="#e4e4e4")
        axis.set_axisbelow(True)
        axis.set_yticks([y for y, _ in entries], [one.name for _, one in entries], fontsize=7)
        axis.set_ylim(place, -0.9)
        for y, text in names:
            axis.text(
                0.0, y, text, transform=axis.get_yaxis_transform(), fontsize=7, weight="bold",
                va="center",
            )  # fmt: skip
        axis.set_xlabel(label)
        if drawn:
            axis.set_xscale("log")
    return made
