"""A function in a process of its own, which may be cut short."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

from ..baselines.loading import Unavailable
from .check import first_line


def apart(seconds: float | None, function: Callable[..., dict], *arguments) -> dict:
    """function(*arguments) in a fresh process, or {"reason"}: it failed, or took too long.

    Args:
        seconds: how long it may take; None: as long as it wants.
    """
    context = _context(function.__module__)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return {"reason": f"took more than {seconds:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"reason": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _context(module: str) -> ForkServerContext:
    """Processes forked from a server that has imported what they need, this module too."""
    context = multiprocessing.get_context("forkserver")
    # torch imports the compiler when an operator written in Python is first called
    context.set_forkserver_preload(["torch._dynamo", "contrastive_kernels", module])
    # Ctrl-C reaches every process of the terminal, but the parent alone decides: the server and
    # all that it forks inherit that they ignore it. It finds modules where this process does.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _search_path():
            forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)
    return context


@contextmanager
def _search_path() -> Iterator[None]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(sender: Connection, function: Callable[..., dict], arguments: tuple) -> None:
    """Runs in the process: sends the result."""
    try:
        result = function(*arguments)
    except Unavailable as unavailable:
        result = {"reason": str(unavailable)}
    except Exception as failure:
        result = {"reason": first_line(failure)}
    sender.send(result)
