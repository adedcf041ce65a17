"""What a row of the tables of cases is."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..baselines.baseline import Baseline, Loss
from ..baselines.loading import Lazy
from .inputs import Inputs, Sizes
from .oracle import Oracle, Tensors, Truth
from .step import DTYPES, LOSS_SCALES, BackwardStep, Step


@dataclass(frozen=True)
class Case:
    """One row of the tables.

    Attributes:
        group: "large" (the rows of the main table), "swap" (drop-in losses against those of the
            packages), "small" (every loss), "whitening", "search" (the nearest keys), "late"
            (late interaction) or "scaling" (time over the number of negatives).
        loss: the function under test; it and the baselines are called with the tensors and options.
        inputs: makes the float32 tensors for a size.
        oracle: their float64 value and gradients.
        flops: floating point operations of the schedule for sizes and one of PASSES, a
            multiply-add counted as two.
        frozen: inputs without gradient.
        passes: what is timed, of PASSES.
        dtype: of the features.
        backend: of the loss under test.
        memory: whether peak memory is measured, on a CPU.
        bounded: whether the bounds hold; they are those of the table's own sizes.
        bfloat16_at_most: share of its time that it may take with bfloat16 features, on a CPU; None:
            they are not timed beside.
        at_most_ms: bound of the time on a GPU.
        graph_at_most: share of its first baseline's time that the step may take as a CUDA graph.
        graph_at_most_ms: bound of the time as a CUDA graph, where a call from Python takes longer.
    """

    name: str
    group: str
    loss: Loss
    sizes: Sizes
    inputs: Inputs
    oracle: Oracle
    options: dict = field(default_factory=dict)
    baselines: tuple[Baseline, ...] = ()
    flops: Callable[[Sizes, str], float] | None = None
    frozen: tuple[str, ...] = ()
    passes: str = "both"
    dtype: torch.dtype = torch.float32
    backend: str = "auto"
    memory: bool = False
    bounded: bool = True
    bfloat16_at_most: float | None = None
    at_most_ms: float | None = None
    graph_at_most: float | None = None
    graph_at_most_ms: float | None = None

    @property
    def backward(self) -> bool:
        return self.passes != "forward"

    @property
    def under_test(self) -> Loss:
        """The loss on the backend of the case.

        Raises:
            Unavailable: it stands in for another package's, which is not here.
        """
        loss = self.loss.load() if isinstance(self.loss, Lazy) else self.loss
        return loss if self.backend == "auto" else partial(loss, backend=self.backend)

    def tensors(self, device: str = "cpu") -> Tensors:
        """The inputs as leaves: features in dtype, scalars in float32, the same on every call."""
        with torch.device(device):
            tensors = self.inputs(self.sizes, torch.Generator(device).manual_seed(0))
        for name, t in tensors.items():
            if t.is_floating_point():
                leaf = t.to(self.dtype) if t.dim() > 0 else t
                tensors[name] = leaf.requires_grad_(self.backward and name not in self.frozen)
        return tensors

    @property
    def loss_scale(self) -> float:
        """Of the upstream gradient."""
        return LOSS_SCALES.get(self.dtype, 1.0)

    def baseline(self, name: str) -> Baseline:
        return next(each for each in self.baselines if each.name == name)

    def truth(self, tensors: Tensors) -> Truth:
        """What the oracle says of these inputs."""
        truth = self.oracle(tensors, self.options, self.backward)
        scaled = {name: self.loss_scale * g for name, g in truth.gradients.items()}
        return truth._replace(gradients=scaled)

    def step(self, loss: Loss, tensors: Tensors) -> Step:
        """One call of a loss, ours or a baseline's."""
        kind = BackwardStep if self.passes == "backward" else Step
        return kind(loss, tensors, self.options, self.backward, self.loss_scale)

    def resized(self, sizes: Sizes) -> "Case":
        """The case with sizes that are not the table's: without bounds."""
        return replace(self, sizes=sizes, bounded=False)

    def as_in(self, record: dict) -> "Case":
        """The case with the sizes, the dtype, the pass and the backend of a record."""
        return replace(
            self,
            sizes=replace(self.sizes, **record["sizes"]),
            dtype=DTYPES[record["dtype"]],
            passes=record["pass"],
            backend=record["backend"],
        )

    def record(self) -> dict:
        """What the JSON record of the case begins with."""
        return {
            "name": self.name,
            "group": self.group,
            "sizes": vars(self.sizes),
            "frozen": self.frozen,
            "dtype": str(self.dtype).removeprefix("torch."),
            "backward": self.backward,
            "pass": self.passes,
            "backend": self.backend,
        }

    def operations(self) -> float | None:
        return None if self.flops is None else self.flops(self.sizes, self.passes)
