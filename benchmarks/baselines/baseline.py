"""What a loss is compared with."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Baseline:
    """Its name in the tables, how to get its loss, and what ours may take beside it.

    Attributes:
        load: returns the loss, called with the tensors and options of the case; raises
            Unavailable with the reason.
        distribution: the installed package that its version is read from.
        compiles: whether its first call takes many seconds.
        at_most: the share of its time that ours may take; None: only for comparison.
        on_request: left out unless it is asked for, since it takes long.
    """

    name: str
    load: Callable[[], Loss]
    distribution: str = "torch"
    compiles: bool = False
    at_most: float | None = None
    on_request: bool = False

    def bounded(self, at_most: float) -> "Baseline":
        """The same, with the share of its time that ours may take."""
        return replace(self, at_most=at_most)

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def eager(loss: Loss) -> Baseline:
    """A loss of dense.py."""
    return Baseline("dense eager torch", lambda: loss)


def compiled(loss: Loss) -> Baseline:
    """torch.compile of a loss of dense.py."""
    return Baseline(
        "torch.compile of dense", lambda: torch.compile(loss, dynamic=False), compiles=True
    )


def in_chunks(loss: Loss) -> Baseline:
    """A loss of chunked.py."""
    return Baseline("chunks, checkpointed", lambda: loss)


def published(loss: Loss) -> Baseline:
    """The procedure as public code writes it."""
    return Baseline("loop over the groups, as published", lambda: loss)


def batched(loss: Loss) -> Baseline:
    """The same in as few calls as torch offers."""
    return Baseline("batched eager torch", lambda: loss)


def on_request(loss: Loss, *others: Baseline) -> tuple[Baseline, ...]:
    """What takes long: torch.compile of a loss of dense.py, and others."""
    return tuple(replace(baseline, on_request=True) for baseline in (compiled(loss), *others))
