"""Late interaction: masks of documents, ragged tokens, and ranks that pad to other lengths."""

from __future__ import annotations

from functools import partial

import gloo
import pytest
import torch
import torch.distributed as dist
from oracles import BACKENDS, assert_equal_in_double, generator, randn

import contrastive_kernels as ck
from contrastive_kernels import reference

MASK = torch.rand((4, 2, 6), generator=generator(3)) < 0.6
MASK[..., 1] = True
parametrize_backends = pytest.mark.parametrize("backend", BACKENDS)


@parametrize_backends
def test_documents_with_a_mask(backend):
    given = [randn(4, 3, 5), randn(4, 2, 6, 5, seed=1)]
    options = {"document_mask": MASK, "symmetric": True, "reduction": "none"}
    found = partial(ck.late_interaction, backend=backend, **options)
    assert_equal_in_double(found, partial(reference.late_interaction, **options), given)


@parametrize_backends
def test_a_teacher_of_documents_with_a_mask(backend):
    given = [randn(4, 3, 5), randn(4, 2, 6, 5, seed=1), randn(4, 2, seed=2)]
    options = {"document_mask": MASK, "objective": "margin_mse", "normalize": False}
    found = partial(ck.late_interaction_distill, backend=backend, **options)
    assert_equal_in_double(found, partial(reference.late_interaction_distill, **options), given)


@parametrize_backends
def test_ragged_tokens_are_those_of_a_mask(backend):
    queries, documents = randn(4, 3, 5), randn(4, 2, 6, 5, seed=1)
    counts = torch.tensor([[6, 1], [3, 5], [2, 2], [4, 6]])
    mask = torch.arange(6) < counts[..., None]

    def ragged(queries, documents):
        return ck.late_interaction(
            queries.flatten(0, 1), documents[mask], query_lengths=torch.full((4,), 3),
            document_lengths=counts.flatten(), temperature=0.2, backend=backend,
        )  # fmt: skip

    padded = partial(reference.late_interaction, document_mask=mask, temperature=0.2)
    assert_equal_in_double(ragged, padded, [queries, documents])


def on_ranks() -> float:
    """The largest error of a rank that pads its documents to lengths of its own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    queries, documents = randn(4, 3, 5), randn(4, 2, 6, 5, seed=1)
    mask = torch.arange(6) < torch.tensor([[4, 1], [3, 4], [2, 2], [4, 6]])[..., None]
    whole = [queries.requires_grad_(), documents.requires_grad_()]
    options = {"symmetric": True, "temperature": 0.3}
    expected = reference.late_interaction(*whole, document_mask=mask, **options)
    gradients = torch.autograd.grad(expected, whole)
    own, length = (slice(0, 2), 4) if rank == 0 else (slice(2, 4), 6)
    mine = [queries[own].detach(), documents[own, :, :length].detach()]
    mine = [t.requires_grad_() for t in mine]
    value = ck.late_interaction(
        *mine, document_mask=mask[own, :, :length], group="world", **options
    )
    found = torch.autograd.grad(value, mine)
    wanted = gradients[0][own], gradients[1][own, :, :length]
    errors = [(value - expected).abs().max()]
    errors += [(a / world - b).abs().max() for a, b in zip(found, wanted, strict=True)]
    return max(errors).item()


def test_ranks_may_pad_to_other_lengths():
    assert all(error < 1e-12 for error in gloo.run(2, on_ranks))


X, Y = randn(4, 3, 5), randn(4, 2, 6, 5, seed=1)
ERRORS = [
    (ValueError, "hard negatives come as", (X, Y.flatten(0, 1)), {}),
    (ValueError, "must have N = 4 as queries have", (X, Y[:3]), {}),
    (ValueError, "documents must be at least 2", (X[:1], Y[:1, 0]), {}),
    (ValueError, "multiple of the 4 queries", (X, Y[0, 0]),
     {"document_lengths": torch.tensor([1, 2, 3])}),
    (ValueError, "max_temperature must be a finite number > 0", (X, Y), {"max_temperature": -1.0}),
    (ValueError, "temperature must be a finite number > 0", (X, Y), {"temperature": 0.0}),
]  # fmt: skip
TAUGHT = [
    (ValueError, r"teacher_scores must have shape \(4, 2\)", (X, Y, Y[:3, :, 0, 0]), {}),
    (ValueError, "documents must be at least 2 for each query", (X, Y[:, :1], X[..., 0]), {}),
    (ValueError, "objective must be one of", (X, Y, Y[..., 0, 0]), {"objective": "mse"}),
    (ValueError, "teacher_temperature must be", (X, Y, Y[..., 0, 0]), {"teacher_temperature": 0.0}),
]


@pytest.mark.parametrize(("error", "message", "given", "options"), ERRORS)
def test_errors(error, message, given, options):
    with pytest.raises(error, match=message):
        ck.late_interaction(*given, **options)


@pytest.mark.parametrize(("error", "message", "given", "options"), TAUGHT)
def test_errors_of_a_teacher(error, message, given, options):
    with pytest.raises(error, match=message):
        ck.late_interaction_distill(*given, **options)
