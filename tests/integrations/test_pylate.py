"""PyLate's losses, fused, against its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("pylate")
from conformance import assert_conforms  # noqa: E402
from late import Tokens, column, texts  # noqa: E402
from pylate import losses as peer  # noqa: E402

import contrastive_kernels as ck  # noqa: E402
from contrastive_kernels.integrations import pylate as fused  # noqa: E402
from contrastive_kernels.integrations.swap import patch_status  # noqa: E402

SHAPES = [(5, 6, 8), (5, 9, 8), (5, 9, 8)]


def forward(loss, *tokens, labels=None):
    """The loss of texts, of which some tokens do not count."""
    return loss([column(t, seed) for seed, t in enumerate(tokens)], labels)


def gradients(loss, inputs):
    """Of a loss that goes backward through the model twice."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = forward(loss, *leaves)
    value.backward()
    return [value.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("expansion", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.1, "size_average": False}, {"score_mini_batch_size": 2}]
)
def test_contrastive(options, expansion):
    model = Tokens()
    model.do_query_expansion = expansion
    ours, theirs = (m.Contrastive(model, **options) for m in (fused, peer))
    assert_conforms(partial(forward, ours), partial(forward, theirs), texts(*SHAPES))


@pytest.mark.parametrize("mini_batch_size", [2, 5])
def test_cached(mini_batch_size):
    options = {"mini_batch_size": mini_batch_size, "temperature": 0.5}
    ours, theirs = (m.CachedContrastive(Tokens(), **options) for m in (fused, peer))
    for a, b in zip(
        gradients(ours, texts(*SHAPES)), gradients(theirs, texts(*SHAPES)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"normalize_scores": False, "size_average": False}])
def test_distillation(options):
    labels = torch.rand(5, 3).double()
    ours, theirs = (
        partial(forward, m.Distillation(Tokens(), **options), labels=labels) for m in (fused, peer)
    )
    assert_conforms(ours, theirs, texts((5, 6, 8), (15, 9, 8)), bfloat16=False)


def test_patch():
    loss = peer.Contrastive(Tokens())
    before = forward(loss, *texts(*SHAPES))
    with ck.patched("pylate"):
        counted = patch_status()["pylate"]["Contrastive.forward"].fused
        torch.testing.assert_close(forward(loss, *texts(*SHAPES)), before)
        assert patch_status()["pylate"]["Contrastive.forward"].fused == counted + 1


@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_other_scores_run_the_peers_code():
    def metric(queries, documents, **masks):
        return queries.sum((1, 2))[:, None] * documents.sum((1, 2, 3)).repeat_interleave(2)

    ours, theirs = (m.Contrastive(Tokens(), score_metric=metric) for m in (fused, peer))
    assert torch.equal(forward(ours, *texts(*SHAPES)), forward(theirs, *texts(*SHAPES)))
    status = patch_status()["pylate"]["Contrastive.forward"].fallback
    assert "score_metric is not one of those that are fused" in status
