"""docs/claims.md from the results: the table of claims, what to take, and the figures."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from ..harness import pages
from ..harness.markdown import table, versions
from ..harness.paths import DOCS, RESULTS
from ..harness.seeds import spread
from . import advice, draw
from .part import Part, Study
from .plan import PARTS
from .verdict import NOT, OPEN, PART, SEEN, Claim, Condition

PAGE = DOCS / "claims.md"
FOLDER = RESULTS / "claims"
COMMAND = "python -m benchmarks.claims --report"
# Of a record: what says what was trained, and what was measured, in per cent or as it is.
MEASURES = {
    "neighbours": ("5 nearest neighbours, %", 100),
    "probe": ("linear probe, %", 100),
    "digit": ("digit, %", 100),
    "place": ("place, %", 100),
    "background": ("background, %", 100),
    "bound": ("I_NCE, nats", 1),
    "rank_features": ("effective rank, features", 1),
    "rank_embeddings": ("effective rank, embeddings", 1),
}
ABOUT = ("loss", "negatives", "choice", "positives", "ratio", "shared", "strength", "batch",
         "group", "times", "hardness", "rate")  # fmt: skip


def results(folder: Path = FOLDER) -> dict[str, dict]:
    """Those that are there, in the order of the parts."""
    paths = {name: folder / f"{name}.json" for name in PARTS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def judged(found: dict[str, dict]) -> dict[str, list[Claim]]:
    """The claims of all parts; of one that was not run, without a difference."""
    made = {}
    for name, part in PARTS.items():
        result = found.get(name, {"records": [], "settings": part.full})
        made[name] = part.claims(Study(result["records"]), result["settings"])
    return made


def shown(condition: Condition) -> str:
    """A condition, what was asked, and what came out."""
    if (got := condition.interval) is None:
        return f"{condition.text} ({condition.asked()}): –"
    low, high = 100 * got.low, 100 * got.high
    mark = "" if condition.holds() else ", fails"
    return (
        f"{condition.text} ({condition.asked()}): {100 * got.mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        f"{mark}"
    )


def seeds(claim: Claim) -> str:
    found = [c.interval.seeds for c in claim.conditions if c.interval is not None]
    return f"{min(found)}" if found else "–"


def claim_rows(found: dict[str, dict], made: dict[str, list[Claim]]) -> Iterable[list[str]]:
    for name, claims in made.items():
        cost = minutes(found.get(name))
        for claim in claims:
            verdict = claim.verdict()
            yield [
                claim.text,
                claim.paper,
                "<br>".join(map(shown, claim.conditions)),
                seeds(claim),
                f"**{verdict}**" if verdict in (SEEN, NOT, PART) else verdict,
                cost,
                f"`{PARTS[name].command}`",
            ]


def minutes(result: dict | None) -> str:
    if result is None:
        return "–"
    return f"{sum(r['seconds'] for r in result['records']) / 60:.0f} min"


def described(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "nothing, untrained"
    return f"{value:,}" if isinstance(value, int) else f"{value}"


def figures(kind: str, study: Study) -> list[str]:
    """A table of the records of one kind: a row for each thing that was trained."""
    records = study.find(kind=kind)
    fields = [f for f in MEASURES if any(f in r for r in records)]
    about = [a for a in ABOUT if len({str(r.get(a)) for r in records}) > 1]
    if not fields:
        return []
    about = about or [a for a in ABOUT if a in records[0]]
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(json.dumps([record.get(a) for a in about]), []).append(record)
    rows = []
    for key, same in groups.items():
        row = [described(value) for value in json.loads(key)]
        for field in fields:
            _, factor = MEASURES[field]
            values = [factor * r[field] for r in same if field in r]
            cell = f"{statistics.fmean(values):.1f} ± {spread(values):.1f}" if values else "–"
            row.append(cell)
        rows.append([*row, f"{len(same)}"])
    head = [*about, *(MEASURES[f][0] for f in fields), "seeds"]
    return [f"#### {kind.capitalize()}", "", *table(head, rows), ""]


def lengths(study: Study) -> list[str]:
    """The table of gradients, of the part that has them."""
    pulls = [p for r in study.find(kind="gradient") for p in r["pulls"]]
    if not pulls:
        return []
    losses = list(dict.fromkeys(p["loss"] for p in pulls))

    def mean(loss: str, count: int, field: str) -> float:
        both = [p[field] for p in pulls if (p["loss"], p["negatives"]) == (loss, count)]
        return statistics.fmean(both)

    rows = [
        [f"{count:,}", *(cell for loss in losses for cell in (
            f"{mean(loss, count, 'length'):.2f}", f"{mean(loss, count, 'noise'):.1%}"))]
        for count in dict.fromkeys(p["negatives"] for p in pulls)
    ]  # fmt: skip
    head = [f"{loss}, {what}" for loss in losses for what in ("length", "noise")]
    return ["#### Gradient of a query", "", *table(["negatives", *head], rows), ""]


def provenance(part: Part, result: dict) -> str:
    environment = result["environment"]
    chosen = ", ".join(f"{name} {value}" for name, value in result["chosen"].items())
    return (
        f"`{result['command']}`, {minutes(result)} of one thread of {environment['device']};"
        f" {versions(environment)}; {result['date']}, commit {environment['commit']}."
        f" {len(result['records'])} of {len(part.tasks(result['settings']))} trainings."
        f" Tuned with other seeds: {chosen}. ± is the standard deviation over the seeds."
    )


def section(name: str, result: dict) -> list[str]:
    """The figures of a part."""
    part, study = PARTS[name], Study(result["records"])
    lines = [f"### {part.title}", "", provenance(part, result), ""]
    if draw.has(name, study):
        lines += [f"![{part.title}](images/claims_{name}.png)", ""]
    for kind in dict.fromkeys(record["kind"] for record in result["records"]):
        lines += figures(kind, study)
    return lines + lengths(study)


def text(found: dict[str, dict]) -> str:
    """The generated part of the page."""
    made = judged(found)
    verdicts = {claim.text: claim.verdict() for claims in made.values() for claim in claims}
    count = {v: list(verdicts.values()).count(v) for v in (SEEN, PART, NOT, OPEN)}
    head = ["claim", "the paper", "here, points [95 %]", "seeds", "verdict", "cost", "command"]
    lines = ["## Which loss should I take", "", *advice.lines(made), "", "## The claims", ""]
    lines += [
        f"{count[SEEN]} seen, {count[PART]} in part, {count[NOT]} not seen, {count[OPEN]} not run."
        " Commands begin with `python -m benchmarks.claims`.",
        "",
        *worded(table(head, claim_rows(found, made))),
        "",
        "## Figures",
        "",
    ]
    for name, result in found.items():
        lines += section(name, result)
    if not found:
        lines += ["No part has been run to its end yet.", ""]
    return "\n".join(["", *lines])


def worded(lines: list[str]) -> list[str]:
    """A table of words: nothing is set to the right."""
    return [lines[0], lines[1].replace("---:", "---"), *lines[2:]]


def updated(page: str) -> str:
    """The page with the figures of the results."""
    return pages.replaced(page, "claims", text(results()))


def update(*, check: bool) -> int:
    """Writes the page, or with `check` only compares it; the exit status."""
    return pages.update({PAGE: updated}, COMMAND, check=check)


def plot(folder: Path = FOLDER) -> list[Path]:
    """Draws each part that there is; the files."""
    return [
        path
        for name, result in results(folder).items()
        if draw.has(name, Study(result["records"]))
        for path in draw.picture(name, Study(result["records"]), result["settings"])
    ]
