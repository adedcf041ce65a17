"""Chromium without a window, spoken to through a pair of pipes (its DevTools protocol)."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
    "--no-first-run",
)  # fmt: skip


class Browser:
    """One page of it. `requests` are the addresses that it asked for."""

    def __init__(self, sending: int, receiving: int) -> None:
        self._out, self._in = os.fdopen(sending, "wb"), os.fdopen(receiving, "rb")
        self._rest, self._count, self._session = b"", 0, None
        self.requests: list[str] = []
        self._loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Network", "Runtime"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict:
        """Calls a method, and waits for what it returns."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(method, answer["error"])
                return answer["result"]

    def _next(self) -> dict:
        """The next message; what events say is kept."""
        while b"\0" not in self._rest:
            more = os.read(self._in.fileno(), 1 << 16)
            assert more, "Chromium has ended"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(first)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self._loaded |= message.get("method") == "Page.loadEventFired"
        return message

    def open(self, url: str) -> None:
        self._loaded = False
        self.send("Page.navigate", url=url)
        while not self._loaded:
            self._next()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 20.0) -> None:
        """Until an expression is true; there is none while the page changes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(RuntimeError):
                if self.run(script):
                    return
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}")

    def show(self, width: int, height: int, *, dark: bool = False) -> None:
        """As a window of this size shows it, to someone who prefers dark pages."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: str) -> None:
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextmanager
def chromium(executable: str) -> Iterator[Browser]:
    from_us, sending = os.pipe()
    receiving, to_us = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # Chromium reads from descriptor 3 and writes to 4
        command = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
        process = subprocess.Popen(
            ["bash", "-c", command, executable, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(from_us, to_us), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(from_us)
        os.close(to_us)
        try:
            yield Browser(sending, receiving)
        finally:
            process.terminate()
            process.wait()
