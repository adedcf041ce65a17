"""Every loss at N = 256, where it may not be slower than dense eager torch: the cases of the table
of losses that have a benchmark."""

from collections.abc import Callable
from functools import partial

import torch

from contrastive_kernels.losses import cases, table

from ..baselines import chunked, dense, gpu_kernels
from ..baselines.baseline import Baseline, eager, in_chunks, on_request
from . import oracle
from .case import Case
from .inputs import Inputs, Samples, Sizes
from .operations import frozen_keys, half_tiles, two_sided
from .oracle import Tensors

ROWS = 256
# Sizes of a benchmark behind the letters of a shape.
LETTERS = {"N": "n", "M": "m", "D": "d", "K": "k", "V": "k"}
OPERATIONS: dict[str, Callable[[Sizes, str], float]] = {
    "info_nce": two_sided,
    "info_nce symmetric": two_sided,
    "info_nce frozen": frozen_keys,
    "eqco": two_sided,
    "clip_loss": two_sided,
    "sup_con": half_tiles,
}
OTHERS: dict[str, tuple[Baseline, ...]] = {
    "siglip_loss": (in_chunks(chunked.siglip_loss), gpu_kernels.SIGLIP_KERNEL),
}


def small(name: str, row: cases.Row, case: cases.Case) -> Case:
    """The benchmark of a case, against the loss of dense.py, or else its definition."""
    chosen = case.benchmark
    made = case._replace(inputs={**case.inputs, **chosen.inputs}, sizes=chosen.sizes, unit=1)
    letters = cases.letters(made) & LETTERS.keys()
    k = next((cases.sizes_of(made, {})[letter] for letter in letters & {"K", "V"}), 1)
    sizes = Sizes if case.unit == 1 else Samples  # groups of samples stay whole
    baseline = getattr(dense, row.name, table.definition(row))
    return Case(
        f"{name.replace(' ', '_')}_small",
        "small",
        row.function,
        sizes(ROWS, ROWS, k=k),
        Inputs(partial(_make, made, letters), frozenset(LETTERS[letter] for letter in letters)),
        oracle.whole(baseline),
        dict(chosen.options),
        (eager(baseline).bounded(1.0), *on_request(baseline, *OTHERS.get(name, ()))),
        OPERATIONS.get(name),
        frozen=tuple(n for n, given in made.inputs.items() if given.kind in cases.FROZEN),
    )


def _make(case: cases.Case, letters: set[str], sizes: Sizes, generator: torch.Generator) -> Tensors:
    known = {letter: getattr(sizes, LETTERS[letter]) for letter in letters}
    options = {"dtype": torch.float32, "device": generator.device}
    made = cases.tensors(case, seed=generator.initial_seed(), **options, **known)
    return {name: t.detach() for name, t in made.items()}


CASES = tuple(small(name, row, case) for name, (row, case) in table.CASES.items() if case.benchmark)
