"""What a row of the tables of cases is."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .inputs import Inputs, Sizes
from .oracle import Oracle, Tensors
from .peers import Loss, Peer


@dataclass(frozen=True)
class Rival:
    """A peer and the share of its time that the loss may take; None: only for comparison."""

    peer: Peer
    at_most: float | None


@dataclass(frozen=True)
class Case:
    """One row of the tables.

    Attributes:
        group: "large" (the rows of the main table), "swap" (drop-in losses against their peers),
            "small" (every loss), "whitening" or "scaling" (time over the number of negatives).
        loss: the function under test; it and every peer are called with the tensors and options.
        inputs: makes the float32 tensors for a size.
        oracle: their float64 value and gradients.
        flops: floating point operations of the schedule, a multiply-add counted as two.
        frozen: inputs without gradient.
        backward: False for the forward alone, under no_grad.
        dtype: of the features on a GPU.
        at_most_ms: bound of the time on a GPU.
        graph_at_most: share of its first peer's time that the step may take as a CUDA graph.
        graph_at_most_ms: bound of the time as a CUDA graph, where a call from Python takes longer.
    """

    name: str
    group: str
    loss: Loss
    sizes: Sizes
    inputs: Inputs
    oracle: Oracle
    options: dict = field(default_factory=dict)
    rivals: tuple[Rival, ...] = ()
    flops: Callable[[Sizes], float] | None = None
    frozen: tuple[str, ...] = ()
    backward: bool = True
    dtype: torch.dtype = torch.bfloat16
    at_most_ms: float | None = None
    graph_at_most: float | None = None
    graph_at_most_ms: float | None = None

    def tensors(
        self, sizes: Sizes, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> Tensors:
        """The inputs as leaves: features in dtype, scalars in float32, the same on every call."""
        with torch.device(device):
            tensors = self.inputs(sizes, torch.Generator(device).manual_seed(0))
        for name, t in tensors.items():
            if t.is_floating_point():
                leaf = t.to(dtype) if t.dim() > 0 else t
                tensors[name] = leaf.requires_grad_(self.backward and name not in self.frozen)
        return tensors
