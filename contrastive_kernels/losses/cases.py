"""What a row of the table of losses says: the tensors a loss takes, by the letters of their shapes.

Tests, ranks of a group and benchmarks make their inputs from the same cases, at their own sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import known
from .base import ContrastiveLoss

# What a letter of a shape stands for, unless a case or its user says otherwise.
SIZES = {
    "N": 7,  # rows, of which each rank of a group has a part
    "M": 11,  # negatives
    "D": 5,  # features
    "K": 3,  # positives, or negatives, of a row
    "V": 3,  # views
    "G": 4,  # features of a guide or a teacher
    "T": 3,  # steps of a sequence
    "S": 2,  # predictions of a step
    "P": 3,  # permutations
    "R": 13,  # negatives of all rows, as many for each as RUNS says
}
RUNS = (3, 0, 1, 5, 2)  # negatives of a row, in turn
MASKS = ((1, 0, 1), (0, 0, 0), (1, 1, 1), (0, 1, 0))  # which of K negatives of a row count
LEARNED = ("features", "view", "number")  # kinds that get a gradient
FROZEN = ("frozen", "queue", "chunks")  # kinds of features that get none


class Input(NamedTuple):
    """One argument of a loss that is a tensor.

    kind: "features"; "view": features related to those of the input `of`, row by row; "frozen":
        features without gradient; "queue": of unit length besides; "chunks": a queue that comes as
        a list of tensors; "number"; "ids"; "same": the very tensor `of`; "permutations" of rows;
        "mask" by MASKS; "counts" by RUNS.
    shape: axes, each a letter of SIZES, a number of them ("2N": two blocks of N rows one after the
        other), a plain number, or a sum of these ("N+M").
    values: of a number; of ids, one cycle for each term of the axis.
    """

    kind: str
    shape: tuple[str, ...] = ()
    of: str | None = None
    values: tuple = ()


def features(shape: str) -> Input:
    return Input("features", tuple(shape.split()))


def view(of: str, shape: str = "N D") -> Input:
    return Input("view", tuple(shape.split()), of)


def frozen(shape: str) -> Input:
    return Input("frozen", tuple(shape.split()))


def queue(shape: str = "M D") -> Input:
    return Input("queue", tuple(shape.split()))


def chunks(shape: str = "M D") -> Input:
    return Input("chunks", tuple(shape.split()))


def number(value: float) -> Input:
    return Input("number", values=(value,))


def ids(axis: str, *cycles: tuple[int, ...]) -> Input:
    return Input("ids", (axis,), values=cycles)


def same(of: str, axis: str = "N") -> Input:
    return Input("same", (axis,), of)


def permutations(count: str = "P") -> Input:
    return Input("permutations", (count, "N"))


def mask(shape: str = "N K") -> Input:
    return Input("mask", tuple(shape.split()))


def counts(axis: str = "N") -> Input:
    return Input("counts", (axis,))


class Benchmark(NamedTuple):
    """The small benchmark of a case: its options, and what it has other than the case, inputs and
    sizes of letters."""

    options: Mapping[str, Any] = {}
    sizes: Mapping[str, int] = {}
    inputs: Mapping[str, Input] = {}


class Case(NamedTuple):
    """One way to call a loss.

    inputs: its tensors by argument, what is related to another after that; `exclude` is a pair of
        ids, "exclude_rows" and "exclude_columns".
    options: its other arguments.
    sizes: of letters, where they are not those of SIZES.
    unit: N is a multiple of it.
    coupled: there is no loss of a row, reduction="none".
    slack: of the error budget, in roundings.
    sharded: with a group, M negatives are parts of the ranks.
    grouped: whether it is run over the ranks of a group; not where it differs in N only.
    compiled, temperatures: whether torch.compile and low temperatures are tested, as they are for
        the first case of every loss.
    backends: that run it, if they are not those of the row.
    benchmark: its small benchmark, if it has one.
    """

    inputs: Mapping[str, Input]
    options: Mapping[str, Any] = {}
    sizes: Mapping[str, int] = {}
    unit: int = 1
    coupled: bool = False
    slack: float = 64.0
    sharded: bool = False
    grouped: bool = True
    compiled: bool = False
    temperatures: bool = False
    backends: tuple[str, ...] | None = None
    benchmark: Benchmark | None = None


class Row(NamedTuple):
    """A loss.

    module: its module.
    cases: by names that begin with that of the loss; the first one stands for the loss where one
        case is enough.
    rows: what reduction="none" gives one number for.
    exchanges: what `exchange` may be; () if the loss has no such argument.
    two_views: arguments that are two views (N, D), for the tests of errors.
    alone: whether a batch of one row has a loss.
    backends: that run it: those that there are kernels for, "auto" where there are none.
    """

    function: Callable[..., Any]
    module: type[ContrastiveLoss]
    cases: Mapping[str, Case]
    rows: str = "N"
    exchanges: tuple[str, ...] = ("gather", "ring")
    two_views: tuple[str, str] | None = None
    alone: bool = False
    backends: tuple[str, ...] = ("reference", "cpu", "triton")

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def first(self) -> Case:
        return next(iter(self.cases.values()))

    def takes(self, argument: str) -> bool:
        """Whether the loss has an argument of that name."""
        return argument in inspect.signature(self.function).parameters


def terms(axis: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """(letter, size) of each block of an axis, in their order; the letter of a number is ""."""
    for term in axis.split("+"):
        letter = term.lstrip("0123456789")
        count = int(term.removesuffix(letter) or 1)
        if letter:
            yield from [(letter, sizes[letter])] * count
        else:
            yield "", count


def letters(case: Case) -> set[str]:
    """Letters of SIZES that the inputs depend on."""
    axes = [axis for given in case.inputs.values() for axis in given.shape]
    return {letter for axis in axes for letter, _ in terms(axis, SIZES)} - {""}


def sizes_of(case: Case, sizes: Mapping[str, int]) -> dict[str, int]:
    """The size of every letter; N is raised to a multiple of the unit, and R follows from it."""
    known = {**SIZES, **case.sizes, **sizes}
    known["N"] = -(-known["N"] // case.unit) * case.unit
    known["R"] = sum(runs(known["N"]))
    return known


def runs(rows: int) -> list[int]:
    """The number of negatives of each of the first rows."""
    return [RUNS[i % len(RUNS)] for i in range(rows)]


def tensors(
    case: Case,
    *,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device | None = None,
    seed: int = 0,
    noise: float = 0.5,
    parts: Sequence[int] | None = None,
    **sizes: int,
) -> dict[str, Tensor]:
    """The tensors of a case as leaves, the same for the same seed, drawn in float64 and rounded.

    `noise`: by how much views differ, in units of their features. `parts`: rows of each rank, N in
    all; permutations then stay within a part.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    if parts is not None:
        sizes["N"] = sum(parts)
    every = sizes_of(case, sizes)
    source = _Source(torch.Generator(device).manual_seed(seed), every, parts or (every["N"],))
    made: dict[str, Tensor] = {}
    for name, given in case.inputs.items():
        match given.kind:
            case "features" | "frozen":
                made[name] = source.normal(given)
            case "queue" | "chunks":
                made[name] = F.normalize(source.normal(given), dim=-1)
            case "view":
                axes = case.inputs[known(given.of)].shape
                broadcast = tuple(slice(None) if axis in axes else None for axis in given.shape)
                made[name] = made[known(given.of)][broadcast] + noise * source.normal(given)
            case "number":
                made[name] = torch.tensor(given.values[0], dtype=torch.float64, device=device)
            case "same":
                made[name] = made[known(given.of)]
            case "ids":
                made[name] = source.ids(given)
            case "mask":
                made[name] = source.mask(given)
            case "counts":
                made[name] = torch.tensor(runs(every["N"]), device=device)
            case "permutations":
                made[name] = source.permutations(given)
            case kind:
                raise ValueError(f"no such kind of input: {kind!r}")
    return {
        name: t.to(dtype).requires_grad_(case.inputs[name].kind in LEARNED)
        if t.is_floating_point()
        else t  # "same" ids stay one tensor
        for name, t in made.items()
    }


class _Source(NamedTuple):
    """Draws what the shape of an input asks for."""

    generator: torch.Generator
    sizes: Mapping[str, int]
    parts: Sequence[int]

    def shape(self, given: Input) -> list[int]:
        return [sum(size for _, size in terms(axis, self.sizes)) for axis in given.shape]

    def normal(self, given: Input) -> Tensor:
        return torch.randn(
            self.shape(given),
            generator=self.generator,
            dtype=torch.float64,
            device=self.generator.device,
        )

    def ids(self, given: Input) -> Tensor:
        blocks = zip(given.values, terms(given.shape[0], self.sizes), strict=True)
        values = [cycle[i % len(cycle)] for cycle, (_, size) in blocks for i in range(size)]
        return torch.tensor(values, device=self.generator.device)

    def mask(self, given: Input) -> Tensor:
        rows, columns = self.shape(given)
        cells = [[MASKS[i % 4][j % 3] for j in range(columns)] for i in range(rows)]
        return torch.tensor(cells, dtype=torch.bool, device=self.generator.device)

    def permutations(self, given: Input) -> Tensor:
        """(count, N), each part's rows among themselves."""
        count, drawn = self.shape(given)[0], []
        for start, size in zip(accumulate(self.parts, initial=0), self.parts, strict=False):
            rows = [
                torch.randperm(size, generator=self.generator, device=self.generator.device)
                for _ in range(count)
            ]
            drawn.append(torch.stack(rows) + start)
        return torch.cat(drawn, 1)


def call(
    function: Callable[..., Any],
    case: Case,
    inputs: Mapping[str, Tensor],
    *,
    whole: bool = False,
    **options: Any,
) -> Any:
    """The function of the inputs, the options of the case and more; `whole`: no chunks."""
    arguments: dict[str, Any] = dict(inputs)
    if "exclude_rows" in arguments:
        arguments["exclude"] = arguments.pop("exclude_rows"), arguments.pop("exclude_columns")
    for name, given in case.inputs.items():
        if given.kind == "chunks" and not whole:
            arguments[name] = arguments[name].split(2)
    return function(**arguments, **{**case.options, **options})


class Shard(NamedTuple):
    """What one rank has: the size of each letter in the whole batch, and its own range of those
    that are split."""

    sizes: Mapping[str, int]
    own: Mapping[str, slice]

    def splits(self, axis: str) -> bool:
        return any(letter in self.own for letter, _ in terms(axis, self.sizes))

    def of(self, given: Input, t: Tensor) -> Tensor:
        """This rank's part of an input of the whole batch, or of its gradient."""
        for dim, axis in enumerate(given.shape):
            if not self.splits(axis):
                continue
            pieces, start = [], 0
            for letter, size in terms(axis, self.sizes):
                block = t.narrow(dim, start, size)
                own = self.own.get(letter, slice(0, size))
                pieces.append(block.narrow(dim, own.start, own.stop - own.start))
                start += size
            t = torch.cat(pieces, dim)
        return t - self.own["N"].start if given.kind == "permutations" else t

    def shared(self, given: Input) -> list[tuple[int, int, int]]:
        """(dim, start, size) of the blocks of this rank's part that every rank has."""
        blocks = []
        for dim, axis in enumerate(given.shape):
            start = 0
            for letter, size in terms(axis, self.sizes):
                own = self.own.get(letter)
                size = size if own is None else own.stop - own.start
                if own is None and self.splits(axis):
                    blocks.append((dim, start, size))
                start += size
        return blocks
