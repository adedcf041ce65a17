"""Losses on this rank beside one process on the whole batch: errors that a test can judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import interpreted
import torch
import torch.distributed as dist
from torch import Tensor

from contrastive_kernels.losses import table
from contrastive_kernels.losses.cases import (
    Case,
    Row,
    Shard,
    call,
    runs,
    sizes_of,
    tensors,
    terms,
)

# rows of each rank: as many of them as there are ranks
SIZES = {"even": (4, 4, 4, 4), "uneven": (5, 2, 6, 3), "empty": (4, 0, 5, 0), "first": (0, 3, 4, 2)}
NEGATIVES = (3, 0, 4, 1)  # of each rank, where they are sharded
FEW = ("clip_loss", "nt_xent", "siglip_loss", "sup_con views", "cacr", "info_nce sharded", "mnrl")
CASES = {
    name: (row, case)
    for name, (row, case) in table.CASES.items()
    if case.grouped and row.takes("group")
}
FIRST = {next(iter(row.cases)) for row, _ in CASES.values()}
BITS = [name for name in CASES if name in {*FIRST, *FEW, "gist sharded", "intl features"}]


def exchanges(name: str) -> tuple[str, ...]:
    return CASES[name][0].exchanges or ("gather",)


class Expected(NamedTuple):
    """What the definition gives for the whole batch: the loss, and the gradients of its mean."""

    value: Tensor
    gradients: dict[str, Tensor]


class Comparison(NamedTuple):
    """A case as one process has it, `whole`, and as this rank does, `mine`."""

    row: Row
    case: Case
    shard: Shard
    whole: dict[str, Tensor]
    mine: dict[str, Tensor]
    reduction: str
    exchange: str

    def part(self, name: str, t: Tensor) -> Tensor:
        return self.shard.of(self.case.inputs[name], t)

    def of_rows(self, t: Tensor) -> Tensor:
        """This rank's losses or statistics of rows, flat, out of those of the whole batch."""
        blocks = len(list(terms(self.row.rows, self.shard.sizes)))
        return t.reshape(blocks, self.shard.sizes["N"], -1)[:, self.shard.own["N"]].flatten()

    def definition(self, whole: dict[str, Tensor]) -> Tensor:
        function = table.definition(self.row)
        return call(function, self.case, whole, whole=True, reduction=self.reduction)

    def expected(self) -> Expected:
        value = self.definition(self.whole)
        names = [name for name, t in self.whole.items() if t.requires_grad]
        leaves = [self.whole[name] for name in names]
        # rows have the gradients of rows: the mean that one process takes is made here
        mean = value.mean() if self.reduction == "none" else value
        gradients = torch.autograd.grad(mean, leaves)
        return Expected(value.detach(), dict(zip(names, gradients, strict=True)))

    def one(self, whole: dict[str, Tensor], **options):
        """The loss in one process."""
        return call(self.row.function, self.case, whole, reduction=self.reduction, **options)

    def each(self, mine: dict[str, Tensor], **options):
        """The loss on the ranks."""
        options |= {"reduction": self.reduction, "group": dist.group.WORLD}
        if self.case.sharded:
            options["sharded_negatives"] = True
        if self.row.exchanges:
            options["exchange"] = self.exchange
        return call(self.row.function, self.case, mine, **options)

    def split(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of the whole batch, as leaves."""
        mine: dict[str, Tensor] = {}
        for name, t in whole.items():
            given = self.case.inputs[name]
            part = mine[given.of] if given.kind == "same" else self.part(name, t).detach()
            mine[name] = part.requires_grad_(t.requires_grad)
        return mine

    def of_one(self, name: str, gradient: Tensor) -> Tensor:
        """A rank's gradient as that of one process: after the mean of DDP over the ranks for what
        every rank has."""
        given, gradient = self.case.inputs[name], gradient.clone()
        if not any(map(self.shard.splits, given.shape)):
            dist.all_reduce(gradient)
        for dim, start, size in self.shard.shared(given):
            block = gradient.narrow(dim, start, size)
            total = block.contiguous()
            dist.all_reduce(total)
            block.copy_(total)
        return gradient / dist.get_world_size()


class Setup(NamedTuple):
    """One call: a case on these sizes."""

    name: str
    sizes: str
    exchange: str
    reduction: str

    def prepare(self) -> Comparison:
        return self.of_rank(dist.get_world_size(), dist.get_rank())

    def of_rank(self, world: int, rank: int) -> Comparison:
        row, case = CASES[self.name]
        rows = tuple(case.unit * size for size in SIZES[self.sizes][:world])
        own = {"N": _range(rows, rank)}
        own["R"] = slice(sum(runs(own["N"].start)), sum(runs(own["N"].stop)))
        if case.sharded:
            own["M"] = _range(NEGATIVES[:world], rank)
        known = sizes_of(case, {"N": sum(rows), "M": sum(NEGATIVES[:world])})
        whole = tensors(case, parts=rows, M=known["M"])
        made = Comparison(row, case, Shard(known, own), whole, {}, self.reduction, self.exchange)
        return made._replace(mine=made.split(whole))

    def expected(self, world: int) -> Expected:
        """Does not depend on how ranks exchange their features."""
        return _expected(self._replace(exchange="gather"), world)


def _range(sizes: tuple[int, ...], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


@cache
def _expected(setup: Setup, world: int) -> Expected:
    return setup.of_rank(world, 0).expected()


def define(world: int) -> None:
    """What all ranks compare with, once: they are forked from the process that this runs in."""
    if not torch.cuda.is_available():  # a process that has differentiated there cannot be forked
        for name in CASES:
            for setup in setups(name, world):
                setup.expected(world)


def setups(name: str, world: int) -> list[Setup]:
    """What this number of ranks runs of a case."""
    return share(name, list(every_setup(name, world)), world)


def share(name: str, settings: Sequence[Any], world: int) -> list[Any]:
    """One rank, three and four have a third of a case's settings each, but all of a few cases; two
    ranks have all of all."""
    if world == 2 or name in FEW:
        return list(settings)
    place = list(CASES).index(name) + world
    return [setting for i, setting in enumerate(settings) if (i + place) % 3 == 0]


def every_setup(name: str, world: int) -> Iterator[Setup]:
    ring = exchanges(name)[-1]
    pairs = [("even", "gather"), ("empty", "gather"), ("uneven", ring), ("first", ring)]
    if name in FEW:
        pairs += [("even", ring), ("empty", ring)]
    for sizes, exchange in pairs:
        if sum(SIZES[sizes][:world]) >= 2:
            yield Setup(name, sizes, exchange, "mean")
    if not CASES[name][1].coupled:
        yield Setup(name, "uneven", "gather", "sum")
        yield Setup(name, "uneven", ring, "none")


def compare(setup: Setup) -> dict[str, tuple[float, float, float]]:
    """For the loss, and the gradient of each input after DDP's mean over the ranks: the largest
    error of this rank's part, its <gradient, expected> and its <expected, expected>."""
    made, world = setup.prepare(), dist.get_world_size()
    wanted, expected = setup.expected(world)
    got = made.each(made.mine)
    if setup.reduction == "none":
        report = {"loss": _compare(got, made.of_rows(wanted).view_as(got))}
        got = got.sum() * world / wanted.numel()
    else:
        report = {"loss": _compare(got, wanted)}
    found = torch.autograd.grad(got, [made.mine[name] for name in expected])
    for g, (name, e) in zip(found, expected.items(), strict=True):
        report[name] = _compare(made.of_one(name, g), made.part(name, e))
    return report


def compare_statistics(setup: Setup) -> dict[str, float]:
    """Largest error of each of the statistics, against those of one process."""
    made = setup.prepare()
    wanted = made.one(made.whole, return_stats=True)[1]
    got = made.each(made.mine, return_stats=True)[1]
    report = {}
    for field, a, b in zip(wanted._fields, got, wanted, strict=True):
        assert (a is None) == (b is None), field
        if b is not None:
            report[field] = _compare(a, made.of_rows(b) if b.dim() else b)[0]
    return report


def compare_dtype(setup: Setup, dtype: torch.dtype) -> dict[str, float]:
    """Largest error of the loss and of each gradient, relative to the largest entry, of features
    in `dtype` against float64 of the same, already rounded numbers."""

    def rounded(t: Tensor) -> Tensor:
        features = t.is_floating_point() and t.dim() > 1
        return t.detach().to(dtype).requires_grad_(t.requires_grad) if features else t

    made = setup.prepare()
    whole = {name: rounded(t) for name, t in made.whole.items()}
    exact = {k: t.detach().double().requires_grad_(t.requires_grad)
             if t.is_floating_point() else t for k, t in whole.items()}  # fmt: skip
    mine = made.split(whole)
    names = [k for k, t in mine.items() if t.requires_grad and t.dim() > 1]
    wanted, got = made.definition(exact), made.each(mine)
    expected = torch.autograd.grad(wanted, [exact[name] for name in names])
    found = torch.autograd.grad(got, [mine[name] for name in names])
    report = {"loss": _compare(got, wanted)[0] / wanted.abs().item()}
    for name, g, e in zip(names, found, expected, strict=True):
        assert g.dtype == dtype
        error = _compare(g.double() / dist.get_world_size(), made.part(name, e))[0]
        report[name] = error / e.abs().max().item()
    return report


def _single(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in tensors.items()
    }


def compare_autocast(setup: Setup) -> dict[str, float]:
    """Largest error of the loss and of each gradient, relative to the largest entry, of float32
    features on Triton under autocast to bfloat16, against one process under the same."""

    made = setup.prepare()
    whole, mine = _single(made.whole), _single(made.mine)
    names = [k for k, t in mine.items() if t.requires_grad and t.dim() > 1]
    with torch.autocast("cpu", torch.bfloat16):
        wanted = made.one(whole, backend="triton")
        got = made.each(mine, backend="triton")
    expected = torch.autograd.grad(wanted, [whole[name] for name in names])
    found = torch.autograd.grad(got, [mine[name] for name in names])
    report = {"loss": _compare(got, wanted)[0] / wanted.abs().item()}
    for name, g, e in zip(names, found, expected, strict=True):
        error = _compare(g / dist.get_world_size(), made.part(name, e))[0]
        report[name] = error / e.abs().max().item()
    return report


def same_bits(setup: Setup) -> bool:
    """Whether two runs agree to the last bit, and ranks about the value of the loss."""

    def once() -> list[Tensor]:
        made = setup.prepare()
        loss = made.each(made.mine)
        inputs = [t for t in made.mine.values() if t.requires_grad]
        return [loss, *torch.autograd.grad(loss, inputs)]

    first, second = once(), once()
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, first[0].item())
    equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return equal and len(set(values)) == 1


def _compare(got: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    got, wanted = got.detach().double(), wanted.detach().double()
    error = (got - wanted).abs().where(~(got.isnan() & wanted.isnan()), 0.0)  # no such pair: nan
    error = error.max().item() if got.numel() else 0.0
    return error, (got * wanted).sum().item(), wanted.square().sum().item()


def under_autocast() -> dict:
    """The errors of a few cases, which take seconds each in Triton's interpreter."""
    interpreted.prepare_once()
    cases = [("clip_loss", "gather"), ("siglip_loss", "ring"), ("sup_con views", "ring"),
             ("cacr", "gather"), ("cacr", "ring")]  # fmt: skip
    setups = [Setup(name, "uneven", exchange, "mean") for name, exchange in cases]
    return {setup: compare_autocast(setup) for setup in setups}


def reference_under_autocast() -> dict[Setup, bool]:
    """Whether the reference, of float32 features, gives equal bits within a region of autocast."""
    report = {}
    for name in FIRST:
        for exchange in exchanges(name):
            setup = Setup(name, "uneven", exchange, "mean")
            made = setup.prepare()
            mine = _single(made.mine)
            leaves = [t for t in mine.values() if t.requires_grad]
            results = []
            for enabled in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    loss = made.each(mine, backend="reference")
                results.append([loss, *torch.autograd.grad(loss, leaves)])
            report[setup] = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return report


def everything() -> dict:
    """All that one start of the processes computes."""
    report: dict = {"losses": {}, "statistics": {}, "bits": {}, "dtypes": {}}
    for name in CASES:
        for setup in setups(name, dist.get_world_size()):
            report["losses"][setup] = compare(setup)
        ways = exchanges(name)
        if CASES[name][0].takes("return_stats"):
            pairs = (("uneven", ways[-1]), ("empty", ways[0]))
            every = [Setup(name, sizes, exchange, "mean") for sizes, exchange in pairs]
            for setup in share(name, every, dist.get_world_size()):
                report["statistics"][setup] = compare_statistics(setup)
        if name in BITS:
            every = [Setup(name, "uneven", exchange, "mean") for exchange in ways]
            for setup in share(name, every, dist.get_world_size()):
                report["bits"][setup] = same_bits(setup)
                if name not in FEW:
                    continue
                # where several terms are added in the type of the features, one process rounds too
                for dtype in (torch.float32, torch.bfloat16)[: 1 if "sharded" in name else 2]:
                    report["dtypes"][setup, dtype] = compare_dtype(setup, dtype)
    return report
