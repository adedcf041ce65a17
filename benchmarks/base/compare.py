"""The cases on two builds, in turn: what a comparison measures of each, and prints."""

from ..cases.case import Case
from ..harness.check import first_line
from ..harness.console import Progress, title
from ..harness.implementations import OURS
from ..harness.measure import Effort
from ..harness.timing import Timing, interleave
from .worker import Ended, Worker

CASE, TIME = 60, 27
HEAD = f"{'case':{CASE}s}{'ours':>{TIME}s}{'base':>{TIME}s}{'ours/base':>11s}"


def measure(case: Case, ours: Worker, base: Worker, effort: Effort, count: str = "") -> dict:
    """The JSON record of a case, as the other runs have it: the base is its one baseline.

    Args:
        count: how far the run is, for the progress.
    """
    record = case.record()
    theirs: dict = {"name": f"base {base.build.name}", "at_most": None}
    workers = {OURS: ours, theirs["name"]: base}
    progress = Progress(f"{count}{case.name}")
    try:
        reasons = {}
        for name, worker in workers.items():
            progress(f"checking {name}")
            reasons[name] = worker.begin(record)
        if reasons[OURS]:
            return record | {"failed": reasons[OURS]}
        ready = {name: worker for name, worker in workers.items() if not reasons[name]}
        timings = interleave(
            ready,
            effort.seconds,
            progress.passing,
            lambda worker, repeats: worker.sample(repeats),
            effort.rounds,
        )
    except Ended as ended:
        return record | {"failed": first_line(ended)}
    finally:
        progress.close()
    if base in ready.values():
        theirs |= {
            "milliseconds": timings[theirs["name"]]._asdict(),
            "ratio": timings[OURS].median / timings[theirs["name"]].median,
        }
    else:
        theirs["reason"] = f"absent: {reasons[theirs['name']]}"
    return record | {"ours": {"milliseconds": timings[OURS]._asdict()}, "peers": [theirs]}


def row(record: dict) -> str:
    """A case in the table."""
    head = f"{title(record):{CASE}s}"
    if "failed" in record:
        return f"{head}  FAILED: {record['failed']}"
    (theirs,) = record["peers"]
    head += _time(record["ours"])
    if "reason" in theirs:
        return f"{head}  {theirs['reason']}"
    return f"{head}{_time(theirs)}{theirs['ratio']:11.3f}"


def _time(entry: dict) -> str:
    timing = Timing(**entry["milliseconds"])
    text = f"{timing.median:.3g} ms [{timing.p20:.3g} .. {timing.p80:.3g}]"
    return f"{text:>{TIME}s}"
