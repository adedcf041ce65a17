"""The lines that docs/integrations.md has for tevatron, FlagEmbedding and ms-swift, against what
these compute: a cross-entropy of every query's logits, whose label is its positive."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import gloo
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conformance import assert_conforms, clustered
from oracles import DOUBLE, randn
from torch import Tensor

import contrastive_kernels as ck

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
N, DIM, TEMPERATURE = 11, 6, 0.05
parametrize_negatives = pytest.mark.parametrize("negatives", [0, 1, 3])


def recipe(package: str):
    """The block of code under a package's name, as a function of names to the loss."""
    text = PAGE.read_text()
    block = re.search(rf"\*\*{package}\*\*.*?```python\n(.*?)```", text, re.DOTALL)[1]

    def run(**names) -> Tensor:
        scope = {"ck": ck, "torch": torch} | names
        exec(block, scope)
        return scope["loss"]

    return run


def texts(negatives: int, n: int = N) -> list[Tensor]:
    """Queries (N, D), and documents (N (1 + K), D) query by query."""
    query = clustered(n, DIM)
    near = query.repeat_interleave(1 + negatives, 0)
    return [F.normalize(t, dim=1) for t in (query, near + 0.4 * randn(*near.shape, seed=1))]


def in_batch(query: Tensor, documents: Tensor) -> Tensor:
    """Of all queries against all documents, written out."""
    step = len(documents) // len(query)
    logits = query @ documents.T / TEMPERATURE
    return F.cross_entropy(logits, step * torch.arange(len(query)))


def own_only(query: Tensor, documents: Tensor) -> Tensor:
    logits = torch.stack(
        [q @ own.T for q, own in zip(query, documents.split(len(documents) // N), strict=True)]
    )
    return F.cross_entropy(logits / TEMPERATURE, torch.zeros(N, dtype=torch.long))


def swift(query: Tensor, documents: Tensor, *, queries: bool, margin: float | None) -> Tensor:
    """With the other queries, and without what is more similar than the positive by a margin."""
    step = len(documents) // len(query)
    similar = query @ documents.T
    if margin is not None:
        own = similar[torch.arange(N), step * torch.arange(N)].detach()
        similar = similar.masked_fill(similar > own[:, None] + margin, -torch.inf)
    if queries:
        others = (query @ query.T).masked_fill(torch.eye(N, dtype=torch.bool), -torch.inf)
        similar = torch.cat((similar, others), 1)
    return F.cross_entropy(similar / TEMPERATURE, step * torch.arange(N))


@parametrize_negatives
def test_tevatron(negatives):
    me = SimpleNamespace(temperature=TEMPERATURE, is_ddp=False)
    loss = recipe("tevatron")
    assert_conforms(lambda q, p: loss(q_reps=q, p_reps=p, self=me), in_batch, texts(negatives))


@parametrize_negatives
@pytest.mark.parametrize("own", [False, True])
def test_flag_embedding(negatives, own):
    if own and negatives == 0:
        pytest.skip("a query alone with its positive has a loss of 0")
    me = SimpleNamespace(temperature=TEMPERATURE, negatives_cross_device=False)
    loss = recipe("FlagEmbedding")
    assert_conforms(
        lambda q, p: loss(q_reps=q, p_reps=p, self=me, no_in_batch_neg_flag=own),
        own_only if own else in_batch,
        texts(negatives),
    )


def swift_loss(q: Tensor, p: Tensor, **options) -> Tensor:
    names = {
        "use_batch": True, "infonce_mask_fake_negative": False, "infonce_include_qq": False,
        "fake_neg_margin": 0.1, "temperature": TEMPERATURE, "world_size": 1,
    }  # fmt: skip
    sentences = torch.cat((q[:, None], p.view(len(q), -1, DIM)), 1)
    return recipe("ms-swift")(sentences=sentences, **(names | options))


@parametrize_negatives
@pytest.mark.parametrize("queries", [False, True])
def test_ms_swift(negatives, queries):
    assert_conforms(
        lambda q, p: swift_loss(q, p, infonce_include_qq=queries),
        lambda q, p: swift(q, p, queries=queries, margin=None),
        texts(negatives),
    )


@parametrize_negatives
def test_ms_swift_with_masked_negatives(negatives):
    """Some are masked, and not all."""
    query, documents = texts(negatives)
    own = (query @ documents[:: 1 + negatives].T).diagonal()
    masked = query @ documents.T > own[:, None] + 0.02
    assert masked.any() and not masked.all()
    options = {"infonce_mask_fake_negative": True, "fake_neg_margin": 0.02}
    assert_conforms(
        lambda q, p: swift_loss(q, p, **options),
        lambda q, p: swift(F.normalize(q), F.normalize(p), queries=False, margin=0.02),
        [query, documents], bfloat16=False,  # whose rounding decides what is masked
    )  # fmt: skip


def test_ms_swift_without_the_batch():
    assert_conforms(lambda q, p: swift_loss(q, p, use_batch=False), own_only, texts(3))


def of_rank(world: int) -> dict[str, list[Tensor]]:
    """By package: its value and averaged gradient of a shared encoder's weight on this rank, and
    those of the recipe."""
    rank, n = dist.get_rank(), 4
    query, documents = texts(2, n * world)
    own = slice(rank * n, (rank + 1) * n), slice(rank * 3 * n, (rank + 1) * 3 * n)

    def outcome(loss) -> list[Tensor]:
        weight = torch.eye(DIM, dtype=DOUBLE, requires_grad=True)
        value = loss(query[own[0]] @ weight, documents[own[1]] @ weight)
        (gradient,) = torch.autograd.grad(value, weight)
        dist.all_reduce(gradient)
        return [value.detach(), gradient / world]

    def gathered(t: Tensor) -> Tensor:
        parts = [torch.empty_like(t) for _ in range(world)]
        dist.all_gather(parts, t.detach().contiguous())
        parts[rank] = t  # alone with a gradient
        return torch.cat(parts)

    def theirs(q: Tensor, p: Tensor, factor: int) -> Tensor:
        return factor * in_batch(gathered(q), gathered(p))

    me = SimpleNamespace(temperature=TEMPERATURE, is_ddp=True, negatives_cross_device=True)
    ours = {
        "tevatron": lambda q, p: recipe("tevatron")(q_reps=q, p_reps=p, self=me),
        "FlagEmbedding": lambda q, p: recipe("FlagEmbedding")(
            q_reps=q, p_reps=p, self=me, no_in_batch_neg_flag=False
        ),
        "ms-swift": lambda q, p: swift_loss(q, p, world_size=world),
    }
    return {
        name: [
            outcome(loss),
            outcome(lambda q, p, name=name: theirs(q, p, world if name == "tevatron" else 1)),
        ]
        for name, loss in ours.items()
    }


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
def test_several_processes():
    """tevatron's value is W times ours, and its gradient ours; the others' value is ours, and their
    gradient 1 / W of ours."""
    world = 2
    for report in gloo.run(world, of_rank, world):
        for name, (ours, theirs) in report.items():
            in_tevatron = name == "tevatron"
            scaled = [
                ours[0] * (world if in_tevatron else 1),
                ours[1] / (1 if in_tevatron else world),
            ]
            torch.testing.assert_close(scaled, theirs, rtol=1e-10, atol=1e-12)
