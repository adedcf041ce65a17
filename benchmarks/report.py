"""Writes the tables of docs/measured.md and docs/grid.md, the picture in README.md, and what pages
of docs/ say of losses and drop-ins, from benchmarks/results/: python -m benchmarks.report

With --check it writes nothing and exits with 1 when they disagree with the results.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable

from .gpu import report as gpu_report
from .grid import report as grid_report
from .harness import pages
from .harness.markdown import brief, milliseconds, share, table, versions
from .harness.paths import DOCS, RESULTS, ROOT

README = ROOT / "README.md"
MEASURED = DOCS / "measured.md"
NAME, GPU_NAME, FOLDS_NAME = "benchmarks", "gpu-benchmarks", "folds"


def megabytes(memory: dict, name: str, limit: float | None = None) -> str:
    result = memory.get(name, {})
    if "mb" not in result:
        return "–"
    text = f"{result['mb']:.0f} MB"
    return text if limit is None or result["mb"] <= limit else f"**{text}**"


def title(record: dict) -> str:
    sizes = record["sizes"]
    text = f"`{record['name']}` N={sizes['n']:,} "
    if record["group"] == "whitening":
        text += f"n={sizes['m']:,} D={sizes['d']}"
    else:
        text += f"M={sizes['m']:,}"
    return text + (f" K={sizes['k']}" if sizes["k"] > 1 else "")


def speed_rows(record: dict) -> Iterable[list[str]]:
    if "failed" in record:
        yield [title(record), "FAILED: " + record["failed"], "", "", "", ""]
        return
    ours = record["ours"]
    for theirs in record["peers"]:
        row = [title(record), theirs["name"]]
        if "ratio" not in theirs:
            yield [*row, milliseconds(ours), theirs["reason"], "", ""]
            continue
        fraction = f"{ours['gemm_fraction']:.0%}"
        ratio = share(theirs["ratio"], theirs["at_most"])
        yield [*row, milliseconds(ours), milliseconds(theirs), ratio, fraction]


def large_table(records: list[dict]) -> list[str]:
    head = ["case", "against", "ours", "theirs", "ours / theirs", "of GEMM rate"]
    return table(head, (row for record in records for row in speed_rows(record)))


def memory_rows(record: dict, limit: float) -> list[str]:
    memory = record["memory"]
    others = [f"{b['name']} {megabytes(memory, b['name'])}" for b in record["peers"]]
    return [
        title(record),
        megabytes(memory, "ours", limit),
        megabytes(memory, "ours, bfloat16", limit),
        "; ".join(others) or "–",
    ]


def bfloat16_row(record: dict) -> list[str]:
    result = record["bfloat16"]
    if "failed" in result:
        return [title(record), "FAILED: " + result["failed"], "", "", ""]
    return [
        title(record),
        milliseconds(record["ours"]),
        milliseconds(result),
        share(result["ratio"], result["at_most"]),
        f"{result['gemm_fraction']:.0%}",
    ]


def bfloat16_table(records: list[dict]) -> list[str]:
    """The lines of the cases that were timed with bfloat16 too."""
    half = [record for record in records if "bfloat16" in record]
    if not half:
        return []
    head = ["case", "float32", "bfloat16", "bfloat16 / float32", "of GEMM rate"]
    return ["bfloat16 inputs beside float32:", "", *table(head, map(bfloat16_row, half)), ""]


def small_row(record: dict) -> list[str]:
    if "failed" in record:
        return [title(record), "FAILED: " + record["failed"], "", ""]
    dense = record["peers"][0]
    ratio = share(dense["ratio"], dense["at_most"])
    return [title(record), milliseconds(record["ours"]), milliseconds(dense), ratio]


def swap_row(record: dict) -> list[str]:
    if "failed" in record:
        return [title(record), "FAILED: " + record["failed"], "", "", "", ""]
    ours, theirs = record["ours"], record["peers"][0]
    memory = record.get("memory", {})
    row = [title(record), milliseconds(ours)]
    if "ratio" in theirs:
        row += [milliseconds(theirs), share(theirs["ratio"], theirs["at_most"])]
    else:
        row += [brief(theirs["reason"]), ""]
    return [*row, megabytes(memory, "ours"), megabytes(memory, theirs["name"])]


def gain(record: dict) -> str:
    """How much faster, and how much smaller, a drop-in is than the package's own."""
    other, memory = record["peers"][0], record["memory"]
    text = f"{1 / other['ratio']:.1f} x as fast" if "ratio" in other else "runs where theirs cannot"
    ours, theirs = memory["ours"].get("mb"), memory[other["name"]].get("mb")
    return text + (f", {theirs:.0f} MB to {ours:.0f}" if ours and theirs else "")


def latest(device_type: str) -> dict[str, tuple[dict, str]]:
    """The last result's record of each case, and where and when it was measured."""
    found = {}
    for result in results(device_type):
        environment = result["environment"]
        where = f"{environment['device']}, {environment['threads']} threads, {result['date']}"
        found |= {record["name"]: (record, where) for record in result["cases"]}
    return found


def with_gains(text: str) -> str:
    """text with what the results say between <!-- gain: case --> and <!-- /gain -->."""
    records = latest("cpu")

    def replaced_gain(match: re.Match) -> str:
        record, _ = records.get(match[1], (None, None))
        measured = gain(record) if record and "memory" in record else "not measured"
        return f"<!-- gain: {match[1]} -->{measured}<!-- /gain -->"

    return re.sub(r"<!-- gain: (.+?) -->.*?<!-- /gain -->", replaced_gain, text)


def cost_rows(record: dict) -> Iterable[list[str]]:
    if "failed" in record:
        yield [title(record), "FAILED: " + record["failed"], *5 * [""]]
        return
    ours, memory = record["ours"], record.get("memory", {})
    for theirs in record["peers"]:
        row = [title(record), theirs["name"], milliseconds(ours)]
        if "ratio" in theirs:
            row += [milliseconds(theirs), f"{theirs['ratio']:.2f}"]
        else:
            row += [brief(theirs["reason"]), ""]
        yield [*row, megabytes(memory, "ours"), megabytes(memory, theirs["name"])]


def with_costs(text: str) -> str:
    """text with a table of cases between <!-- cost: case; case --> and <!-- /cost -->."""
    records = latest("cpu")
    head = ["case", "against", "ours", "theirs", "ours / theirs", "our memory", "their memory"]

    def replaced_cost(match: re.Match) -> str:
        chosen = [records[name] for name in match[1].split("; ")]
        rows = [row for record, _ in chosen for row in cost_rows(record)]
        places = "; ".join(dict.fromkeys(where for _, where in chosen))
        lines = [f"<!-- cost: {match[1]} -->", *table(head, rows), ""]
        lines += [f"Forward and backward, float32, D = 128. {places}:"]
        lines += ["[the tables](../measured.md) name the command.", "<!-- /cost -->"]
        return "\n".join(lines)

    return re.sub(r"<!-- cost: (.+?) -->.*?<!-- /cost -->", replaced_cost, text, flags=re.DOTALL)


def folds_row(row: dict) -> list[str]:
    """Of benchmarks/folds.py."""
    value = row["value"]
    if isinstance(value, str):
        return [row["case"], row["against"], row["unit"], brief(value), ""]
    shown = f"{value:.0f}" if row["unit"] == "MB" else f"{value:.2f}"
    bold = "" if value <= row["at_most"] else "**"
    return [row["case"], row["against"], row["unit"], bold + shown + bold, f"{row['at_most']:g}"]


def folds() -> str:
    """The text between the markers of folds.py's table."""
    lines = []
    for path in sorted((RESULTS / "folds").glob("*.json")):
        result = json.loads(path.read_text())
        environment = result["environment"]
        lines += [
            f"{environment['device']} ({environment['capability']}), {environment['threads']} "
            f"threads; {versions(environment)}; {result['date']}, commit {environment['commit']}. "
            f"Measured with `{result['command']}`:", "",
        ]  # fmt: skip
        head = ["case", "against", "share of", "ours / theirs", "at most"]
        lines += [*table(head, map(folds_row, result["rows"])), ""]
    return "\n".join(["", *lines]) if lines else "\nNo results yet.\n"


def scaling_row(record: dict) -> list[str]:
    if "failed" in record:
        return [title(record), "FAILED: " + record["failed"], "", ""]
    sizes, ours = record["sizes"], record["ours"]
    picoseconds = 1e9 * ours["milliseconds"]["median"] / (sizes["n"] * sizes["m"])
    return [
        title(record),
        milliseconds(ours),
        f"{picoseconds:.0f} ps",
        f"{ours['gemm_fraction']:.0%}",
    ]


def provenance(result: dict) -> str:
    """Device, versions, date and command in one sentence."""
    environment = result["environment"]
    rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in result["gemm_gflops"].items())
    return (
        f"{environment['device']} ({environment['capability']}), {environment['threads']} threads; "
        f"backend {environment['backend']}; {versions(environment)}; {result['date']}, "
        f"commit {environment['commit']}. GEMM rate of the same run: {rates}. "
        f"Measured with `{result['command']}`."
    )


def section(result: dict) -> list[str]:
    """The markdown lines of one device."""
    groups: dict[str, list[dict]] = {}
    for record in result["cases"]:
        groups.setdefault(record["group"], []).append(record)
    environment = result["environment"]
    lines = [f"### {environment['device']}, {environment['threads']} threads", ""]
    lines += [provenance(result), ""]
    if "large" in groups:
        lines += ["Forward and backward, float32, D = 128; medians, interleaved. A number is shown"]
        lines += ["only after value and gradients agreed with float64 in the same run.", ""]
        lines += [*large_table(groups["large"]), ""]
        lines += bfloat16_table(groups["large"])
    if "whitening" in groups:
        lines += [
            "Whitening, forward and backward, float32: N groups of n x D; for `w_mse` N samples"
        ]
        lines += ["in groups of n x D, K views, 4 iterations.", ""]
        lines += [*large_table(groups["whitening"]), ""]
        lines += bfloat16_table(groups["whitening"])
    if "search" in groups:
        lines += ["The k nearest of M keys for N queries, forward, float32, D = 128, k = 16:", ""]
        lines += [*large_table(groups["search"]), ""]
    if "late" in groups:
        lines += [
            "Late interaction, N queries of 32 tokens with K documents of 180 each, forward and"
        ]
        lines += ["backward, float32, D = 128:", "", *large_table(groups["late"]), ""]
    if "swap" in groups:
        lines += [
            "Drop-in losses of `contrastive_kernels.integrations` against the peers' own, forward"
        ]
        lines += ["and backward, float32, D = 128; peak memory beyond inputs and gradients.", ""]
        head = ["case", "ours", "theirs", "ours / theirs", "our memory", "their memory"]
        lines += [*table(head, map(swap_row, groups["swap"])), ""]
    with_memory = [r for r in result["cases"] if "memory" in r and r["group"] != "swap"]
    if with_memory:
        limit = result["memory_limit_mb"]
        lines += [f"Peak memory beyond inputs and gradients (ours at most {limit} MB):", ""]
        rows = [memory_rows(record, limit) for record in with_memory]
        lines += [*table(["case", "ours", "ours, bfloat16", "peers"], rows), ""]
    if "scaling" in groups:
        lines += ["Time over the number of frozen negatives M, float32:", ""]
        head = ["case", "ours", "per pair", "of GEMM rate"]
        lines += [*table(head, map(scaling_row, groups["scaling"])), ""]
    if "small" in groups:
        lines += ["Small batches against dense eager torch, forward and backward, float32:", ""]
        head = ["case", "ours", "dense eager", "ours / dense"]
        lines += [*table(head, map(small_row, groups["small"])), ""]
    return lines


def results(device_type: str) -> list[dict]:
    """The results of one type of device; those on a CPU did not always name it."""
    every = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [result for result in every if result.get("device_type", "cpu") == device_type]


def sections(device_type: str) -> str:
    """The text between the markers of one type of device, empty without results."""
    render = gpu_report.section if device_type == "cuda" else section
    lines = [line for result in results(device_type) for line in render(result)]
    return "\n".join(["", *lines]) if lines else ""


def updated(page: str) -> str:
    """docs/measured.md with the tables of all results.

    Those of GPUs get markers of their own with the first result.
    """
    page = pages.replaced(page, NAME, sections("cpu") or "\nNo results yet.\n")
    page = pages.replaced(page, FOLDS_NAME, folds())
    gpu, (begin, end) = sections("cuda"), pages.markers(GPU_NAME)
    if gpu and begin not in page:
        _, cpu_end = pages.markers(NAME)
        page = page.replace(cpu_end, f"{cpu_end}\n\n{begin}\n{end}")
    return pages.replaced(page, GPU_NAME, gpu) if begin in page else page


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; 1 when they disagree")
    options = parser.parse_args()
    return pages.update(
        {
            README: grid_report.with_picture,
            MEASURED: updated,
            grid_report.PAGE: grid_report.updated,
            DOCS / "integrations.md": with_gains,
            **dict.fromkeys(DOCS.glob("swap/*.md"), with_gains),
            **dict.fromkeys(DOCS.glob("losses/*.md"), with_costs),
        },
        "python -m benchmarks.report",
        check=options.check,
    )


if __name__ == "__main__":
    sys.exit(main())
