"""Python in processes that have not imported this package, and that do not wait for torch.

They are forked from a server that has imported torch, which takes seconds, and nothing else.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

CONTEXT = multiprocessing.get_context("forkserver")


def run_python(script: str, *arguments: str) -> str:
    """What a script prints; it must not fail. A script that needs another environment or folder
    begins with that."""
    CONTEXT.set_forkserver_preload(["torch"])
    with TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        process = CONTEXT.Process(target=_run, args=(script, arguments, out, error))
        process.start()
        process.join()
        assert process.exitcode == 0, out.read_text() + error.read_text()
        return out.read_text()


def _run(script: str, arguments: tuple[str, ...], out: Path, error: Path) -> None:
    sys.argv = ["-c", *arguments]
    with out.open("w") as sys.stdout, error.open("w") as sys.stderr:
        exec(script, {"__name__": "__main__"})
