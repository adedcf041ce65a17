"""The tables of docs/grid.md, and the picture in README.md, from the results of the grid."""

import json
from collections.abc import Callable

from ..baselines.packages import LINEAR_CROSS_ENTROPY
from ..harness import pages
from ..harness.markdown import table, versions
from ..harness.paths import DOCS, IMAGES
from .run import FOLDER, told
from .verdict import Places, by_loss, cell, columns, dtypes, number

PAGE = DOCS / "grid.md"
NAME = "grid"
MISSING = "–"


def results() -> dict[str, dict]:
    """By the names of their files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def picture(stem: str) -> str:
    """The name of a result's pictures, which goes on with the dtype."""
    return f"grid_{stem}"


def shown(stem: str, dtype: str, folder: str) -> str:
    """The line of a page, from which `folder` leads to the images."""
    title = f"Time of ours / the faster dense form, {dtype}: blue where ours is faster"
    return f"![{title}]({folder}{IMAGES.name}/{picture(stem)}_{dtype}.png)"


def loss_table(records: Places, text: Callable[[dict], str]) -> list[str]:
    """Rows N, columns D; text(record) is a cell."""
    rows, features = (sorted({place[axis] for place in records}) for axis in (0, 1))
    lines = (
        [f"{n:,}", *(text(records[n, d]) if (n, d) in records else MISSING for d in features)]
        for n in rows
    )
    return table(["N \\ D", *map(str, features)], lines)


def against_chunks(record: dict) -> str:
    """The ratio to F.linear_cross_entropy."""
    for peer in record.get("peers", ()):
        if peer["name"] == LINEAR_CROSS_ENTROPY.name and "ratio" in peer:
            return number(peer["ratio"])
    return MISSING


def heading(environment: dict) -> str:
    return f"{environment['device']}, {environment['threads']} threads, {environment['capability']}"


def provenance(result: dict) -> str:
    environment, points = result["environment"], result["points"]
    commits = ", ".join(sorted({point["commit"] for point in points}))
    return (
        f"{len(points)} points; {versions(environment)}; backend {environment['backend']}; until "
        f"{max(point['date'] for point in points)}, commit {commits}. Measured with "
        f"{commands(result)}."
    )


def commands(result: dict) -> str:
    """Those of all runs, with the variables of the instruction set."""
    isa = result["environment"]["isa"]
    words = [f"{name}={value}" for name, value in isa.items() if name != "capability"]
    return ", ".join(f"`{' '.join([*words, command])}`" for command in result["commands"])


def section(stem: str, result: dict) -> list[str]:
    """The markdown lines of one processor and instruction set."""
    points = result["points"]
    lines = [f"### {heading(result['environment'])}", "", provenance(result), ""]
    for dtype in dtypes(points):
        same = [point for point in points if point["dtype"] == dtype]
        lines += [f"#### {dtype}", "", told(same), "", shown(stem, dtype, ""), ""]
        for name, records in by_loss(points, dtype).items():
            lines += [f"`{name}`, {columns(records)}:", ""]
            lines += [*loss_table(records, cell), ""]
            if any(against_chunks(record) != MISSING for record in records.values()):
                lines += [f"`{name}`, ours / {LINEAR_CROSS_ENTROPY.name}:", ""]
                lines += [*loss_table(records, against_chunks), ""]
    return lines


def updated(page: str) -> str:
    """docs/grid.md with the tables of all results."""
    lines = [line for stem, result in results().items() for line in section(stem, result)]
    return pages.replaced(page, NAME, "\n".join(["", "## Figures", "", *lines]) if lines else "")


def with_picture(readme: str) -> str:
    """README.md with the float32 picture of the latest result."""
    every = {
        stem: [point for point in result["points"] if point["dtype"] == "float32"]
        for stem, result in results().items()
    }
    latest = {stem: max(p["date"] for p in points) for stem, points in every.items() if points}
    if not latest:
        return pages.replaced(readme, NAME, "")
    stem = max(latest, key=lambda each: latest[each])
    result = results()[stem]
    lines = [
        "",
        shown(stem, "float32", f"{DOCS.name}/"),
        "",
        f"{told(every[stem])} {heading(result['environment'])}: {commands(result)}.",
        "",
    ]
    return pages.replaced(readme, NAME, "\n".join(lines))
