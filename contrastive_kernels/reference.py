"""Dense, obvious PyTorch: the oracle of every backend, and every loss from its paper's definition.

Everything here is plain differentiable torch (any device, any floating dtype, second-order
gradients) and stores the whole similarity matrix. Half inputs are promoted to float32 first.
The losses never use row statistics, so that an error in the algebra of `losses/` cannot hide.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import Counts, IdPair, SoftplusSweep, Sweep, TopK


def promote(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def similarity(x: Tensor, y: Tensor | None, normalize: bool) -> Tensor:
    """All inner products (N, M): x (N, D) with shared keys y (M, D), per-query keys y (N, M, D),
    or with itself (y is None)."""
    x = promote(x)
    y = x if y is None else promote(y)
    if normalize:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    return x @ y.T if y.dim() == 2 else torch.einsum("nd,nmd->nm", x, y)


def kept_pairs(z: Tensor, exclude: IdPair | None, keep: IdPair | None) -> Tensor:
    """Boolean (N, M): pairs with equal `exclude` ids are dropped, only equal `keep` ids stay. Those
    of columns are (M,), or (N, M)."""
    kept = torch.ones_like(z, dtype=torch.bool)
    if exclude is not None:
        kept = kept & (exclude[0][:, None] != exclude[1])
    if keep is not None:
        kept = kept & (keep[0][:, None] == keep[1])
    return kept


def padded(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """What lies run after run, (T, ...) of which the next counts_i are those of row i, as (N, M,
    ...) with M the largest of the counts, zeros behind the shorter runs; and where there is
    something, (N, M)."""
    width = max([1, *counts.tolist()])
    mask = torch.arange(width, device=counts.device) < counts[:, None]
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    where = mask.view(*mask.shape, *(1,) * (values.dim() - 1))
    return out.masked_scatter(where, values), mask


def own_negatives(
    negatives: Tensor, mask: Tensor | None, per_query: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Negatives as (N, M, D), with zeros where nothing counts, and the mask; or as they are."""
    if per_query is not None:
        return padded(negatives, per_query)
    if mask is not None:
        negatives = negatives.masked_fill(~mask[..., None], 0.0)
    return negatives, mask


def masked_softmax_stats(z: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(log sum exp, softmax-weighted mean) of the kept entries along the last dimension.

    A row that is empty, or -inf throughout, gives (-inf, 0) and no gradient: its shift and its norm
    are replaced, so that neither the first nor the second derivative meets inf - inf or log 0.
    """
    masked = torch.where(kept, z, -torch.inf)
    top = masked.detach().amax(-1)
    nonempty = top != -torch.inf  # so for NaN
    shift = torch.where(nonempty, top, 0.0)
    exp = torch.exp(masked - shift[..., None])
    norm = torch.where(nonempty, exp.sum(-1), 1.0)
    lse = torch.where(nonempty, shift + norm.log(), -torch.inf)
    # the mean relative to the shift: of large logits its derivative would keep no digit of z - mean
    above = torch.where(masked == -torch.inf, 0.0, z - shift[..., None])
    return lse, shift + (exp * above).sum(-1) / norm


def threshold_stats(z: Tensor, kept: Tensor, threshold: Tensor | None) -> Counts | None:
    """Counts of the kept entries of each row, without gradient; NaN is above, and all above NaN."""
    if threshold is None:
        return None
    z = z.detach()
    rank = (kept & ~(z <= threshold.detach()[:, None])).sum(1)
    return Counts(rank, torch.where(kept, z, 0.0).sum(1), kept.sum(1))


def sweep(
    x: Tensor,
    y: Tensor | None,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    normalize: bool = False,
    mean: bool = False,
    columns: bool = False,
    threshold: Tensor | None = None,
) -> Sweep:
    """Softmax statistics of z_ij = scale <x_i, y_j> + bias_j over the kept pairs.

    x (N, D); y (M, D), (N, M, D) or None (y = x); bias (M,); threshold (N,). All numbers are
    float32 for half inputs; rank and pairs are int64. A row (column) without a kept pair has lse
    -inf, mean 0 and zero gradient.
    """
    z = scale * similarity(x, y, normalize)
    if bias is not None:
        z = z + bias
    kept = kept_pairs(z, exclude, keep)
    lse, row_mean = masked_softmax_stats(z, kept)
    col_lse, col_mean = masked_softmax_stats(z.T, kept.T) if columns else (None, None)
    return Sweep(
        lse=lse,
        mean=row_mean if mean else None,
        col_lse=col_lse,
        col_mean=col_mean if mean else None,
        counts=threshold_stats(z, kept, threshold),
    )


def softplus_sweep(
    x: Tensor,
    y: Tensor | None,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    normalize: bool = False,
    threshold: Tensor | None = None,
) -> SoftplusSweep:
    """sum_j softplus(scale <x_i, y_j> + bias) over the kept pairs, shape (N,); 0 for an empty
    row."""
    z = scale * similarity(x, y, normalize)
    if bias is not None:
        z = z + bias
    kept = kept_pairs(z, exclude, keep)
    # F.softplus turns linear above 20, too coarse for float64; logsigmoid is exact everywhere
    value = torch.where(kept, -F.logsigmoid(-torch.where(kept, z, 0.0)), 0.0).sum(1)
    return SoftplusSweep(value, threshold_stats(z, kept, threshold))


def top_k(
    x: Tensor,
    y: Tensor,
    k: int,
    *,
    exclude: IdPair | None = None,
    keep: IdPair | None = None,
    threshold: Tensor | None = None,
    normalize: bool = False,
) -> TopK:
    """The k largest of <x_i, y_j> over the kept pairs, below threshold_i; NaN, which comes first,
    is below any. Of equals the first; -inf and -1 where there are fewer."""
    z = similarity(x, y, normalize)
    kept = kept_pairs(z, exclude, keep)
    if threshold is not None:
        kept = kept & ((z < threshold[:, None]) | z.isnan())
    z = F.pad(torch.where(kept, z, -torch.inf), (0, max(0, k - z.shape[1])), value=-torch.inf)
    ids = torch.arange(z.shape[1], device=z.device).expand(z.shape)
    return first(z, ids.masked_fill(z.detach() == -torch.inf, -1), k)


def first(values: Tensor, ids: Tensor, k: int) -> TopK:
    """The k largest of lists (N, L >= k) in which, of equals, the smaller id stands first."""
    order = values.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return TopK(values.gather(1, order), ids.gather(1, order))


def merged(best: TopK | None, found: TopK, start: int, k: int) -> TopK:
    """The k first of `best` and of what was found among the keys from `start` on, which follow."""
    moved = torch.where(found.ids < 0, found.ids, found.ids + start)
    if best is None:
        return TopK(found.values, moved)
    return first(torch.cat((best.values, found.values), 1), torch.cat((best.ids, moved), 1), k)


def row_dot(x: Tensor, y: Tensor, *, normalize: bool = False) -> Tensor:
    """<x_i, y_i>: x (N, D) with y (N, D) gives (N,), with y (N, K, D) gives (N, K)."""
    x, y = promote(x), promote(y)
    if normalize:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    return (x * y).sum(-1) if y.dim() == 2 else (x[:, None, :] * y).sum(-1)


def take_rows(x: Tensor, which: Tensor) -> Tensor:
    """x[which], as a product, whose derivatives scatter nothing."""
    return (which[:, None] == torch.arange(len(x), device=x.device)).to(x.dtype) @ x


def sum_rows(x: Tensor, which: Tensor, count: int) -> Tensor:
    """(count, D): the sum of the rows of x (M, D) that have each index."""
    return (torch.arange(count, device=x.device)[:, None] == which).to(x.dtype) @ x


def whiten(x: Tensor, *, method: str = "cholesky", eps: float = 0.0, iterations: int = 5) -> Tensor:
    """Whitens every group of x (..., n, D) on its own: the result has covariance I.

    With Xc = X - mean, C = (1 - eps) Xc^T Xc / (n - 1) + eps I:
    cholesky       Z = Xc L^-T with C = L L^T (W-MSE, Ermolov et al. 2021)
    zca            Z = Xc C^-1/2 by eigendecomposition; autograd through it needs distinct
                   eigenvalues
    newton_schulz  P <- 1.5 P - 0.5 P^3 C / tr C from P = I, Z = Xc P / sqrt(tr C) (IterNorm, Huang
                   et al. 2019); approaches zca with the number of iterations
    """
    x = promote(x)
    n, dim = x.shape[-2:]
    centered = x - x.mean(-2, keepdim=True)
    identity = torch.eye(dim, dtype=x.dtype, device=x.device)
    covariance = (1 - eps) * (centered.mT @ centered) / (n - 1) + eps * identity
    if method == "cholesky":
        factor = torch.linalg.cholesky(covariance)
        return torch.linalg.solve_triangular(factor, centered.mT, upper=False).mT
    if method == "zca":
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        return (centered @ vectors * eigenvalues.rsqrt()[..., None, :]) @ vectors.mT
    if method != "newton_schulz":
        raise ValueError(f"method must be 'cholesky', 'zca' or 'newton_schulz', got {method!r}")
    # IterNorm's recursion for P alone diverges in floating point as rounding breaks P C = C P;
    # carrying product = (C / tr C) P beside it gives the same iterates and stays stable
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    product, root = covariance / trace, identity.expand_as(covariance)
    for _ in range(iterations):
        step = 1.5 * identity - 0.5 * root @ product
        product, root = product @ step, step @ root
    return centered @ root / trace.sqrt()


def reduce(rows: Tensor, reduction: str) -> Tensor:
    """The mean or the sum of the loss per row, or the rows themselves."""
    if reduction == "mean":
        return rows.mean()
    if reduction == "sum":
        return rows.sum()
    if reduction == "none":
        return rows
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def at_prefixes(*features: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorates a loss: with `dims` it is the sum over d in dims, weighted by `weights`, of that of
    the first d of these features (Matryoshka; Kusupati et al. 2022, eq. 1)."""

    def decorate(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        names = tuple(inspect.signature(loss).parameters)

        @functools.wraps(loss)
        def call(
            *args: Any,
            dims: Sequence[int] | None = None,
            weights: Sequence[float] | None = None,
            **options: Any,
        ) -> Tensor:
            if dims is None:
                return loss(*args, **options)
            given = {**dict(zip(names, args, strict=False)), **options}
            there = [name for name in features if given.get(name) is not None]
            parts = [
                loss(**{**given, **{name: given[name][..., :d] for name in there}}) for d in dims
            ]
            return functools.reduce(
                add, (w * part for w, part in zip(weights or [1] * len(dims), parts, strict=True))
            )

        return call

    return decorate


def cross_entropy_rows(
    positive: Tensor, negatives: Tensor, kept: Tensor, alpha: float | None
) -> Tensor:
    """Cross entropy (N,) of each positive logit (N,) against its kept negative logits (N, M).

    With alpha, log(alpha / K_i) is added to the K_i negatives that row i really has.
    """
    if alpha is not None:
        count = kept.sum(1, keepdim=True).clamp(min=1).to(negatives.dtype)
        negatives = negatives + (alpha / count).log()
    logits = torch.cat([positive[:, None], negatives.masked_fill(~kept, -torch.inf)], 1)
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, target, reduction="none")


@at_prefixes("query", "key", "negatives")
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float = 0.1,
    scale: float | Tensor | None = None,
    alpha: float | None = None,
    in_batch: bool | None = None,
    symmetric: bool = False,
    exclude: IdPair | None = None,
    key_bias: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    negatives_per_query: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """-log( e^{s+} / (e^{s+} + sum_neg e^{s-}) ) with s = scale <q, k>, scale = 1 / temperature.

    van den Oord et al. 2018, eq. 4; alpha: the margin of EqCo (Zhu et al. 2020). query and key
    (N, D); negatives (M, D), (N, M, D), or None for the other rows' keys. The candidates are the
    in-batch keys, if used, followed by the negatives; exclude = (row ids, candidate ids) drops
    negatives, never the positive; key_bias has one entry per candidate and reaches the positive
    when that is one of them. symmetric averages with the direction from keys to in-batch queries.
    Of negatives (N, M, D) those count where negatives_mask (N, M) is True; of (T, D) the next
    negatives_per_query_i are those of query i.
    """
    scale = 1 / temperature if scale is None else scale
    in_batch = negatives is None if in_batch is None else in_batch
    if symmetric and not in_batch:
        raise ValueError("symmetric must be False without in-batch keys, got True")
    n = len(query)
    candidates = [key] if in_batch else []
    mask = None
    if negatives is not None:
        negatives, mask = own_negatives(negatives, negatives_mask, negatives_per_query)
        candidates.append(negatives)
    z = scale * torch.cat([similarity(query, c, normalize) for c in candidates], 1)
    positive = scale * row_dot(query, key, normalize=normalize)
    start = n * in_batch

    def of_pairs(values: Tensor) -> Tensor:
        """What candidates have, for the pairs of each query."""
        if negatives_per_query is None:
            return values.expand(n, -1)
        own = padded(values[start:], negatives_per_query)[0]
        return torch.cat([values[:start].expand(n, -1), own], 1)

    if key_bias is not None:
        z = z + of_pairs(key_bias)
        positive = positive + key_bias[:n] if in_batch else positive
    kept = kept_pairs(z, exclude and (exclude[0], of_pairs(exclude[1])), None)
    if in_batch:
        kept[:, :n].fill_diagonal_(False)
    if mask is not None:
        kept[:, start:] &= mask
    rows = cross_entropy_rows(positive, z, kept, alpha)
    if symmetric:
        columns = cross_entropy_rows(positive, z[:, :n].T, kept[:, :n].T, alpha)
        rows = (rows + columns) / 2
    return reduce(rows, reduction)


def eqco(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    alpha: float = 65536.0,
    temperature: float = 0.2,
    in_batch: bool | None = None,
    symmetric: bool = False,
    exclude: IdPair | None = None,
    negatives_mask: Tensor | None = None,
    negatives_per_query: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """log( e^{s+} + (alpha / K) sum_K e^{s-} ) - s+: InfoNCE with a margin (Zhu et al. 2020)."""
    return info_nce(
        query,
        key,
        negatives=negatives,
        temperature=temperature,
        alpha=alpha,
        in_batch=in_batch,
        symmetric=symmetric,
        exclude=exclude,
        negatives_mask=negatives_mask,
        negatives_per_query=negatives_per_query,
        normalize=normalize,
        reduction=reduction,
    )


def rince(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float = 0.1,
    scale: float | Tensor | None = None,
    q: float = 0.5,
    lam: float = 0.01,
    negatives_mask: Tensor | None = None,
    negatives_per_query: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """-e^{q s+} / q + (lam (e^{s+} + sum_neg e^{s-}))^q / q (Chuang et al. 2022, sec. 4); query and
    key (N, D), negatives (M, D), (N, M, D), or None for the other rows' keys; which of them count
    is as in `info_nce`."""
    scale = 1 / temperature if scale is None else scale
    mask = None
    if negatives is None:
        negatives, mask = key, ~torch.eye(len(key), dtype=torch.bool, device=key.device)
    else:
        negatives, mask = own_negatives(negatives, negatives_mask, negatives_per_query)
    z = scale * similarity(query, negatives, normalize)
    if mask is not None:
        z = z.masked_fill(~mask, -torch.inf)
    positive = (scale * row_dot(query, key, normalize=normalize)).exp()
    denominator = positive + z.exp().sum(1)
    return reduce(-(positive**q) / q + (lam * denominator) ** q / q, reduction)


@at_prefixes("image_features", "text_features")
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Mean of the cross entropies of images over texts and texts over images (Radford et al. 2021,
    fig. 3). reduction="none" gives one value per pair, (N,)."""
    logits = logit_scale * similarity(image_features, text_features, normalize)
    target = torch.arange(len(logits), device=logits.device)
    images = F.cross_entropy(logits, target, reduction="none")
    texts = F.cross_entropy(logits.T, target, reduction="none")
    return reduce((images + texts) / 2, reduction)


@at_prefixes("image_features", "text_features")
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Row sums of -log sigmoid(y_ij (scale s_ij + bias)), y = 1 on the diagonal and -1 elsewhere
    (Zhai et al. 2023, algorithm 1); the mean is over the N images, not over N^2 pairs."""
    logits = logit_scale * similarity(image_features, text_features, normalize) + logit_bias
    sign = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return reduce(-F.logsigmoid(sign * logits).sum(1), reduction)


def clip_distill(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: float | Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """-sum_j q_ij log p_ij, the mean of images over texts and texts over images: q and p are the
    softmax of the teacher's and of the student's logits (Hinton et al. 2015, as in open_clip).
    reduction="none" gives one value per pair, (N,)."""
    student = logit_scale * similarity(image_features, text_features, normalize)
    teacher = teacher_logit_scale * similarity(
        teacher_image_features, teacher_text_features, normalize
    )
    images = -(teacher.softmax(1) * student.log_softmax(1)).sum(1)
    texts = -(teacher.T.softmax(1) * student.T.log_softmax(1)).sum(1)
    return reduce((images + texts) / 2, reduction)


@at_prefixes("query", "documents")
def mnrl(
    query: Tensor,
    documents: Tensor | Sequence[Tensor],
    *,
    scale: float | Tensor = 20.0,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    negatives_mask: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """log sum_c e^{z_ic} - z_i+ over the candidates c of all directions ("joint"), or the mean of
    one such loss for each ("per_direction"), z = scale s (Henderson et al. 2017; GTE, Li et al.
    2023).

    query (N, D); documents (N (1 + K), D) or a sequence of 1 + K blocks (N, D): block by block one
    document of every query, the positives first. hardness_mode names the logits from queries to
    documents that hardness_strength times their detached similarity is added to (Lan et al. 2025).
    A negative whose entry of negatives_mask (N, K) is False is a candidate of nobody.
    """
    documents = documents if isinstance(documents, Tensor) else torch.cat(tuple(documents))
    n, m = len(query), len(documents)
    index = torch.arange(m, device=query.device)
    kept = torch.ones(m, dtype=torch.bool, device=query.device)
    if negatives_mask is not None:
        kept[n:] = negatives_mask.T.flatten()
        documents = documents.masked_fill(~kept[:, None], 0.0)
    positive = documents[:n]
    own = index[:n, None] == index[None, :] % n  # documents of the same query
    own_positive = index[:n, None] == index[None, :]
    harder = {
        None: torch.zeros_like(own),
        "in_batch_negatives": ~own,
        "hard_negatives": own & ~own_positive,
        "all_negatives": ~own_positive,
    }[hardness_mode]
    s = similarity(query, documents, normalize)
    forward = scale * s + hardness_strength * harder * s.detach()
    queries = scale * similarity(query, None, normalize)
    positives = scale * similarity(positive, documents, normalize)
    matrices = {
        "query_to_doc": forward.masked_fill(~kept, -torch.inf),
        "query_to_query": queries.masked_fill(own[:, :n], -torch.inf),
        "doc_to_query": scale * similarity(positive, query, normalize),
        "doc_to_doc": positives.masked_fill(own | ~kept, -torch.inf),
    }
    logits = [matrices[name] for name in directions]
    if partition_mode == "joint":
        logits = [torch.cat(logits, 1)]
    rows = torch.stack([z.logsumexp(1) for z in logits]).mean(0) - forward.diagonal()
    return reduce(rows, reduction)


@at_prefixes("anchor", "positive", "negatives")
def gist(
    anchor: Tensor,
    positive: Tensor,
    anchor_guide: Tensor | None = None,
    positive_guide: Tensor | None = None,
    *,
    negatives: Tensor | None = None,
    negatives_guide: Tensor | None = None,
    temperature: float = 0.01,
    scale: float | Tensor | None = None,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of each positive among the pairs that a guide does not call more similar than
    the positive less a margin (GISTEmbed, Solatorio 2024).

    anchor and positive (N, D), negatives (M, D), their guides (N, G) and (M, G). The pairs: anchor
    and other positives, anchors and anchors, positives and positives, anchor and negatives.
    margin_strategy: "absolute", g+ - margin, or "relative", g+ - |g+| margin. Without guides the
    features are their own, and no pair is of a feature with itself (Qwen3-Embedding, 2025, eq. 2).
    """
    scale = 1 / temperature if scale is None else scale
    alone = anchor_guide is None or positive_guide is None
    if anchor_guide is None or positive_guide is None:
        anchor_guide, positive_guide = anchor.detach(), positive.detach()
        negatives_guide = None if negatives is None else negatives.detach()
    anchor_guide, positive_guide = anchor_guide.double(), positive_guide.double()
    limit = row_dot(anchor_guide, positive_guide, normalize=normalize)
    limit = limit + 64 * torch.finfo(limit.dtype).eps * (1 + limit.abs())  # a tie is not above it
    limit = limit - margin * (limit.abs() if margin_strategy == "relative" else 1)
    anchors, positives = (anchor, anchor_guide), (positive, positive_guide)
    contrasts = [(anchors, positives)]
    if contrast_anchors:
        contrasts.append((anchors, anchors))
    if contrast_positives:
        contrasts.append((positives, positives))
    if negatives is not None and negatives_guide is not None:
        contrasts.append((anchors, (negatives, negatives_guide.double())))
    logits, kept = [], []
    for (x, x_guide), (y, y_guide) in contrasts:
        logits.append(scale * similarity(x, y, normalize))
        kept.append(~(similarity(x_guide, y_guide, normalize) > limit[:, None]))
        if alone and x is y:
            kept[-1].fill_diagonal_(False)
    kept[0].fill_diagonal_(False)  # the positive itself
    dot = scale * row_dot(anchor, positive, normalize=normalize)
    rows = cross_entropy_rows(dot, torch.cat(logits, 1), torch.cat(kept, 1), None)
    return reduce(rows, reduction)


def cpc(
    predictions: Tensor,
    targets: Tensor,
    *,
    negatives_from: str = "both",
    temperature: float = 1.0,
    scale: float | Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """-log( e^{s+} / (e^{s+} + sum_neg e^{s-}) ) of every prediction (n, t, s) against the target
    z_{n, t+s+1} (van den Oord et al. 2018, eq. 4), s = <prediction, z> / temperature.

    predictions (N, T, S, D), targets (N, T, D); the negatives are targets of other "sequences", of
    other "times" of the same sequence, or of "both". reduction="none" gives (N, P), by step and
    then by time, for the P pairs (t, s) with t + s + 1 < T.
    """
    scale = 1 / temperature if scale is None else scale
    n, times, steps, _ = predictions.shape
    keys = targets.flatten(0, 1)
    sequence = torch.arange(n, device=keys.device).repeat_interleave(times)
    time = torch.arange(times, device=keys.device).repeat(n)
    other_sequence = torch.arange(n, device=keys.device)[:, None] != sequence[None, :]
    rows = []
    for step in range(1, min(steps, times - 1) + 1):
        for now in range(times - step):
            query, target = predictions[:, now, step - 1], targets[:, now + step]
            other_time = ~other_sequence & (time != now + step)[None, :]
            both = other_sequence | other_time
            kept = {"sequences": other_sequence, "times": other_time, "both": both}[negatives_from]
            positive = scale * row_dot(query, target, normalize=normalize)
            logits = scale * similarity(query, keys, normalize)
            rows.append(cross_entropy_rows(positive, logits, kept, None))
    return reduce(torch.stack(rows, 1), reduction)


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """-(1/|P_i|) sum_{p in P_i} log( e^{s_ip/t} / sum_{a != i} e^{s_ia/t} ), times t / base.

    L_out of Khosla et al. 2020, eq. 2. features (N, D) or (N, V, D), labels (N,). Every view of
    every sample is an anchor; an anchor without a positive counts as 0. reduction="none" gives
    (N,) or (N, V). base_temperature None means temperature.
    """
    z = features.reshape(-1, features.shape[-1])
    labels = labels.repeat_interleave(len(z) // len(labels))
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels[None, :]) & ~own
    logits = similarity(z, None, normalize) / temperature
    log_p = logits - logits.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    rows = -torch.where(positive, log_p, 0.0).sum(1) / positive.sum(1).clamp(min=1)
    if base_temperature is not None:
        rows = rows * temperature / base_temperature
    return reduce(rows.view(features.shape[:-1]), reduction)


def two_views(z1: Tensor, z2: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities (2N, 2N) of cat(z1, z2), the positive of each anchor (2N,), and the mask of its
    2N - 2 negatives: all but itself and its positive."""
    s = similarity(torch.cat([z1, z2]), None, normalize)
    sample = torch.arange(len(z1), device=z1.device).repeat(2)
    positive = s.diagonal(len(z1)).repeat(2)
    return s, positive, sample[:, None] != sample[None, :]


@at_prefixes("z1", "z2")
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.1,
    scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of the other view among the 2N - 1 other features, for the 2N anchors
    cat(z1, z2) (SimCLR, Chen et al. 2020, eq. 1). reduction="none" gives (2N,)."""
    n = len(z1)
    scale = 1 / temperature if scale is None else scale
    logits = scale * similarity(torch.cat([z1, z2]), None, normalize)
    own = torch.eye(2 * n, dtype=torch.bool, device=logits.device)
    target = torch.arange(2 * n, device=logits.device).roll(n)
    rows = F.cross_entropy(logits.masked_fill(own, -torch.inf), target, reduction="none")
    return reduce(rows, reduction)


def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.1,
    scale: float | Tensor | None = None,
    sigma: float | None = None,
    weight: float | Tensor = 1.0,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """-w_i s+/t + log sum_neg e^{s-/t} over 2N anchors and 2N - 2 negatives, the positive not in
    the sum (Yeh et al. 2022). w = 1, or with sigma w_i = 2 - N softmax_i(s+ / sigma) over
    the N pairs (DCLW), differentiated. reduction="none" gives (2N,)."""
    scale = 1 / temperature if scale is None else scale
    s, positive, negative = two_views(z1, z2, normalize)
    if sigma is not None:
        weight = 2 - len(z1) * torch.softmax(positive[: len(z1)] / sigma, 0).repeat(2)
    negatives = (scale * s).masked_fill(~negative, -torch.inf)
    return reduce(negatives.logsumexp(1) - weight * scale * positive, reduction)


def debiased_rows(
    mean_ratio: Tensor, positive: Tensor, temperature: float, tau_plus: float
) -> Tensor:
    """log(1 + g/u) with u = e^{s+/t}, g = max((S - tau_plus K u) / (1 - tau_plus), K e^{-1/t}).

    mean_ratio is S / (K u) and K = 2N - 2; everything is divided by u so that nothing overflows.
    """
    count = len(positive) - 2
    estimate = count * (mean_ratio - tau_plus) / (1 - tau_plus)
    floor = count * torch.exp(-(1 + positive) / temperature)
    return torch.log1p(torch.maximum(estimate, floor))


def debiased(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    tau_plus: float = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """-log( u / (u + g) ), g the negatives' sum corrected for the share tau_plus of false ones
    (Chuang et al. 2020, with one positive). reduction="none" gives (2N,)."""
    s, positive, negative = two_views(z1, z2, normalize)
    log_ratio = ((s - positive[:, None]) / temperature).masked_fill(~negative, -torch.inf)
    mean_ratio = log_ratio.exp().sum(1) / (len(s) - 2)
    return reduce(debiased_rows(mean_ratio, positive, temperature, tau_plus), reduction)


def hcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Debiased, with the negatives' mean weighted by softmax(beta s / t): hard negatives count more
    (Robinson et al. 2021). Differentiated through the weights. reduction="none" gives (2N,).
    """
    s, positive, negative = two_views(z1, z2, normalize)
    log_ratio = ((s - positive[:, None]) / temperature).masked_fill(~negative, -torch.inf)
    weight = (beta * s / temperature).masked_fill(~negative, -torch.inf).softmax(1)
    mean_ratio = (weight * log_ratio.exp()).sum(1)
    return reduce(debiased_rows(mean_ratio, positive, temperature, tau_plus), reduction)


def nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    *,
    temperature: float = 0.07,
    num_data: int,
    Z: float | Tensor | None = None,
    negatives_mask: Tensor | None = None,
    negatives_per_query: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """-log h(key) - sum_j log(1 - h(negative_j)), h = P / (P + m / num_data), P = e^{s/t} / Z.

    Instance discrimination, Wu et al. 2018, section 3.2. query and key (N, D), negatives (m, D) or
    (N, m, D), which of them count as in `info_nce`, m then being their number for each query. Z
    None is num_data times the mean of e^{s/t} over all positives and negatives of this call,
    detached.
    """
    negatives, mask = own_negatives(negatives, negatives_mask, negatives_per_query)
    positive = row_dot(query, key, normalize=normalize)[:, None] / temperature
    logits = torch.cat([positive, similarity(query, negatives, normalize) / temperature], 1)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None:
        kept[:, 1:] = mask
    if Z is None:
        mean_exp = logits.detach()[kept].logsumexp(0) - kept.sum().to(logits.dtype).log()
        log_z = math.log(num_data) + mean_exp
    else:
        log_z = torch.as_tensor(Z, dtype=logits.dtype, device=logits.device).log()
    # h is the sigmoid of the log odds log P - log(m / num_data)
    noise = kept[:, 1:].sum(1, keepdim=True).to(logits.dtype)
    log_odds = (logits - log_z - (noise / num_data).log()).masked_fill(~kept, -torch.inf)
    rows = -F.logsigmoid(log_odds[:, 0]) - F.logsigmoid(-log_odds[:, 1:]).sum(1)
    return reduce(rows, reduction)


def attraction(query: Tensor, positives: Tensor, t_pos: float, detach: bool) -> Tensor:
    """sum_k softmax_k(t_pos d_ik) d_ik with d = |q - k|^2: query (N, D), positives (N, K, D)."""
    distance = (query[:, None, :] - positives).square().sum(-1)
    weight = (t_pos * distance).softmax(1)
    return ((weight.detach() if detach else weight) * distance).sum(1)


def repulsion(
    query: Tensor,
    negatives: Tensor,
    kept: Tensor,
    t_neg: float,
    cost: str,
    rbf_t: float,
    detach: bool,
) -> Tensor:
    """With w = softmax_j(-t_neg d_ij) over the kept pairs: -sum_j w d per row ("euclidean"), or the
    one number log mean_i sum_j w e^{-rbf_t d} ("rbf", where the log couples the rows)."""
    squares = query.square().sum(1)[:, None] + negatives.square().sum(1)[None, :]
    distance = squares - 2 * query @ negatives.T
    log_weight = (-t_neg * distance).masked_fill(~kept, -torch.inf).log_softmax(1)
    log_weight = log_weight.detach() if detach else log_weight
    if cost == "euclidean":
        return -(log_weight.exp() * distance).sum(1)
    rows = (log_weight - rbf_t * distance).logsumexp(1)  # whose exp may be 0
    return rows.logsumexp(0) - math.log(len(rows))


def check_cost(cost: str, reduction: str) -> None:
    if cost not in ("euclidean", "rbf"):
        raise ValueError(f"cost must be 'euclidean' or 'rbf', got {cost!r}")
    if cost == "rbf" and reduction != "mean":
        raise ValueError(
            f"reduction must be 'mean' with cost='rbf', whose rows are coupled, got {reduction!r}"
        )


def cacr(
    query: Tensor,
    positives: Tensor,
    *,
    negatives: Tensor | None = None,
    t_pos: float = 1.0,
    t_neg: float = 2.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    cost: str = "euclidean",
    rbf_t: float = 2.0,
    detach_weights: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """alpha sum_k w+_ik d_ik - beta sum_j w-_ij d_ij, d = |q - k|^2, w+ = softmax_k(t_pos d_ik),
    w- = softmax_j(-t_neg d_ij).

    Contrastive attraction and contrastive repulsion, Zheng et al. 2023. query (N, D), positives
    (N, D) or (N, K, D), negatives (M, D), or None: the (N - 1) K positives of the other rows in one
    softmax. cost="rbf" replaces the repulsion by beta log mean_i sum_j w-_ij e^{-rbf_t d_ij}, as
    the official code does (its losses/__init__.py), and couples the rows: reduction="mean" only.
    """
    check_cost(cost, reduction)
    query, positives = promote(query), promote(positives)
    positives = positives[:, None, :] if positives.dim() == 2 else positives
    if normalize:
        query, positives = F.normalize(query, dim=-1), F.normalize(positives, dim=-1)
    if negatives is None:
        row = torch.arange(len(query), device=query.device)
        kept = row[:, None] != row.repeat_interleave(positives.shape[1])[None, :]
        negatives = positives.flatten(0, 1)
    else:
        negatives = promote(negatives)
        negatives = F.normalize(negatives, dim=-1) if normalize else negatives
        kept = torch.ones(len(query), len(negatives), dtype=torch.bool, device=query.device)
    attract = attraction(query, positives, t_pos, detach_weights)
    repel = repulsion(query, negatives, kept, t_neg, cost, rbf_t, detach_weights)
    return reduce(alpha * attract + beta * repel, reduction)


def cacr_views(
    views: Tensor,
    *,
    t_pos: float = 1.0,
    t_neg: float = 2.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    cost: str = "euclidean",
    rbf_t: float = 2.0,
    detach_weights: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """CACR of V views (V, N, D): the attraction is averaged over every view as query with all other
    views as its positives, the repulsion over the view pairs v < u, from z_iv to z_ju with j != i
    (official code of Zheng et al. 2023, small_scale_experiments). Options as in `cacr`."""
    check_cost(cost, reduction)
    views = promote(views)
    views = F.normalize(views, dim=-1) if normalize else views
    count, n, _ = views.shape
    other_rows = ~torch.eye(n, dtype=torch.bool, device=views.device)
    attract = []
    for v in range(count):
        others = torch.cat([views[:v], views[v + 1 :]]).transpose(0, 1)
        attract.append(attraction(views[v], others, t_pos, detach_weights))
    repel = [
        repulsion(views[v], views[u], other_rows, t_neg, cost, rbf_t, detach_weights)
        for v, u in combinations(range(count), 2)
    ]
    attracted, repelled = functools.reduce(add, attract), functools.reduce(add, repel)
    return reduce(alpha * attracted / count + beta * repelled / len(repel), reduction)


def cct(
    query: Tensor,
    positives: Tensor,
    *,
    negatives: Tensor | None = None,
    t_pos: float = 1.0,
    t_neg: float = 2.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    detach_weights: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Contrastive conditional transport: the Euclidean form of `cacr` under its first name
    (arXiv 2105.03746, version 1)."""
    return cacr(
        query,
        positives,
        negatives=negatives,
        t_pos=t_pos,
        t_neg=t_neg,
        alpha=alpha,
        beta=beta,
        detach_weights=detach_weights,
        normalize=normalize,
        reduction=reduction,
    )


def w_mse(
    views: Tensor,
    *,
    group_size: int = 128,
    iterations: int = 1,
    eps: float = 0.0,
    method: str = "cholesky",
    permutations: Tensor | None = None,
    generator: torch.Generator | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Mean over view pairs and iterations of 2 - 2 cos(z_iv, z_iu), z the whitened views.

    W-MSE, Ermolov et al. 2021. views (V, N, D); per iteration one permutation of the N indices,
    cut into groups of group_size, the same for all views; every view of a group is whitened on its
    own. permutations (iterations, N), or drawn. normalize=False: mean_d (z_iv - z_iu)^2 instead.
    """
    views = promote(views)
    count, n, dim = views.shape
    if permutations is None:
        device = "cpu" if generator is None else generator.device
        drawn = [torch.randperm(n, generator=generator, device=device) for _ in range(iterations)]
        permutations = torch.stack(drawn).to(views.device)
    values = []
    for permutation in permutations:
        groups = views[:, permutation].view(count, n // group_size, group_size, dim)
        z = whiten(groups, method=method, eps=eps).reshape(count, n, dim)[:, permutation.argsort()]
        z = F.normalize(z, dim=-1) if normalize else z
        for v, u in combinations(range(count), 2):
            if normalize:
                values.append(2 - 2 * (z[v] * z[u]).sum(-1))
            else:
                values.append((z[v] - z[u]).square().mean(-1))
    return reduce(torch.stack(values).mean(0), reduction)


def intl(
    views: Tensor,
    *,
    axis: int = 0,
    lam: float | None = None,
    iterations: int = 4,
    reduction: str = "mean",
) -> Tensor:
    """INTL, Weng et al. 2024: views (V, N, D), each after iterative normalisation, t_v;
    mean over v > 0 of 2 - 2 cos(t_v, t_0) + lam (TL_v + TL_0), TL = sum (variance - 1)^2.

    axis 0: of the samples over their features, 1: of the features over the batch. lam None:
    0.01 (log2 of the number of variances - 3). A row is its distance plus all trace losses.
    """
    views = promote(views)
    transformed, traces = [], []
    for view in views:
        x = view.T if axis == 0 else view  # variances are over the rows
        centered = x - x.mean(0)
        covariance = centered.T @ centered / (len(x) - 1)
        p = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        for _ in range(iterations):  # as published; it is stable for so few steps
            p = 1.5 * p - 0.5 * p @ p @ p @ covariance / covariance.trace()
        z = centered @ p / covariance.trace().sqrt()
        traces.append((z.var(0) - 1).square().sum())
        transformed.append(z.T if axis == 0 else z)
    if lam is None:
        lam = 0.01 * (math.log2(views.shape[1 + axis]) - 3)
    rows = [
        2 - 2 * F.cosine_similarity(z, transformed[0], eps=0.0) + lam * (trace + traces[0])
        for z, trace in zip(transformed[1:], traces[1:], strict=True)
    ]
    return reduce(torch.stack(rows).mean(0), reduction)


def koleo(
    features: Tensor, *, eps: float = 1e-8, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    """-log(|x_i - x_j + eps| + eps) of features of unit length, j the nearest other row.

    Sablayrolles et al. 2019, sec. 3.1, with the two eps of DINOv2's code.
    """
    x = promote(features)
    x = F.normalize(x, dim=-1) if normalize else x
    products = (x @ x.T).detach().fill_diagonal_(-torch.inf)
    nearest = products.max(1).indices
    distance = F.pairwise_distance(x, x[nearest], eps=eps)
    return reduce(-(distance + eps).log(), reduction)


def triplet(
    features: Tensor,
    labels: Tensor,
    *,
    mining: str = "hard",
    margin: float | None = 0.2,
    distance: str = "euclidean",
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Hinge of d_ip - d_in + margin, of all positives p of an anchor, or of the farthest one.

    "hard": Hermans et al. 2017, eq. 5, n the nearest negative. "semihard": Schroff et al. 2015,
    sec. 3.2, n the nearest of those farther than p, else the farthest; times rows over pairs.
    """
    x = promote(features)
    x = F.normalize(x, dim=-1) if normalize else x
    losses, pairs = [x.nan_to_num().sum(1) * 0], 0
    for i in range(len(x)):
        d = (x[i] - x).norm(dim=1)
        d = {"euclidean": d, "squared_euclidean": d**2, "cosine": d**2 / 2}[distance]
        same = labels == labels[i]
        others = torch.arange(len(x), device=x.device) != i
        pos, neg = d[same & others], d[~same]
        pairs += len(pos)
        chosen = []
        if len(pos) and len(neg) and mining == "hard":
            chosen = [pos.max(0).values - neg.min(0).values]
        elif len(neg):
            chosen = [
                p - (neg[neg > p].min(0) if (neg > p).any() else neg.max(0)).values for p in pos
            ]
        if chosen and d.isnan().any():
            chosen = [d.sum()]
        for each in chosen:
            value = F.softplus(each) if margin is None else (each + margin).relu()
            losses.append(torch.where(others, 0.0, value))
    rows = torch.stack(losses).sum(0)
    if mining == "semihard":
        rows = rows * (len(x) / max(1, pairs))
    return reduce(rows, reduction)


def max_sim(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    temperature: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """ColBERT, Khattab and Zaharia 2020, eq. 3: sum_i max_j <q_ni, d_mj> of tokens (N, Lq, D) and
    (M, Ld, D): (N, M); or (N, K, Ld, D), documents of each query: (N, K).

    Tokens count where the masks, of the shapes without D, are True. temperature t: the smooth
    maximum t log sum_j exp(<q_ni, d_mj> / t).
    """
    queries, documents = promote(queries), promote(documents)
    if query_mask is not None:
        queries = queries.masked_fill(~query_mask[..., None], 0.0)
    if document_mask is not None:
        documents = documents.masked_fill(~document_mask[..., None], 0.0)
    if normalize:
        queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    shared = documents.dim() == 3
    z = torch.einsum("nid,mjd->nmij" if shared else "nid,nmjd->nmij", queries, documents)
    kept = torch.ones_like(z, dtype=torch.bool)
    if document_mask is not None:  # (M, 1, Ld) or (N, K, 1, Ld)
        kept = kept & document_mask.unsqueeze(-2)
    if temperature is None:
        z = torch.where(kept, z, -torch.inf)
        first = torch.arange(z.shape[-1], device=z.device) == z.argmax(-1, keepdim=True)
        largest = torch.where(first, z, 0.0).sum(-1)  # max would scatter its gradient
    else:
        largest = temperature * masked_softmax_stats(z / temperature, kept)[0]
    if query_mask is not None:
        largest = torch.where(query_mask[:, None], largest, 0.0)
    return largest.sum(-1)


def late_interaction(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    temperature: float = 1.0,
    scale: float | Tensor | None = None,
    symmetric: bool = False,
    max_temperature: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """-log softmax over all documents of scale * max_sim, of the first document of each query;
    `symmetric` averages it with that of these documents over all queries.

    Queries (N, Lq, D), documents (N, K, Ld, D), or (N, Ld, D) for K = 1.
    """
    if documents.dim() == 3:
        documents = documents[:, None]
        document_mask = None if document_mask is None else document_mask[:, None]
    n, each = documents.shape[:2]
    z = (1 / temperature if scale is None else scale) * max_sim(
        queries,
        documents.flatten(0, 1),
        query_mask=query_mask,
        document_mask=None if document_mask is None else document_mask.flatten(0, 1),
        temperature=max_temperature,
        normalize=normalize,
    )
    own = torch.arange(n, device=z.device)
    rows = -z.log_softmax(1)[own, own * each]
    if symmetric:
        rows = (rows - z[:, ::each].log_softmax(0).diagonal()) / 2
    return reduce(rows, reduction)


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
) -> Tensor:
    """Of the scores s of documents (N, K, Ld, D) of each query and those t of a teacher (N, K):
    "kl": temperature^2 sum_k q_k (log q_k - log p_k), p = softmax(s / temperature), q likewise;
    "margin_mse": the mean over k > 0 of ((s_0 - s_k) - (t_0 - t_k))^2.

    normalize_scores: (s - min s) / (max s - min s + 1e-8) first, of each query.
    """
    s = max_sim(
        queries, documents, query_mask=query_mask, document_mask=document_mask,
        temperature=max_temperature, normalize=normalize,
    )  # fmt: skip
    t = teacher_scores.to(s.dtype)
    if normalize_scores:
        low, high = s.min(1, keepdim=True).values, s.max(1, keepdim=True).values
        s = (s - low) / (high - low + 1e-8)
    if objective == "kl":
        log_p = (s / temperature).log_softmax(1)
        of_teacher = temperature if teacher_temperature is None else teacher_temperature
        log_q = (t / of_teacher).log_softmax(1)
        return reduce(temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1), reduction)
    difference = (s[:, :1] - s[:, 1:]) - (t[:, :1] - t[:, 1:])
    return reduce(difference.square().mean(1), reduction)


def mi_lower_bound(loss: Tensor, num_negatives: int | Tensor) -> Tensor:
    """log(K + 1) - loss, detached: InfoMin's I_NCE (Tian et al. 2020), in nats. A bound of
    the mutual information for InfoNCE without a margin only."""
    candidates = torch.as_tensor(num_negatives, dtype=loss.dtype, device=loss.device) + 1
    return candidates.log() - loss.detach()
