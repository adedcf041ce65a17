"""The losses on several ranks, each beside its paper's definition in one process, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import test_distillation
import test_guided
import test_ranking
import torch
import torch.distributed as dist
from oracles import generator, randn
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference

# rows of each rank: as many of them as there are ranks
SIZES = {"even": (4, 4, 4, 4), "uneven": (5, 2, 6, 3), "empty": (4, 0, 5, 0), "first": (0, 3, 4, 2)}
NEGATIVES = (3, 0, 4, 1)  # of each rank, where they are sharded
WHOLE = ("scale", "logit_scale", "logit_bias", "teacher_logit_scale")
FEW = ("clip_loss", "nt_xent", "siglip_loss", "sup_con views", "cacr", "info_nce sharded", "mnrl")
BITS = (*FEW, "gist sharded", "clip_distill", "intl features")
WITHOUT_EXCHANGE = ("w_mse", "nce", "intl")
GATHER_ONLY = (*WITHOUT_EXCHANGE, "gist", "clip_distill")


def gist(anchor, positive, anchor_guide, positive_guide, negatives, negatives_guide, **options):
    guides = [anchor_guide, positive_guide, negatives_guide]
    return test_guided.definition(anchor, positive, negatives, guides, **options)


def clip_distill(**arguments) -> Tensor:
    short = {k.replace("_features", "").replace("logit_", ""): v for k, v in arguments.items()}
    return test_distillation.definition(**short)


# in one process, of losses whose definitions are not in `reference`
DEFINITIONS = {"mnrl": test_ranking.definition, "gist": gist, "clip_distill": clip_distill}


class Case(NamedTuple):
    """A loss, the tensors of the whole batch by name, for (rows, negatives), and its options."""

    loss: str
    tensors: Callable[[int, int], dict[str, Tensor]]
    options: dict
    unit: int = 1  # group sizes are multiples of it
    rows: bool = True

    @property
    def exchanges(self) -> tuple[str, ...]:
        return ("gather",) if self.loss in GATHER_ONLY else ("gather", "ring")

    @property
    def has_stats(self) -> bool:
        return self.loss != "clip_distill"

    def run(self, module, tensors: dict[str, Tensor], **extra):
        tensors = dict(tensors)
        if "exclude_rows" in tensors:
            tensors["exclude"] = (tensors.pop("exclude_rows"), tensors.pop("exclude_columns"))
        options = {**self.options, **extra}
        chunked = options.pop("chunked", False)
        if "group" not in options:
            options.pop("sharded_negatives", None)
        elif chunked:
            tensors["negatives"] = tensors["negatives"].split(2)
        if module is reference and self.loss in DEFINITIONS:
            return DEFINITIONS[self.loss](**tensors, **options)
        return getattr(module, self.loss)(**tensors, **options)


def pair(first: str, second: str, **others: Callable[[int, int], Tensor]):
    def make(n: int, m: int) -> dict[str, Tensor]:
        x = randn(n, 5, seed=1)
        y = x + 0.5 * randn(n, 5, seed=2)
        return {first: x, second: y, **{name: other(n, m) for name, other in others.items()}}

    return make


def number(value: float):
    return lambda n, m: torch.tensor(value, dtype=torch.float64)


def noise(*shape: str, seed: int):
    sizes = {"n": lambda n, m: n, "2n": lambda n, m: 2 * n, "3n": lambda n, m: 3 * n,
             "m": lambda n, m: m, "n+m": lambda n, m: n + m, "3": lambda n, m: 3,
             "5": lambda n, m: 5}  # fmt: skip
    return lambda n, m: randn(*(sizes[s](n, m) for s in shape), seed=seed)


def ids(size: str, seed: int):
    def make(n: int, m: int) -> Tensor:
        count = n + m if size == "n+m" else n
        return torch.randint(0, 5, (count,), generator=generator(seed))

    return make


def same_ids(n: int, m: int) -> dict[str, Tensor]:
    tensors = info(n, m)
    tensors["exclude_rows"] = tensors["exclude_columns"] = ids("n", 7)(n, m)
    return tensors


def block_permutations(sizes: tuple[int, ...]) -> list[Tensor]:
    """Two permutations of each rank's samples."""
    return [
        torch.stack([torch.randperm(size, generator=generator(7 * rank + i)) for i in range(2)])
        for rank, size in enumerate(sizes)
    ]


info = pair("query", "key")
views = pair("z1", "z2")
labelled = {"labels": ids("n", 5)}
guides = {
    "anchor_guide": noise("n", "3", seed=3), "positive_guide": noise("n", "3", seed=4),
    "negatives": noise("m", "5", seed=5), "negatives_guide": noise("m", "3", seed=6),
}  # fmt: skip
clip = partial(pair, "image_features", "text_features", logit_scale=number(9.0))
CASES = {
    "info_nce": Case("info_nce", info, {}),
    "info_nce scale": Case(
        "info_nce", pair("query", "key", scale=number(3.0)), {"symmetric": True}
    ),
    "info_nce bias": Case(
        "info_nce", pair("query", "key", key_bias=noise("n", seed=3)), {"symmetric": True}
    ),
    "info_nce same ids": Case("info_nce", same_ids, {"symmetric": True, "alpha": 9.0}),
    "info_nce other ids": Case(
        "info_nce",
        pair("query", "key", exclude_rows=ids("n", 7), exclude_columns=ids("n", 8)),
        {"symmetric": True, "alpha": 20.0},
    ),
    "info_nce queue": Case(
        "info_nce", pair("query", "key", negatives=noise("m", "5", seed=3)), {}
    ),
    "info_nce chunks": Case(
        "info_nce", pair("query", "key", negatives=noise("m", "5", seed=3)), {"chunked": True}
    ),
    "info_nce own": Case(
        "info_nce",
        pair("query", "key", negatives=noise("n", "3", "5", seed=3), key_bias=noise("3", seed=4)),
        {},
    ),
    "info_nce both": Case(
        "info_nce",
        pair("query", "key", negatives=noise("m", "5", seed=3), key_bias=noise("n+m", seed=4)),
        {"in_batch": True, "alpha": 30.0},
    ),
    "info_nce sharded": Case(
        "info_nce",
        pair(
            "query", "key", negatives=noise("m", "5", seed=3), key_bias=noise("n+m", seed=4),
            exclude_rows=ids("n", 7), exclude_columns=ids("n+m", 8),
        ),
        {"in_batch": True, "sharded_negatives": True, "alpha": 30.0},
    ),
    "eqco": Case(
        "eqco",
        pair("query", "key", negatives=noise("m", "5", seed=3)),
        {"sharded_negatives": True, "alpha": 64.0},
    ),
    "clip_loss": Case("clip_loss", clip(), {}),
    "siglip_loss": Case("siglip_loss", clip(logit_bias=number(-4.0)), {}),
    "nt_xent": Case("nt_xent", views, {}),
    "nt_xent scale": Case("nt_xent", pair("z1", "z2", scale=number(3.0)), {}),
    "dcl": Case("dcl", views, {}),
    "dcl sigma": Case("dcl", pair("z1", "z2", scale=number(3.0)), {"sigma": 0.5}),
    "dcl weight": Case("dcl", pair("z1", "z2", weight=noise("2n", seed=3)), {}),
    "debiased": Case("debiased", views, {}),
    "hcl": Case("hcl", views, {}),
    "sup_con": Case("sup_con", lambda n, m: {
        "features": randn(n, 5, seed=1), "labels": ids("n", 5)(n, m)}, {}),
    "sup_con views": Case("sup_con", lambda n, m: {
        "features": randn(n, 2, 5, seed=1), "labels": ids("n", 5)(n, m)},
        {"base_temperature": 0.1}),
    "cacr": Case("cacr", lambda n, m: {
        "query": randn(n, 5, seed=1), "positives": randn(n, 3, 5, seed=2)}, {}),
    "cacr one positive": Case("cacr", pair("query", "positives"), {}),
    "cacr on the plane": Case("cacr", pair("query", "positives"), {"normalize": False}),
    "cacr queue": Case(
        "cacr", pair("query", "positives", negatives=noise("m", "5", seed=3)), {"alpha": 0.5}
    ),
    "cacr sharded": Case(
        "cacr",
        pair("query", "positives", negatives=noise("m", "5", seed=3)),
        {"sharded_negatives": True},
    ),
    "cacr chunks": Case(
        "cacr", pair("query", "positives", negatives=noise("m", "5", seed=3)), {"chunked": True}
    ),
    "cacr rbf": Case("cacr", pair("query", "positives"), {"cost": "rbf"}, rows=False),
    "cacr_views": Case("cacr_views", lambda n, m: {"views": randn(3, n, 5)}, {}),
    "cacr_views detached": Case(
        "cacr_views", lambda n, m: {"views": randn(3, n, 5)}, {"detach_weights": True}
    ),
    "cct": Case("cct", pair("query", "positives"), {"t_pos": 2.0, "t_neg": 0.9}),
    "mnrl": Case(
        "mnrl",
        lambda n, m: {"query": randn(n, 5, seed=1), "documents": randn(2 * n, 5, seed=2),
                      "scale": number(3.0)(n, m)},
        {"directions": test_ranking.ALL},
    ),
    "mnrl pairs": Case("mnrl", pair("query", "documents"), {"directions": test_ranking.ALL}),
    "mnrl per direction": Case(
        "mnrl",
        lambda n, m: {"query": randn(n, 5, seed=1), "documents": randn(3 * n, 5, seed=2)},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction",
         "hardness_mode": "hard_negatives", "hardness_strength": 5.0, "scale": 4.0},
    ),
    "mnrl harder": Case(
        "mnrl",
        lambda n, m: {"query": randn(n, 5, seed=1), "documents": randn(3 * n, 5, seed=2),
                      "scale": number(3.0)(n, m)},
        {"directions": test_ranking.ALL, "hardness_mode": "all_negatives",
         "hardness_strength": 5.0},
    ),
    "gist": Case(
        "gist", pair("anchor", "positive", scale=number(5.0), **guides), {"margin": 0.2}
    ),
    "gist sharded": Case(
        "gist",
        pair("anchor", "positive", **guides),
        {"temperature": 0.2, "margin_strategy": "relative", "margin": -0.1,
         "sharded_negatives": True},
    ),
    "clip_distill": Case(
        "clip_distill",
        clip(
            teacher_image_features=noise("n", "3", seed=3),
            teacher_text_features=noise("n", "3", seed=4), teacher_logit_scale=number(5.0),
        ),
        {},
    ),
    "nce": Case(
        "nce", pair("query", "key", negatives=noise("m", "5", seed=3)),
        {"num_data": 100, "temperature": 0.5},
    ),
    "nce own": Case(
        "nce", pair("query", "key", negatives=noise("n", "3", "5", seed=3)),
        {"num_data": 50, "Z": 7.0},
    ),
    "intl": Case("intl", lambda n, m: {"views": randn(3, n, 3)}, {"lam": 0.1}),
    "intl of many features": Case("intl", lambda n, m: {"views": randn(3, n, 20)}, {}),
    "intl features": Case("intl", lambda n, m: {"views": randn(3, n, 5)}, {"axis": 1, "lam": 0.1}),
    "w_mse": Case("w_mse", lambda n, m: {"views": randn(3, n, 3)}, {"group_size": 6}, unit=6),
}  # fmt: skip


NONE = torch.empty(0)


class Part(NamedTuple):
    """The part of the whole batch that this rank has."""

    sizes: tuple[int, ...]
    negatives: tuple[int, ...]
    rank: int
    sharded: bool  # negatives are
    own: bool  # each row has negatives of its own

    @property
    def rows(self) -> slice:
        return _range(self.sizes, self.rank)

    def of(self, name: str, t: Tensor) -> Tensor:
        n, more = sum(self.sizes), _range(self.negatives, self.rank)
        if name in WHOLE or (self.own and name == "key_bias"):
            return t
        if name == "documents":
            return t.view(-1, n, *t.shape[1:])[:, self.rows].flatten(0, 1)
        if name in ("negatives", "negatives_guide") and not self.own:
            return t[more] if self.sharded else t
        if name == "views":
            return t[:, self.rows]
        if name == "weight":
            return t.view(2, n)[:, self.rows].flatten()
        if name in ("exclude_columns", "key_bias"):
            return torch.cat((t[:n][self.rows], t[n:][more] if self.sharded else t[n:]))
        return t[self.rows]

    def of_rows(self, loss: str, t: Tensor) -> Tensor:
        """Losses or statistics of the rows of the whole batch."""
        n = sum(self.sizes)
        if loss == "sup_con":
            return t.view(n, -1)[self.rows].reshape(-1, *t.shape[1:])
        return t.view(-1, n)[:, self.rows].flatten()


def _range(sizes: tuple[int, ...], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


class Setup(NamedTuple):
    """One call: a case on these sizes."""

    name: str
    sizes: str
    exchange: str
    reduction: str

    def prepare(self) -> tuple[Case, dict, dict, Part, dict, dict]:
        """(case, whole batch, this rank's, Part, options of one process, options of the rank)"""
        case, world, rank = CASES[self.name], dist.get_world_size(), dist.get_rank()
        sizes = tuple(case.unit * size for size in SIZES[self.sizes][:world])
        sharded = case.options.get("sharded_negatives", False)
        negatives = NEGATIVES[:world]
        whole = case.tensors(sum(sizes), sum(negatives))
        part = Part(sizes, negatives, rank, sharded, whole.get("negatives", NONE).dim() == 3)
        frozen = ("negatives",) if case.options.get("chunked") else ()
        for name, t in whole.items():
            floats = t.is_floating_point() and not name.endswith("_guide")
            t.requires_grad_(floats and name not in frozen)
        mine = {k: part.of(k, t).detach().requires_grad_(t.requires_grad) for k, t in whole.items()}
        if "exclude_rows" in whole and whole["exclude_rows"] is whole["exclude_columns"]:
            mine["exclude_columns"] = mine["exclude_rows"]
        one = {"reduction": self.reduction}
        each = {**one, "group": dist.group.WORLD}
        if case.loss == "w_mse":
            drawn = block_permutations(sizes)
            starts = [sum(sizes[:i]) for i in range(world)]
            joined = [p + start for p, start in zip(drawn, starts, strict=True)]
            one["permutations"] = torch.cat(joined, 1)
            each["permutations"] = drawn[rank]
        elif case.loss not in WITHOUT_EXCHANGE:
            each["exchange"] = self.exchange
        return case, whole, mine, part, one, each


def setups(name: str) -> Iterator[Setup]:
    ring = CASES[name].exchanges[-1]
    pairs = [("even", "gather"), ("empty", "gather"), ("uneven", ring), ("first", ring)]
    if name in FEW:
        pairs += [("even", ring), ("empty", ring)]
    for sizes, exchange in pairs:
        if sum(SIZES[sizes][: dist.get_world_size()]) >= 2:
            yield Setup(name, sizes, exchange, "mean")
    if CASES[name].rows:
        yield Setup(name, "uneven", "gather", "sum")
        yield Setup(name, "uneven", ring, "none")


def compare(setup: Setup) -> dict[str, tuple[float, float, float]]:
    """For the loss, and the gradient of each input after DDP's mean over the ranks: the largest
    error of this rank's part, its <gradient, expected> and its <expected, expected>."""
    case, whole, mine, part, one, each = setup.prepare()
    world = dist.get_world_size()
    wanted = case.run(reference, whole, **one)
    got = case.run(ck, mine, **each)
    if setup.reduction == "none":
        report = {"loss": _compare(got, part.of_rows(case.loss, wanted.flatten()).view_as(got))}
        # rows have the gradients of rows: the mean that one process takes is made here
        wanted, got = wanted.mean(), got.sum() * world / wanted.numel()
    else:
        report = {"loss": _compare(got, wanted)}
    names = [name for name, t in whole.items() if t.requires_grad]
    expected = torch.autograd.grad(wanted, [whole[name] for name in names])
    found = torch.autograd.grad(got, [mine[name] for name in names])
    for name, g, e in zip(names, found, expected, strict=True):
        e, shared = part.of(name, e), e.shape == mine[name].shape and part.of(name, e) is e
        g = g.clone()
        if shared:  # a parameter: DDP averages its gradient
            dist.all_reduce(g)
        elif name == "key_bias" and not part.sharded:  # its last entries are shared
            rows = part.sizes[part.rank]
            more = g[rows:].clone()
            dist.all_reduce(more)
            g = torch.cat((g[:rows], more))
        report[name] = _compare(g / world, e)
    return report


def compare_statistics(setup: Setup) -> dict[str, float]:
    """Largest error of each of the statistics, against those of one process."""
    case, whole, mine, part, one, each = setup.prepare()
    wanted = case.run(ck, whole, return_stats=True, **one)[1]
    got = case.run(ck, mine, return_stats=True, **each)[1]
    report = {}
    for field, a, b in zip(wanted._fields, got, wanted, strict=True):
        assert (a is None) == (b is None), field
        if b is not None:
            report[field] = _compare(a, part.of_rows(case.loss, b) if b.dim() else b)[0]
    return report


def compare_dtype(setup: Setup, dtype: torch.dtype) -> dict[str, float]:
    """Largest error of the loss and of each gradient, relative to the largest entry, of features
    in `dtype` against float64 of the same, already rounded numbers."""

    def rounded(t: Tensor) -> Tensor:
        features = t.is_floating_point() and t.dim() > 1
        return t.detach().to(dtype).requires_grad_() if features else t

    case, whole, _, part, one, each = setup.prepare()
    whole = {name: rounded(t) for name, t in whole.items()}
    exact = {k: t.detach().double().requires_grad_(t.requires_grad)
             if t.is_floating_point() else t for k, t in whole.items()}  # fmt: skip
    mine = {k: part.of(k, t).detach().requires_grad_(t.requires_grad) for k, t in whole.items()}
    names = [k for k, t in mine.items() if t.requires_grad and t.dim() > 1]
    wanted, got = case.run(reference, exact, **one), case.run(ck, mine, **each)
    expected = torch.autograd.grad(wanted, [exact[name] for name in names])
    found = torch.autograd.grad(got, [mine[name] for name in names])
    report = {"loss": _compare(got, wanted)[0] / wanted.abs().item()}
    for name, g, e in zip(names, found, expected, strict=True):
        assert g.dtype == dtype
        error = _compare(g.double() / dist.get_world_size(), part.of(name, e))[0]
        report[name] = error / e.abs().max().item()
    return report


def compare_autocast(setup: Setup) -> dict[str, float]:
    """Largest error of the loss and of each gradient, relative to the largest entry, of float32
    features on Triton under autocast to bfloat16, against one process under the same."""

    def single(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point()
                else t for k, t in tensors.items()}  # fmt: skip

    case, whole, mine, part, one, each = setup.prepare()
    whole, mine = single(whole), single(mine)
    names = [k for k, t in mine.items() if t.requires_grad and t.dim() > 1]
    with torch.autocast("cpu", torch.bfloat16):
        wanted = case.run(ck, whole, **one, backend="triton")
        got = case.run(ck, mine, **each, backend="triton")
    expected = torch.autograd.grad(wanted, [whole[name] for name in names])
    found = torch.autograd.grad(got, [mine[name] for name in names])
    report = {"loss": _compare(got, wanted)[0] / wanted.abs().item()}
    for name, g, e in zip(names, found, expected, strict=True):
        error = _compare(g / dist.get_world_size(), part.of(name, e))[0]
        report[name] = error / e.abs().max().item()
    return report


def same_bits(setup: Setup) -> bool:
    """Whether two runs agree to the last bit, and ranks about the value of the loss."""

    def once() -> list[Tensor]:
        case, _, mine, _, _, each = setup.prepare()
        loss = case.run(ck, mine, **each)
        inputs = [t for t in mine.values() if t.requires_grad]
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
    cases = [("clip_loss", "gather"), ("siglip_loss", "ring"), ("sup_con views", "ring"),
             ("cacr", "gather"), ("cacr", "ring")]  # fmt: skip
    setups = [Setup(name, "uneven", exchange, "mean") for name, exchange in cases]
    return {setup: compare_autocast(setup) for setup in setups}


def everything() -> dict:
    """All that one start of the processes computes."""
    report: dict = {"losses": {}, "statistics": {}, "bits": {}, "dtypes": {}}
    for name in CASES:
        for setup in setups(name):
            report["losses"][setup] = compare(setup)
        exchanges = CASES[name].exchanges
        for sizes, exchange in (("uneven", exchanges[-1]), ("empty", exchanges[0])):
            setup = Setup(name, sizes, exchange, "mean")
            if CASES[name].has_stats:
                report["statistics"][setup] = compare_statistics(setup)
        if name in BITS:
            for exchange in exchanges:
                setup = Setup(name, "uneven", exchange, "mean")
                report["bits"][setup] = same_bits(setup)
                if name not in FEW:
                    continue
                # where several terms are added in the type of the features, one process rounds too
                for dtype in (torch.float32, torch.bfloat16)[: 1 if "sharded" in name else 2]:
                    report["dtypes"][setup, dtype] = compare_dtype(setup, dtype)
    return report
