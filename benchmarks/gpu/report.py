"""The markdown of a result measured on a GPU."""

from collections.abc import Iterable

from ..harness.markdown import milliseconds, share, table, versions


def title(record: dict) -> str:
    sizes = record["sizes"]
    samples = "n" if record["group"] == "whitening" else "M"
    text = f"`{record['name']}` N={sizes['n']:,} {samples}={sizes['m']:,} D={sizes['d']}"
    return text + (f" K={sizes['k']}" if sizes["k"] > 1 else "")


def failed(record: dict, columns: int) -> list[str]:
    return [title(record), "FAILED: " + record["failed"], *[""] * (columns - 2)]


def bounded(text: str, value: float, bound: str, at_most: float | None) -> str:
    """A number with its bound; a missed bound is set in bold."""
    if at_most is None:
        return text
    text = f"{text} (≤ {bound})"
    return text if value <= at_most else f"**{text}**"


def bounded_time(entry: dict) -> str:
    at_most = entry.get("at_most_ms")
    bound = "" if at_most is None else f"{at_most:g} ms"
    return bounded(milliseconds(entry), entry["milliseconds"]["median"], bound, at_most)


def spread(entry: dict) -> str:
    times = entry["milliseconds"]
    return f"{times['p20']:.3g} – {times['p80']:.3g}"


def megabytes(entry: dict) -> str:
    memory, at_most = entry.get("memory_mb"), entry.get("memory_at_most_mb")
    return "–" if memory is None else bounded(f"{memory:.0f} MB", memory, f"{at_most} MB", at_most)


LARGE_HEAD = ("case", "time", "p20 – p80", "TFLOP/s", "of GEMM rate", "peak memory")


def large_row(record: dict) -> list[str]:
    if "failed" in record:
        return failed(record, len(LARGE_HEAD))
    ours = record["ours"]
    rate, fraction = f"{ours['tflops']:.3g}", f"{ours['gemm_fraction']:.0%}"
    return [title(record), bounded_time(ours), spread(ours), rate, fraction, megabytes(ours)]


BASELINE_HEAD = ("case", "against", "ours", "theirs", "ours / theirs", "their peak memory")


def baseline_rows(record: dict) -> Iterable[list[str]]:
    for theirs in record.get("peers", ()):
        row = [title(record), theirs["name"], milliseconds(record["ours"])]
        if "ratio" not in theirs:
            yield [*row, theirs["reason"], "", ""]
            continue
        ratio = share(theirs["ratio"], theirs["at_most"])
        yield [*row, milliseconds(theirs), ratio, megabytes(theirs)]


GRAPH_HEAD = ("case", "implementation", "time", "share of eager torch")


def graph_rows(record: dict) -> Iterable[list[str]]:
    for graph in record.get("graphs", ()):
        if "milliseconds" not in graph:
            yield [title(record), graph["name"], graph["reason"], ""]
            continue
        ratio = share(graph["ratio"], graph["at_most"]) if "ratio" in graph else "–"
        yield [title(record), graph["name"], bounded_time(graph), ratio]


def provenance(result: dict) -> str:
    """Device, versions, date and command in one sentence."""
    environment = result["environment"]
    return (
        f"{environment['device']} ({environment['capability']}), driver {environment['driver']}; "
        f"backend {environment['backend']}; {versions(environment)}; {result['date']}, "
        f"commit {environment['commit']}. GEMM rate of the same run, 8,192 x 8,192 x 8,192: "
        f"{result['gemm_tflops']:.0f} TFLOP/s. Measured with `{result['command']}`."
    )


def section(result: dict) -> list[str]:
    """The markdown lines of one GPU."""
    groups: dict[str, list[dict]] = {}
    for record in result["cases"]:
        groups.setdefault(record["group"], []).append(record)
    lines = [f"### {result['environment']['device']}", "", provenance(result), ""]
    lines += [
        "Forward and backward, bfloat16; medians, interleaved with the baselines. A number is"
    ]
    lines += ["shown only after value and gradients agreed with float64 in the same run.", ""]
    if "large" in groups:
        lines += tables(groups["large"])
    if "small" in groups:
        lines += ["Small batches, by the host's clock:", "", *tables(groups["small"])]
    if "whitening" in groups:
        lines += ["Whitening, float32, N groups of n x D; forward alone, and with the backward:"]
        lines += ["", *tables(groups["whitening"])]
    return lines


def tables(records: list[dict]) -> list[str]:
    """Our numbers, the baselines' and, where there are any, the CUDA graphs'."""
    lines = [*table(LARGE_HEAD, map(large_row, records)), ""]
    lines += [
        *table(BASELINE_HEAD, (row for record in records for row in baseline_rows(record))),
        "",
    ]
    rows = [row for record in records for row in graph_rows(record)]
    if rows:
        lines += ["Replays of a CUDA graph:", "", *table(GRAPH_HEAD, rows), ""]
    return lines
