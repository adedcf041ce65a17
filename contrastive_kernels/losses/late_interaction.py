"""Losses of late interaction, whose queries and documents are sets of tokens: contrastive, and with
the scores of a teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..checks import (
    check_choice,
    check_device,
    check_features,
    check_pair,
    check_positive,
    check_reduction,
    resolve_scale,
)
from ..distributed import Batch, Shards, join
from ..ops import TokenSets, check_token_sets, token_scores, uneven_sets
from ..types import Group
from .algebra import gather_only, masked_logsumexp, softplus
from .base import ContrastiveLoss, loss

OBJECTIVES = ("kl", "margin_mse")


@loss
def late_interaction(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_lengths: Tensor | None = None,
    document_lengths: Tensor | None = None,
    temperature: float = 1.0,
    scale: float | Tensor | None = None,
    symmetric: bool = False,
    max_temperature: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
) -> Tensor:
    """The contrastive loss of ColBERT (Khattab and Zaharia 2020, sec. 3.2; with in-batch negatives
    Santhanam et al. 2022) and ColPali (Faysse et al. 2024).

    loss_i = log sum_c exp(z_ic) - z_i+,   z_ic = scale sum_t max_u <q_it, d_cu>,

    over all documents c of the batch, + being the first document of query i. With `symmetric` the
    mean of that and the same from each positive document to all queries. The products of tokens are
    never stored; see `max_sim`. With a `group` each rank holds the document tokens of all ranks:
    there is no exchange="ring".

    Args:
        queries: tokens (N, Lq, D); or of all queries one after the other, (total, D), with
            `query_lengths`.
        documents: tokens (N, Ld, D), document i that of query i; or (N, K, Ld, D): the positive of
            each query, then its hard negatives, which are those of the other queries too; or
            (total, D) with `document_lengths`, the K documents of a query one after the other.
        query_mask, document_mask: bool, of the shape without D: True where a token counts. The
            others may have any value, and get the gradient 0.
        query_lengths, document_lengths: integers (N,), (N K,): how many tokens each has.
        scale: number or tensor of one element (may be learned) in the place of 1 / temperature.
        symmetric: also from documents to queries.
        max_temperature: a number > 0: maxima become smooth ones, t log sum_u exp(z_u / t).
        exchange: "auto" or "gather".

    Returns:
        0-d, or (N,) with reduction="none".
    """
    whole = group is None  # else the rank's part may be empty
    of_queries = check_token_sets("queries", queries, query_mask, query_lengths, whole=whole)
    of_documents = check_token_sets(
        "documents", documents, document_mask, document_lengths, (3, 4), whole=whole
    )
    check_pair(of_queries.tokens, of_documents.tokens, "queries", "documents")
    check_reduction(reduction)
    factor = resolve_scale(temperature, scale)
    if max_temperature is not None:
        check_positive("max_temperature", max_temperature)
    n = of_queries.number
    each = _documents_each(of_queries, of_documents, documents)
    backend = resolve_backend(backend, queries.device)
    gather_only("late_interaction", exchange)
    batch, of_tokens = join(
        group, n, of_documents.tokens.shape[0], exchange=exchange,
        queries=of_queries.tokens, documents=of_documents.tokens,
        query_mask=_flat(query_mask), document_mask=_flat(document_mask), documents_each=each,
    )  # fmt: skip
    if isinstance(batch, Shards):
        of_documents = _of_all_ranks(of_documents, each, batch, of_tokens)
    if of_documents.number < 2:
        raise ValueError(
            "documents must be at least 2: a batch of one query has no negatives but hard ones"
        )
    z = factor * token_scores(
        of_queries, of_documents, temperature=max_temperature, normalize=normalize, backend=backend
    )
    positives = torch.arange(batch.own.start, batch.own.stop, device=z.device)
    rows = _excess(z, positives * each)
    if symmetric:
        of_positives = batch.gather_keys(z[:, ::each])[:, batch.own]
        rows = (rows + _excess(of_positives.T, positives)) / 2
    return batch.reduce_rows(rows, reduction)


class LateInteraction(ContrastiveLoss):
    function = staticmethod(late_interaction)


@loss
def late_interaction_distill(
    queries: Tensor,
    documents: Tensor,
    teacher_scores: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    objective: str = "kl",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    normalize_scores: bool = False,
    max_temperature: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """Late interaction that learns a teacher's scores of each query's own documents (ColBERTv2,
    Santhanam et al. 2022, sec. 3.2; margin-MSE, Hofstaetter et al. 2020, eq. 5).

    With s_ik = sum_t max_u <q_it, d_iku> and the teacher's t_ik:
    "kl": loss_i = temperature^2 sum_k q_ik (log q_ik - log p_ik), p = softmax(s / temperature), q =
    softmax(t / teacher_temperature); "margin_mse": loss_i = mean over k > 0 of
    ((s_i0 - s_ik) - (t_i0 - t_ik))^2.

    Args:
        queries: tokens (N, Lq, D).
        documents: tokens (N, K, Ld, D), the K documents of each query; K > 1.
        teacher_scores: (N, K). They get a gradient too if they need one.
        query_mask, document_mask: bool, (N, Lq) and (N, K, Ld): True where a token counts.
        objective: "kl" or "margin_mse".
        temperature: "kl" only; a number > 0.
        teacher_temperature: likewise; None: `temperature`.
        normalize_scores: bring each query's scores s to (s - min) / (max - min + 1e-8) first, as
            PyLate does.
        max_temperature: a number > 0: maxima become smooth ones, t log sum_u exp(z_u / t).

    Returns:
        0-d, or (N,) with reduction="none".
    """
    whole = group is None
    of_queries = check_token_sets("queries", queries, query_mask, None, whole=whole)
    of_documents = check_token_sets("documents", documents, document_mask, None, (4,), whole=whole)
    check_pair(of_queries.tokens, of_documents.tokens, "queries", "documents")
    check_features("teacher_scores", teacher_scores, (2,), whole=False)
    each = _documents_each(of_queries, of_documents, documents)
    n = of_queries.number
    if each < 2:
        raise ValueError(f"documents must be at least 2 for each query, got {each}")
    if teacher_scores.shape != (n, each):
        got = tuple(teacher_scores.shape)
        raise ValueError(f"teacher_scores must have shape ({n}, {each}), got {got}")
    check_device("teacher_scores", teacher_scores, queries.device)
    check_choice("objective", objective, OBJECTIVES)
    check_reduction(reduction)
    check_positive("temperature", temperature)
    of_teacher = temperature if teacher_temperature is None else teacher_temperature
    check_positive("teacher_temperature", of_teacher)
    if max_temperature is not None:
        check_positive("max_temperature", max_temperature)
    backend = resolve_backend(backend, queries.device)
    batch, _ = join(
        group, n, queries=of_queries.tokens, documents=of_documents.tokens,
        query_mask=_flat(query_mask), document_mask=_flat(document_mask), documents_each=each,
    )  # fmt: skip
    s = token_scores(
        of_queries, of_documents, own=each, temperature=max_temperature, normalize=normalize,
        backend=backend,
    )  # fmt: skip
    t = teacher_scores.to(s.dtype)
    if normalize_scores:
        low, high = s.amin(1, keepdim=True), s.amax(1, keepdim=True)
        s = (s - low) / (high - low + 1e-8)
    if objective == "kl":
        log_p, log_q = (s / temperature).log_softmax(1), (t / of_teacher).log_softmax(1)
        rows = temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1)
    else:
        rows = ((s[:, :1] - s[:, 1:]) - (t[:, :1] - t[:, 1:])).square().mean(1)
    return batch.reduce_rows(rows, reduction)


class LateInteractionDistill(ContrastiveLoss):
    function = staticmethod(late_interaction_distill)


def _documents_each(queries: TokenSets, documents: TokenSets, given: Tensor) -> int:
    """K, how many documents each query has, or raise."""
    n, m = queries.number, documents.number
    if given.dim() == 4:
        if given.shape[0] != n:
            raise ValueError(
                f"documents of shape (N, K, L, D) must have N = {n} as queries have, got "
                f"{tuple(given.shape)}"
            )
        return given.shape[1]
    if given.dim() == 3:
        if m != n:
            raise ValueError(
                f"documents of shape (N, L, D) must have N = {n} as queries have, got "
                f"{tuple(given.shape)}; hard negatives come as (N, K, L, D)"
            )
        return 1
    if n == 0:
        raise ValueError("a rank without queries takes documents of shape (0, K, L, D)")
    if m % n or m == 0:
        raise ValueError(f"documents must be a multiple of the {n} queries in number, got {m}")
    return m // n


def _flat(mask: Tensor | None) -> Tensor | None:
    """Ranks may pad to other lengths."""
    return None if mask is None else mask.flatten()


def _of_all_ranks(sets: TokenSets, each: int, batch: Shards, of_tokens: Batch) -> TokenSets:
    """The documents of all ranks, each of which may have padded its own otherwise."""
    assert isinstance(of_tokens, Shards)
    counts = sets.ends.diff(prepend=sets.ends.new_zeros(1))
    kept = None if sets.kept is None else of_tokens.gather(sets.kept.to(torch.uint8)).bool()
    counts = batch.gather(counts.view(-1, each)).flatten()
    return uneven_sets(of_tokens.gather_keys(sets.tokens), counts, kept)


def _excess(z: Tensor, positives: Tensor) -> Tensor:
    """log sum_c exp(z_ic) - z_ip, of the column p of each row: softplus of what the others have
    above it, which keeps the digits of a small loss."""
    others = torch.arange(z.shape[1], device=z.device) != positives[:, None]
    positive = z.masked_fill(others, 0.0).sum(1)  # gather adds its gradient in any order
    return softplus(masked_logsumexp(z, others) - positive)
