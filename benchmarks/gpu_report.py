"""The markdown of a result measured on a GPU."""

from collections.abc import Iterable

from benchmarks.markdown import milliseconds, share, table


def title(record: dict) -> str:
    sizes = record["sizes"]
    text = f"`{record['name']}` N={sizes['n']:,} M={sizes['m']:,} D={sizes['d']}"
    return text + (f" K={sizes['k']}" if sizes["k"] > 1 else "")


def failed(record: dict, columns: int) -> list[str]:
    return [title(record), "FAILED: " + record["failed"], *[""] * (columns - 2)]


def bounded(text: str, value: float, bound: str, at_most: float | None) -> str:
    """A number with its bound; a missed bound is set in bold."""
    if at_most is None:
        return text
    text = f"{text} (≤ {bound})"
    return text if value <= at_most else f"**{text}**"


def own_time(ours: dict) -> str:
    at_most = ours["at_most_ms"]
    bound = "" if at_most is None else f"{at_most:g} ms"
    return bounded(milliseconds(ours), ours["milliseconds"]["median"], bound, at_most)


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
    return [title(record), own_time(ours), spread(ours), rate, fraction, megabytes(ours)]


PEER_HEAD = ("case", "against", "ours", "theirs", "ours / theirs", "their peak memory")


def peer_rows(record: dict) -> Iterable[list[str]]:
    for peer in record.get("peers", ()):
        row = [title(record), peer["name"], milliseconds(record["ours"])]
        if "ratio" not in peer:
            yield [*row, peer["reason"], "", ""]
            continue
        ratio = share(peer["ratio"], peer["at_most"])
        yield [*row, milliseconds(peer), ratio, megabytes(peer)]


GRAPH_HEAD = ("case", "contender", "time", "share of dense eager")


def graph_rows(record: dict) -> Iterable[list[str]]:
    for graph in record.get("graphs", ()):
        if "milliseconds" not in graph:
            yield [title(record), graph["name"], graph["reason"], ""]
            continue
        ratio = share(graph["ratio"], graph["at_most"]) if "ratio" in graph else "–"
        yield [title(record), graph["name"], milliseconds(graph), ratio]


def provenance(result: dict) -> str:
    """Device, versions, date and command in one sentence."""
    environment = result["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    return (
        f"{environment['device']} ({environment['capability']}), driver {environment['driver']}; "
        f"backend {environment['backend']}; {versions}; {result['date']}, "
        f"commit {environment['commit']}. GEMM rate of the same run, 8,192 x 8,192 x 8,192: "
        f"{result['gemm_tflops']:.0f} TFLOP/s. Measured with `{result['command']}`."
    )


def section(result: dict) -> list[str]:
    """The markdown lines of one GPU."""
    records = result["cases"]
    large = [record for record in records if record["group"] == "large"]
    small = [record for record in records if record["group"] == "small"]
    lines = [f"### {result['environment']['device']}", "", provenance(result), ""]
    lines += ["Forward and backward, bfloat16; medians, interleaved with the peers. A number is"]
    lines += ["shown only after value and gradients agreed with float64 in the same run.", ""]
    if large:
        lines += [*table(LARGE_HEAD, map(large_row, large)), ""]
        rows = [row for record in large for row in peer_rows(record)]
        lines += [*table(PEER_HEAD, rows), ""]
    if small:
        lines += ["Small batches, by the host's clock:", ""]
        lines += [*table(LARGE_HEAD, map(large_row, small)), ""]
        rows = [row for record in small for row in peer_rows(record)]
        lines += [*table(PEER_HEAD, rows), ""]
        rows = [row for record in small for row in graph_rows(record)]
        lines += ["Replays of a CUDA graph:", "", *table(GRAPH_HEAD, rows), ""]
    return lines
