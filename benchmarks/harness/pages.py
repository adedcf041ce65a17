"""The generated parts of README.md and of the pages in docs/, each between its two markers."""

from collections.abc import Callable, Mapping
from pathlib import Path


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def replaced(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers of this name.

    Raises:
        ValueError: the markers are missing, repeated or in the wrong order.
    """
    begin, end = markers(name)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must contain {begin} and {end} once each")
    head, _, rest = page.partition(begin)
    if end not in rest:
        raise ValueError(f"the page must contain {begin} before {end}")
    return head + begin + "\n" + text + end + rest.partition(end)[2]


def update(pages: Mapping[Path, Callable[[str], str]], command: str, *, check: bool) -> int:
    """Writes pages as their functions make them, or with `check` only compares: the exit status.

    Args:
        command: what writes them, for the message that one disagrees.
    """
    try:
        changed = {
            path: new
            for path, make in pages.items()
            if (new := make(old := path.read_text())) != old
        }
    except (OSError, ValueError) as error:
        print(error)
        return 1
    for path, new in changed.items():
        if check:
            print(f"{path.name} disagrees with the results: run {command}")
        else:
            path.write_text(new)
    return int(check and bool(changed))
