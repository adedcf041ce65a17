"""Child processes: trainings side by side, and measurements in a process of their own."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Stopped(Exception):
    """The parent process asked a task to end."""


def alone(task: Callable[..., Result], *arguments: object) -> Result:
    """Run a task in a process that has done nothing yet, so that its memory is the task's own."""
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        return pool.submit(task, *arguments).result()


def side_by_side(
    task: Callable[..., Result],
    arguments: list[tuple],
    on_progress: Callable[[int], None],
    on_result: Callable[[int, Result], None] = lambda index, result: None,
) -> list[Result]:
    """Run a task once per tuple of arguments; the results come in the same order.

    There are as many processes as torch would use threads, with one thread each: small networks
    gain little from more, and the results do not depend on the number of cores. A task calls
    `count_step`; `on_progress` gets the number of such calls so far, a few times a second.
    `on_result` gets the place of each task and its result once it is done, in any order.
    """
    context = _context()
    steps, stop = context.Value("i", 0), context.Event()
    workers = min(torch.get_num_threads(), len(arguments))
    with ProcessPoolExecutor(workers, context, _start_worker, (steps, stop)) as pool:
        futures = [pool.submit(task, *values) for values in arguments]
        pending = {future: index for index, future in enumerate(futures)}
        try:
            while True:
                done, _ = wait(pending, timeout=0.2)
                on_progress(steps.value)
                for future in done:
                    on_result(pending.pop(future), future.result())  # raises what the task raised
                if not pending:
                    return [future.result() for future in futures]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def count_step() -> None:
    """Report one step of a task in `side_by_side`; raises `Stopped` when it should end. Elsewhere
    it does nothing."""
    if not _worker:
        return
    if _worker["stop"].is_set():
        raise Stopped
    with _worker["steps"].get_lock():
        _worker["steps"].value += 1


_worker: dict[str, Any] = {}  # filled in the worker processes only


def _context() -> ForkServerContext:
    """Processes forked from one that has imported what they need and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.measure", f"{__package__}.trial"])
    # Ctrl-C reaches every process of the terminal, but the parent alone decides: the server and
    # all that it forks inherit that they ignore it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)
    return context


def _start_worker(steps: Any, stop: Any) -> None:
    _worker.update(steps=steps, stop=stop)
    torch.set_num_threads(1)
