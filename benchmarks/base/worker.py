"""A build in a process of its own, told what to do over a pipe; serve.py is its other side."""

import json
import subprocess
import sys
from pathlib import Path

import contrastive_kernels as ck

from .builds import Build

BOOT = Path(__file__).with_name("boot.py")
BENCHMARKS = BOOT.parents[1]


class Ended(Exception):
    """A worker's process has ended before it answered."""


class Worker:
    """One build.

    Attributes:
        version: that the package says it has.
        reason: why its fused backend is not usable, or None.

    Raises:
        Ended: the package cannot be loaded; the process has printed why.
    """

    def __init__(self, build: Build, device: str, threads: int):
        self.build = build
        self.settings = {"device": device, "threads": threads, "names": ck.__all__}
        self._start()

    def begin(self, record: dict) -> str | None:
        """Makes and checks the case of a record: why it cannot be timed, or None."""
        try:
            if self.process.poll() is not None:
                self._start()
            return self._ask({"record": record})["reason"]
        except Ended as ended:
            return str(ended)

    def sample(self, repeats: int) -> float:
        """Seconds per call of so many calls of the case that began last.

        Raises:
            Ended: it ended instead.
        """
        return self._ask({"repeats": repeats})["seconds"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _start(self) -> None:
        command = [sys.executable, "-P", BOOT, self.build.package, BENCHMARKS]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        answer = self._ask(self.settings)
        self.version, self.reason = answer["version"], answer["reason"]

    def _ask(self, what: dict) -> dict:
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            line = ""
        else:
            line = self.process.stdout.readline()
        if not line:
            raise Ended(f"the process of {self.build.name} ended with status {self.process.wait()}")
        return json.loads(line)
