"""A case of the GPU's table in a process of its own: one fault, or one that hangs, costs one case.

The process of the next case has imported everything when its turn comes. It then reads one line of
JSON, and leaves the record in a file.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ..cases.case import Case
from ..harness.paths import IN_CHECKOUT, ROOT

COMMAND = [sys.executable, "-m", f"{__package__}.alone"]


class Alone:
    """Measures cases one after the other; `close` ends the process that is ready."""

    def __init__(self, command: list[str] | None = None):
        self.command = COMMAND if command is None else command
        self.ready = self._start()

    def measure(self, case: Case, seconds: float, **options: float) -> dict:
        """The record of a case, or why there is none; `options` are those of `measure.measure`."""
        process, self.ready = self.ready, self._start()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "record.json"
            order = {"name": case.name, "out": str(out), "options": options}
            try:
                process.communicate(json.dumps(order) + "\n", timeout=max(seconds, 0.1))
                reason = f"its process ended with status {process.returncode}"
            except subprocess.TimeoutExpired:
                reason = f"stopped after {seconds:.0f} s"
            finally:  # also where this process is interrupted
                process.kill()
                process.wait()
            if out.exists():
                return json.loads(out.read_text())
        print(f"  FAILED: {reason}", flush=True)
        return case.record() | {"failed": reason}

    def close(self) -> None:
        self.ready.kill()
        self.ready.communicate()

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self.command, cwd=ROOT if IN_CHECKOUT else None, stdin=subprocess.PIPE, text=True
        )


def main() -> None:
    from .cases import CASES
    from .measure import measure

    text = sys.stdin.readline()
    if text:
        order = json.loads(text)
        record = measure(CASES[order["name"]], "cuda", **order["options"])
        out = Path(order["out"])
        made = out.with_suffix(".part")
        made.write_text(json.dumps(record))
        made.rename(out)  # whole, or not there


if __name__ == "__main__":
    main()
