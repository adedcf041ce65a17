"""One call of a loss."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..baselines.baseline import Loss
from .oracle import Tensors

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64,
}  # fmt: skip

# What a step times: the forward pass under no_grad, the backward pass, or one after the other.
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Step:
    """One call of a loss on its tensors, with the backward pass if asked for."""

    loss: Loss
    tensors: Tensors
    options: dict
    backward: bool = True

    def __call__(self) -> Tensor:
        self.clear()
        with torch.set_grad_enabled(self.backward):
            value = self.loss(**self.tensors, **self.options)
        if self.backward:
            value.backward()
        return value.detach()

    def clear(self) -> None:
        for t in self.tensors.values():
            t.grad = None

    def gradients(self) -> Tensors:
        return {name: t.grad for name, t in self.tensors.items() if t.grad is not None}


@dataclass(frozen=True)
class BackwardStep(Step):
    """The backward pass alone, of a forward pass that `prepare` makes for each call."""

    graph: list[Tensor] = field(default_factory=list)

    def prepare(self) -> None:
        self.graph[:] = [self.loss(**self.tensors, **self.options)]

    def __call__(self) -> Tensor:
        if not self.graph:
            self.prepare()
        self.clear()
        value = self.graph.pop()
        value.backward()
        return value.detach()
