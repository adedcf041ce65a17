"""Errors for groups that could not be whitened: on a CPU at once, on a GPU without waiting for it.

On a GPU the flags of a call are copied to the host behind the kernels; a later call looks at what
has arrived.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..autograd import in_transform
from .dense import FINE, NOT_FINITE

_CURE = "its features must be linearly independent; use eps > 0, larger groups or fewer features"


class Event(Protocol):
    """What is used of a torch.cuda.Event."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class _Call(NamedTuple):
    arrived: Event
    info: Tensor  # pinned


_calls: deque[_Call] = deque()


def check(info: Tensor) -> None:
    """Raise for the flags of this call on a CPU, for those of earlier calls on a GPU."""
    if in_transform() and not torch.compiler.is_compiling():
        info = torch.func.debug_unwrap(info).flatten()  # of all problems of a vmap
    if info.device.type == "cpu":
        if torch.compiler.is_compiling():
            torch._assert_async((info == FINE).all(), f"a group cannot be whitened: {_CURE}")
        else:
            _raise_for(info)
    elif not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing():
        _raise_for_earlier(wait=False)
        host = torch.empty(info.shape, dtype=info.dtype, device="cpu", pin_memory=True)
        host.copy_(info, non_blocking=True)
        _calls.append(_Call(torch.cuda.current_stream(info.device).record_event(), host))


def check_whitening() -> None:
    """Wait for all calls of `whiten` and `w_mse` on GPUs, and raise for groups that failed.

    Raises:
        ValueError: a group whose covariance is not finite or not positive definite; the message
            names the group. Each failed call raises once.
    """
    _raise_for_earlier(wait=True)


def _raise_for_earlier(wait: bool) -> None:
    while _calls and (wait or _calls[0].arrived.query()):
        call = _calls.popleft()
        call.arrived.synchronize()
        _raise_for(call.info, " of an earlier call")


def _raise_for(info: Tensor, which: str = "") -> None:
    failed = info.nonzero()
    if len(failed) == 0:
        return
    group = int(failed[0, 0])
    what = f"the covariance of group {group} of {len(info)}{which}"
    if info[group] == NOT_FINITE:
        raise ValueError(f"{what} is not finite: it has features that are NaN, infinite or huge")
    raise ValueError(f"{what} is not positive definite: {_CURE}")
