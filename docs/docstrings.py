"""Docstrings as Python has them when it runs: those of losses describe the options that all share.

They are plain text, in which <x, y> and x_i * y_i mean no tag and no emphasis.
"""

import inspect
import re
from typing import Any

import griffe

import contrastive_kernels as ck

PUBLIC = {f"{o.__module__}.{o.__qualname__}": o for o in (getattr(ck, n) for n in ck.__all__)}
SPECIAL = {"<": "&lt;", "*": r"\*", "_": r"\_", "|": r"\|", "[": r"\["}


def escaped(text: str) -> str:
    """text for Markdown, but for names of arguments and what stands between backticks."""
    parts = re.split(r"(`[^`]+`|^    [\w, ]+:)", text, flags=re.MULTILINE)
    parts[::2] = [re.sub(r"[<*_|\[]", lambda m: SPECIAL[m[0]], part) for part in parts[::2]]
    return "".join(parts)


class RuntimeDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.path in PUBLIC and obj.docstring:
            text = inspect.getdoc(PUBLIC[obj.path]) or ""
            obj.docstring.value = escaped(text)
