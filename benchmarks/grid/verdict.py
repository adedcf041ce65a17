"""What a point of the grid says: ours over the faster of the two dense forms."""

from typing import NamedTuple

from ..baselines import dense
from ..baselines.baseline import compiled, eager
from ..cases.grid import CASES
from ..harness.markdown import asked_for

# The names of both dense forms, and what they are called in a table.
DENSE_FORMS = {eager(dense.info_nce).name: "eager", compiled(dense.info_nce).name: "compiled"}


# The records of a loss by rows and features.
Places = dict[tuple[int, int], dict]


class Verdict(NamedTuple):
    """ratio: ours over the faster dense form; None where none has a time.
    text: which it was; without a ratio, why.
    won: None: there is nothing to compare with.
    """

    ratio: float | None
    text: str
    won: bool | None


def verdict(record: dict) -> Verdict:
    if "failed" in record:
        return Verdict(None, "FAILED", None)
    forms = [peer for peer in record["peers"] if peer["name"] in DENSE_FORMS]
    timed = [peer for peer in forms if "ratio" in peer]
    if timed:
        faster = max(timed, key=lambda peer: peer["ratio"])
        return Verdict(faster["ratio"], DENSE_FORMS[faster["name"]], faster["ratio"] < 1)
    if any(_too_large(peer) for peer in forms):
        return Verdict(None, "dense does not fit", True)
    if any("slow" in peer for peer in forms):
        return Verdict(None, "dense too slow", True)
    return Verdict(None, "no dense time", None)


def _too_large(peer: dict) -> bool:
    return peer.get("fits") is False or asked_for(peer.get("reason", "")) is not None


def place(record: dict) -> tuple[int, int]:
    """Rows and features."""
    return record["sizes"]["n"], record["sizes"]["d"]


def number(ratio: float) -> str:
    """Two digits that matter."""
    return f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"


def cell(record: dict) -> str:
    """A verdict in a table; a loss is set in bold."""
    found = verdict(record)
    if found.ratio is None:
        return found.text
    text = f"{number(found.ratio)} {found.text}"
    return text if found.won else f"**{text}**"


def by_loss(records: list[dict], dtype: str) -> dict[str, Places]:
    """The records of a dtype, in the order of the table of losses."""
    found: dict[str, Places] = {name: {} for name in CASES}
    for record in records:
        if record["dtype"] == dtype:
            found[record["name"]][place(record)] = record
    return {name: places for name, places in found.items() if places}


def columns(records: Places) -> str:
    """How many columns the similarities have beside N rows, the same at all places."""
    sizes = next(iter(records.values()))["sizes"]
    times = sizes["m"] // sizes["n"]
    text = "M = N" if times == 1 else f"M = {times}N"
    return text if sizes["k"] == 1 else f"{text}, K = {sizes['k']}"


def dtypes(records: list[dict]) -> list[str]:
    """Those that there are, float32 first."""
    return sorted({r["dtype"] for r in records}, key=lambda name: (name != "float32", name))
