"""Hard negatives against a search of every query's list of scores, one by one."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from oracles import BACKENDS, randn

import contrastive_kernels as ck

parametrize_backend = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if not oracles.interpreted(name)]
)
N, M, D = 9, 60, 6


def candidates(
    queries, keys, positives, *, absolute_margin=None, relative_margin=None, min_score=None,
    max_score=None, range_min=0, range_max=None, exclude=None, normalize=True, **_,
):  # fmt: skip
    """Of each query the (score, id) that may be negatives, the nearest first."""
    if normalize:
        queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    lists = []
    for i, scores in enumerate((queries @ keys.T).tolist()):
        own = [j for j in positives[i].reshape(-1).tolist() if j >= 0]
        nearest = min((scores[j] for j in own), default=torch.inf)
        order = sorted((-s, j) for j, s in enumerate(scores)
                       if exclude is None or exclude[0][i] != exclude[1][j])  # fmt: skip
        if range_max is not None:
            order = order[: range_max + positives[i].numel()]
        found = [
            (-s, j)
            for s, j in order
            if j not in own
            and (absolute_margin is None or -s <= nearest - absolute_margin)
            and (not own or relative_margin is None
                 or -s <= nearest - relative_margin * abs(nearest))
            and (max_score is None or -s <= max_score)
            and (min_score is None or -s >= min_score)
        ]  # fmt: skip
        lists.append(found[range_min : len(found) if range_max is None else range_max])
    return lists


@parametrize_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_of_positives_are_those_of_the_search(backend, dtype, normalize):
    """So that a copy of a positive is just as near, and no farther by rounding."""
    if backend == "reference":
        pytest.skip("products of matrices, whose bits depend on their sizes")
    queries, keys = randn(67, 98).to(dtype), randn(67, 98, seed=1).to(dtype)
    found = ck.hard_negatives(
        queries, torch.cat((keys, keys)), torch.arange(67), absolute_margin=0.0,
        num_negatives=134, normalize=normalize, backend=backend,
    )  # fmt: skip
    is_copy = found.ids == torch.arange(67, 134)[:, None]
    assert is_copy.any(1).all()
    assert torch.equal(found.scores[is_copy], found.positive_scores)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_negatives": 1.5}, TypeError, "num_negatives must be a whole number, got 1.5"),
        ({"range_max": 9.0}, TypeError, "range_max must be a whole number, got 9.0"),
        ({"positives": torch.ones(N, dtype=torch.bool)}, TypeError, "positives must be numbers"),
    ],
)
def test_what_does_not_fit(options, error, message):
    queries, keys, positives = data()
    with pytest.raises(error, match=message):
        ck.hard_negatives(queries, keys, **{"positives": positives, **options})


def data(several=False):
    queries = randn(N, D)
    keys = torch.cat((queries + 0.5 * randn(N, D, seed=1), randn(M - N, D, seed=2)))
    positives = torch.arange(N)
    if several:
        positives = torch.stack((positives, positives + 20, torch.full((N,), -1)), 1)
        positives[3] = -1
    return queries, keys, positives


OPTIONS = {
    "nearest": {},
    "absolute": {"absolute_margin": 0.1},
    "relative": {"relative_margin": 0.05, "num_negatives": 5},
    "both": {"relative_margin": 0.3, "absolute_margin": -0.1},
    "scores": {"min_score": 0.1, "max_score": 0.4, "num_negatives": 7},
    "range": {"range_min": 3, "range_max": 9, "num_negatives": 4},
    "from": {"range_min": 5},
    "margin in a range": {"relative_margin": 0.2, "range_min": 1, "range_max": 20},
    "dot": {"normalize": False, "absolute_margin": 1.0},
    "exclude": {"exclude": (torch.arange(N) % 3, torch.arange(M) % 4), "max_score": 0.9},
    "more than there are": {"num_negatives": M + 3},
}


@parametrize_backend
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_nearest_candidates(several, options, backend):
    queries, keys, positives = data(several)
    wanted = candidates(queries, keys, positives, **options)
    for given in (keys, [keys[:17], keys[17:]]):
        found = ck.hard_negatives(queries, given, positives, backend=backend, **options)
        count = options.get("num_negatives", 3)
        assert found.ids.shape == found.scores.shape == (N, count)
        for i, each in enumerate(wanted):
            ids = [j for _, j in each[:count]]
            assert found.ids[i].tolist() == ids + [-1] * (count - len(ids))
            scores = [s for s, _ in each[:count]] + [-torch.inf] * (count - len(ids))
            assert found.scores[i].tolist() == pytest.approx(scores, abs=1e-12)
    if options.get("normalize", True):
        queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    scores = (queries @ keys.T).gather(1, positives.view(N, -1).clamp(min=0))
    scores = scores.masked_fill(positives.view(N, -1) < 0, -torch.inf)
    torch.testing.assert_close(found.positive_scores, scores.view(positives.shape))


@parametrize_backend
def test_drawn_ones_are_candidates(backend):
    queries, keys, positives = data()
    options = {"range_min": 2, "range_max": 12, "relative_margin": 0.1}
    wanted = candidates(queries, keys, positives, **options)
    met = [set() for _ in range(N)]
    for seed in range(30):
        found = ck.hard_negatives(
            queries, keys, positives, sampling="random", num_negatives=4, backend=backend,
            generator=oracles.generator(seed), **options,
        )  # fmt: skip
        for i, each in enumerate(wanted):
            ids = [j for j in found.ids[i].tolist() if j >= 0]
            assert len(ids) == len(set(ids)) == min(4, len(each))
            assert ids == [j for _, j in each if j in ids]  # in their order
            met[i] |= set(ids)
    assert met == [{j for _, j in each} for each in wanted]
    assert any(len(each) > 4 for each in wanted) and any(len(each) < 4 for each in wanted)


def test_a_limit_is_met_exactly():
    """Scores of whole numbers: that of the positive, less the margin, may be a negative's."""
    queries, keys = torch.ones(1, 1), torch.tensor([[8.0], [6], [7], [6], [5]])
    given = {"normalize": False, "num_negatives": 2, "absolute_margin": 2}
    found = ck.hard_negatives(queries, keys, torch.tensor([0]), **given)
    assert found.ids.tolist() == [[1, 3]] and found.scores.tolist() == [[6, 6]]
    found = ck.hard_negatives(queries, keys, torch.tensor([0]), range_max=4, **given)
    assert found.ids.tolist() == [[1, 3]]
    found = ck.hard_negatives(
        queries, keys, torch.tensor([0]), normalize=False, min_score=6, max_score=6
    )
    assert found.ids.tolist() == [[1, 3, -1]]


def test_halves_and_gradients():
    queries, keys, positives = data()
    exact = ck.hard_negatives(queries.bfloat16().double(), keys.bfloat16().double(), positives)
    found = ck.hard_negatives(queries.bfloat16().requires_grad_(), keys.bfloat16(), positives)
    assert torch.equal(found.ids, exact.ids) and found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores.double(), exact.scores, rtol=1e-6, atol=1e-6)
    assert not any(t.requires_grad for t in found)


def test_transforms():
    queries, keys, positives = data()
    wanted = ck.hard_negatives(queries, keys, positives)

    def total(x: torch.Tensor) -> torch.Tensor:
        found = ck.hard_negatives(x, keys, positives, backend=backend)
        return (x @ keys.T).gather(1, found.ids).sum() + found.scores.sum()

    expected = keys[wanted.ids].sum(1)
    for backend in oracles.BACKENDS:
        torch.testing.assert_close(torch.func.grad(total)(queries), expected)
        pushed = torch.func.jvp(total, (queries,), (queries.cos(),))[1]
        torch.testing.assert_close(pushed, (expected * queries.cos()).sum())
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(queries, queries)
            found = ck.hard_negatives(dual, keys, positives, backend=backend)
            assert all(forward_ad.unpack_dual(t).tangent is None for t in found)
        with pytest.raises(NotImplementedError, match="hard_negatives cannot run within vmap"):
            torch.func.vmap(torch.func.grad(total))(queries[None])


def test_compiled_with_one_graph_break():
    queries, keys, positives = data()
    graphs = []

    def seen(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: ck.hard_negatives(2 * x, keys, positives).scores + 1, backend=seen
    )
    assert torch.equal(
        compiled(queries), ck.hard_negatives(2 * queries, keys, positives).scores + 1
    )
    assert len(graphs) == 2


ERRORS = {
    "positives": (dict(positives=torch.arange(4)), ValueError, r"shape \(3,\) or \(3, P\), got"),
    "positives of floats": (dict(positives=torch.ones(3)), TypeError, "an integer tensor"),
    "no such key": (dict(positives=torch.tensor([0, 1, 5])), ValueError, "ids of the 5 keys, or"),
    "num_negatives": (dict(num_negatives=0), ValueError, "num_negatives must be at least 1, got 0"),
    "range_min": (dict(range_min=-1), ValueError, "range_min must be at least 0, got -1"),
    "range_max": (
        dict(range_min=2, range_max=4), ValueError,
        "range_max must be at least range_min [+] num_negatives = 5, got 4",
    ),
    "sampling": (dict(sampling="all"), ValueError, "sampling must be one of top, random"),
    "no range": (dict(sampling="random"), ValueError, "needs range_max"),
    "margin": (dict(relative_margin=torch.nan), ValueError, "relative_margin must be a finite"),
    "keys": (dict(keys=torch.ones(5, 3)), ValueError, "queries and keys .* features D"),
}  # fmt: skip


@pytest.mark.parametrize("options, error, message", ERRORS.values(), ids=ERRORS)
def test_what_does_not_fit_is_refused(options, error, message):
    given = {"queries": torch.ones(3, 2), "keys": torch.ones(5, 2), "positives": torch.arange(3)}
    with pytest.raises(error, match=message):
        ck.hard_negatives(**given | options)
