"""sentence-transformers' losses for multi-vector encoders, fused, against its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conformance import TOLERANCE, run, since
from late import Tokens, column, texts
from oracles import DOUBLE

pytest.importorskip("sentence_transformers")
if not since("sentence-transformers", "6.0"):
    pytest.skip("since 6.0", allow_module_level=True)
from sentence_transformers.multi_vector_encoder import losses as peer  # noqa: E402
from sentence_transformers.multi_vector_encoder import scoring  # noqa: E402

from contrastive_kernels.integrations import sentence_transformers as fused  # noqa: E402
from contrastive_kernels.integrations.swap import patch_status  # noqa: E402

SHAPES = [(5, 6, 8), (5, 9, 8), (5, 7, 8)]
RANKING = "MultiVectorMultipleNegativesRankingLoss"


def forward(loss, *tokens, labels=None, empty=None):
    columns = [column(t, seed, empty if seed == 2 else None) for seed, t in enumerate(tokens)]
    return loss(columns, labels)


def assert_conforms(ours, theirs, inputs):
    """Value and gradients are the peer's, whose scores are float32 whatever its tokens are."""
    inputs = [t.float() for t in inputs]
    found, wanted = run(ours, inputs, torch.float32), run(theirs, inputs, DOUBLE)
    for a, b in zip(found, wanted, strict=True):
        limit = TOLERANCE[torch.float32] * b.abs().max() + 100 * torch.finfo(torch.float32).eps
        assert (a - b).abs().max() <= limit


def both(name, **options):
    return (getattr(module, name)(Tokens(), **options) for module in (fused, peer))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 5.0, "score_mini_batch_size": 2},
        {"similarity_fct": scoring.mean_colbert_scores, "scale": 8.0},
    ],
)
def test_ranking(options):
    ours, theirs = both(RANKING, **options)
    assert_conforms(partial(forward, ours), partial(forward, theirs), texts(*SHAPES))


@pytest.mark.filterwarnings("ignore")
def test_a_document_without_tokens():
    ours, theirs = (partial(forward, loss, empty=3) for loss in both(RANKING))
    assert_conforms(ours, theirs, texts(*SHAPES))


def test_cached():
    found = []
    for loss in both(f"Cached{RANKING}", mini_batch_size=2):
        leaves = [t.float().requires_grad_() for t in texts(*SHAPES)]
        value = forward(loss, *leaves)
        value.backward()
        found.append([value.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_distillation():
    labels = 3 * torch.rand(5, 2).double()
    ours, theirs = (
        partial(forward, loss, labels=labels)
        for loss in both("MultiVectorDistillKLDivLoss", temperature=2.0)
    )
    assert_conforms(ours, theirs, texts(*SHAPES))


def test_margins():
    labels = 3 * torch.rand(5).double()
    ours, theirs = (
        partial(forward, loss, labels=labels) for loss in both("MultiVectorMarginMSELoss")
    )
    assert_conforms(ours, theirs, texts(*SHAPES))


@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_other_scores_run_the_peers_code():
    def similarity(queries, documents, **masks):
        return queries.sum((1, 2))[:, None] * documents.sum((1, 2, 3)).repeat_interleave(2)

    ours, theirs = both(RANKING, similarity_fct=similarity)
    assert torch.equal(forward(ours, *texts(*SHAPES)), forward(theirs, *texts(*SHAPES)))
    status = patch_status()["sentence_transformers"][f"{RANKING}.forward"].fallback
    assert "similarity_fct is not one of those that are fused" in status
