"""Pieces of the tables in README.md and docs/."""

import re
from collections.abc import Iterable


def milliseconds(entry: dict) -> str:
    median = entry["milliseconds"]["median"]
    return f"{median:.0f} ms" if median >= 100 else f"{median:.3g} ms"


def share(ratio: float, at_most: float | None) -> str:
    """A ratio and its bound; a missed bound is set in bold."""
    if at_most is None:
        return f"{ratio:.2f}"
    text = f"{ratio:.2f} (≤ {at_most:.2f})"
    return text if ratio <= at_most else f"**{text}**"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def asked_for(reason: str) -> int | None:
    """How many bytes torch could not allocate, if that is the reason."""
    match = re.search(r"tried to allocate (\d+) bytes", reason)
    return int(match[1]) if match else None


def brief(reason: str) -> str:
    """Why there is no time; of torch's message that memory is out, what was asked for."""
    asked = asked_for(reason)
    return reason if asked is None else f"out of memory: asked for {asked / 1e9:.0f} GB"


def versions(environment: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
