"""One call of a loss."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..baselines.baseline import Loss
from .oracle import Tensors

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float64": torch.float64,
}  # fmt: skip
# Upstream gradients, as those who train in float16 scale the loss: it has no smaller ones.
LOSS_SCALES = {torch.float16: 2.0**15}

# What a step times: the forward pass under no_grad, the backward pass, or one after the other.
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Step:
    """One call of a loss on its tensors, with the backward pass if asked for."""

    loss: Loss
    tensors: Tensors
    options: dict
    backward: bool = True
    loss_scale: float = 1.0

    def __call__(self) -> Tensor:
        self.clear()
        with torch.set_grad_enabled(self.backward):
            value = self.loss(**self.tensors, **self.options)
        if self.backward:
            self.differentiate(value)
        return value.detach()

    def differentiate(self, value: Tensor) -> None:
        """The backward pass, which nothing is added to without a loss scale."""
        value.backward(None if self.loss_scale == 1 else torch.full_like(value, self.loss_scale))

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
        self.differentiate(value)
        return value.detach()
