"""A worker's side: checks and times the cases that it is told, one at a time.

It reads a JSON object in each line and answers with another. The first says how to measure; then
comes the record of a case, which is answered with why it cannot be timed, and after it any number
of times how often to call it, which is answered with the seconds of a call.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

import torch

import contrastive_kernels as ck

from ..cases.case import Case
from ..cases.step import Step
from ..gpu.instruments import sampler
from ..harness import memory_limit
from ..harness.check import TOLERANCE, first_line, reason
from ..harness.timing import Sample, sampled


def serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what others print is no answer
    settings = json.loads(sys.stdin.readline())
    device = settings["device"]
    torch.set_num_threads(settings["threads"])
    declare_absent(settings["names"])
    backend = ck.backends()["cpu" if device == "cpu" else "triton"]
    answer(answers, {"version": ck.__version__, "reason": backend.reason})
    step, sample = None, None
    for line in sys.stdin:
        request = json.loads(line)
        if "repeats" in request:
            answer(answers, {"seconds": timed(step, request["repeats"], sample)})
            continue
        step = None  # its memory is free before the next case begins
        try:
            with memory_limit.limited():
                case = find(request["record"], device)
                step, why_not = checked(case, device)
        except Exception as failure:
            why_not = first_line(failure)
        sample = sampler(device, host_bound=request["record"]["group"] == "small")
        answer(answers, {"reason": why_not})


def answer(answers: TextIO, what: dict) -> None:
    print(json.dumps(what), file=answers, flush=True)


def declare_absent(names: list[str]) -> None:
    """Gives this build the losses that it has not, so that the tables of cases, which name them,
    can be read; a call of one says so."""
    for name in names:
        if not hasattr(ck, name):
            setattr(ck, name, absent(name))


def absent(name: str) -> Callable[..., NoReturn]:
    def loss(*_args, **_options) -> NoReturn:
        raise NotImplementedError(f"this build has no {name}")

    loss.__name__ = name
    return loss


def find(record: dict, device: str) -> Case:
    """The case of a record, of the group's own table: another group's may not fit to this build."""
    module = "gpu.cases" if device == "cuda" else f"cases.{record['group']}"
    cases = importlib.import_module(f"..{module}", __package__).CASES
    cases = cases.values() if isinstance(cases, dict) else cases
    return next(case for case in cases if case.name == record["name"]).as_in(record)


def checked(case: Case, device: str) -> tuple[Step, str | None]:
    """The step of a case, and why it cannot be timed, or None."""
    tensors = case.tensors(device)
    truth = case.truth(tensors)
    step = case.step(case.under_test, tensors)
    return step, reason(step, truth, TOLERANCE[case.dtype])


def timed(step: Step, repeats: int, sample: Sample) -> float:
    """Seconds per call; a short step runs once before, since the other build had the caches."""
    if repeats > 1:
        step()
    return sampled(sample, step, repeats)
