"""The nearest keys of a rank's queries among those of all ranks, beside one process."""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import gloo
import pytest
import torch
import torch.distributed as dist
from oracles import BACKENDS, randn

import contrastive_kernels as ck

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
WORLD, DIM = 3, 5
QUERIES, KEYS = (4, 0, 5), (6, 9, 0)

NAMES = [name for name in ("reference", "cpu") if name in BACKENDS]


def part(t, sizes, rank):
    start = list(accumulate(sizes, initial=0))[rank]
    return t[start : start + sizes[rank]]


def whole() -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Queries, keys of which some are the same, and options."""
    x, y = randn(sum(QUERIES), DIM), randn(sum(KEYS), DIM, seed=1)
    y[7:11] = y[:4]
    ids = torch.arange(sum(QUERIES)) % 3, torch.arange(sum(KEYS)) % 5
    return x, y, {"exclude": ids, "threshold": 0.5 + 0.1 * randn(len(x), seed=2)}


def errors(k: int, backend: str, options: tuple[str, ...], chunks: bool = False) -> dict:
    """Whether ids are equal; the errors of values and gradients. Keys in chunks have no gradient,
    and some on every rank."""
    rank, key_sizes = dist.get_rank(), (6, 5, 4) if chunks else KEYS
    x, y, every = whole()
    every = {name: every[name] for name in options}
    mine = dict(every)
    if "exclude" in mine:
        mine["exclude"] = tuple(
            part(t, sizes, rank)
            for t, sizes in zip(mine["exclude"], (QUERIES, key_sizes), strict=True)
        )
    if "threshold" in mine:
        mine["threshold"] = part(mine["threshold"], QUERIES, rank)
    x.requires_grad_(), y.requires_grad_(not chunks)
    wanted = ck.top_k(x, y, k, backend=backend, **every)
    upstream = randn(len(x), k, seed=3)
    there = torch.where(wanted.ids < 0, 0.0, wanted.values)
    grads = torch.autograd.grad(there, [t for t in (x, y) if t.requires_grad], upstream)
    own = [part(t.detach(), sizes, rank) for t, sizes in ((x, QUERIES), (y, key_sizes))]
    own = [own[0].clone().requires_grad_(), own[1].clone().requires_grad_(not chunks)]
    keys = [own[1][:2], own[1][2:]] if chunks else own[1]
    found = ck.top_k(own[0], keys, k, group="world", backend=backend, **mine)
    there = torch.where(found.ids < 0, 0.0, found.values)
    leaves = [t for t in own if t.requires_grad]
    got = torch.autograd.grad(there, leaves, part(upstream, QUERIES, rank))
    expected = [part(t, sizes, rank) for t, sizes in zip(grads, (QUERIES, key_sizes), strict=False)]
    pairs = [(found.values, part(wanted.values, QUERIES, rank)), *zip(got, expected, strict=True)]
    return {
        "ids": torch.equal(found.ids, part(wanted.ids, QUERIES, rank)),
        "errors": [float((a - b).nan_to_num(0, 0, 0).abs().sum()) for a, b in pairs],
    }


def mined(backend: str, keep: bool) -> dict:
    """Whether hard negatives are those of one process; positives may be other ranks' keys."""
    rank, (x, y, every) = dist.get_rank(), whole()
    y[12] = torch.nan
    positives = torch.stack((torch.arange(len(x)), torch.arange(len(x)) - 4), 1).clamp(min=-1)
    options = {"num_negatives": 4, "relative_margin": -0.5, "range_min": 1, "backend": backend}
    ids = {} if keep else {"exclude": every["exclude"]}
    wanted = ck.hard_negatives(x, y, positives, **options, **ids)
    sizes = (QUERIES, KEYS)
    own = {name: tuple(map(part, pair, sizes, [rank] * 2)) for name, pair in ids.items()}
    found = ck.hard_negatives(
        part(x, QUERIES, rank), part(y, KEYS, rank), part(positives, QUERIES, rank),
        group="world", generator=torch.Generator(), **options, **own,
    )  # fmt: skip
    return {
        name: torch.allclose(a, part(b, QUERIES, rank), rtol=1e-12, equal_nan=True)
        for name, a, b in zip(found._fields, found, wanted, strict=True)
    } | {"some": bool((wanted.ids >= 0).any() and (wanted.ids < 0).any())}


def refused() -> list[str]:
    """What is said of an argument that differs, of no keys at all, and of an id on one rank."""
    x, y, _ = whole()
    said = []
    strange = torch.full((len(x),), 3 * len(y) - 1 + (dist.get_rank() == 1))
    for call in (
        lambda: ck.top_k(x, y, 1 + dist.get_rank(), group="world"),
        lambda: ck.top_k(x, y[:0], 2, group="world"),
        lambda: ck.hard_negatives(x, y, strange, group="world"),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def everything() -> dict:
    runs = {
        (k, backend, options, chunks): errors(k, backend, options, chunks)
        for backend in NAMES
        for k, options in ((3, ()), (20, ("exclude",)), (2, ("exclude", "threshold")))
        for chunks in (False, True)
    }
    negatives = [mined(backend, keep) for backend in NAMES for keep in (False, True)]
    return {"runs": runs, "refused": refused(), "mined": negatives}


@cache
def results() -> list[dict]:
    return gloo.run(WORLD, everything)


def test_what_ranks_find_is_what_one_process_finds():
    for rank, report in enumerate(results()):
        assert len(report["runs"]) == 6 * len(NAMES)
        for setup, outcome in report["runs"].items():
            assert outcome["ids"], (rank, setup)
            assert len(outcome["errors"]) == (2 if setup[-1] else 3)
            assert max(outcome["errors"]) < 1e-11, (rank, setup)


def test_hard_negatives_are_those_of_one_process():
    for rank, report in enumerate(results()):
        assert len(report["mined"]) == 2 * len(NAMES)
        for outcome in report["mined"]:
            assert all(outcome.values()), (rank, outcome)


def test_what_does_not_fit_is_said_on_every_rank():
    for report in results():
        differing, nothing, strange = report["refused"]
        assert strange == "positives must be ids of the 45 keys, or -1"
        assert "k must be the same on every rank of group" in differing
        assert nothing == "a rank of group must have keys, got none on any"
