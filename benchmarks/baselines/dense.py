"""Every loss in plain eager torch, as fast as it gets with the whole similarity matrix in memory.

These are the baselines: the temperature is multiplied into the small operand, masks are filled in
place, softmaxes go through torch's fused functions. Signatures are those of `contrastive_kernels`,
restricted to what the cases use. In float64 the same functions serve as oracle for small sizes.
"""

import math
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

# A logit that no softmax sees, finite so that 0 * LOW is 0.
LOW = -1e30


def low(logits: Tensor) -> float:
    """LOW, or the least number of a dtype that has it not."""
    return max(LOW, torch.finfo(logits.dtype).min)


def own_index(rows: Tensor) -> Tensor:
    """Target of a cross entropy whose positive is on the diagonal."""
    return torch.arange(len(rows), device=rows.device)


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float,
    symmetric: bool = False,
) -> Tensor:
    """InfoNCE against the other rows' keys, or against negatives (M, D) of unit length."""
    query, key = F.normalize(query, dim=1) / temperature, F.normalize(key, dim=1)
    if negatives is not None:
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ negatives.T], 1)
        return F.cross_entropy(logits, torch.zeros_like(own_index(query)))
    logits = query @ key.T
    rows = F.cross_entropy(logits, own_index(query))
    return (rows + F.cross_entropy(logits.T, own_index(key))) / 2 if symmetric else rows


def eqco(query: Tensor, key: Tensor, *, alpha: float, temperature: float) -> Tensor:
    """InfoNCE whose positive logit is lowered by log(alpha / K), K the number of negatives."""
    query, key = F.normalize(query, dim=1) / temperature, F.normalize(key, dim=1)
    logits = query @ key.T
    logits.diagonal().sub_(math.log(alpha / (len(key) - 1)))
    return F.cross_entropy(logits, own_index(query))


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean of the cross entropies of the rows and of the columns."""
    images = logit_scale * F.normalize(image_features, dim=1)
    logits = images @ F.normalize(text_features, dim=1).T
    target = own_index(images)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def mnrl(query: Tensor, documents: Tensor, *, scale: float = 20.0) -> Tensor:
    """Cross entropy of the first N documents (M, D), each against all others."""
    query, documents = scale * F.normalize(query, dim=1), F.normalize(documents, dim=1)
    return F.cross_entropy(query @ documents.T, own_index(query))


def siglip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Sigmoid loss; softplus(-z) = softplus(z) - z turns the diagonal's sign."""
    images = logit_scale * F.normalize(image_features, dim=1)
    logits = images @ F.normalize(text_features, dim=1).T + logit_bias
    # logsigmoid, because softplus is cut off at 20, too coarse for float64
    return (-F.logsigmoid(-logits).sum() - logits.diagonal().sum()) / len(logits)


def sup_con(features: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """L_out with the positives picked by a label mask."""
    features = F.normalize(features, dim=1)
    logits = (features / temperature) @ features.T
    logits.fill_diagonal_(low(logits))
    positive = (labels[:, None] == labels[None, :]).fill_diagonal_(False)
    mean_positive = (logits * positive).sum(1) / positive.sum(1).clamp(min=1)
    return ((logits.logsumexp(1) - mean_positive) * positive.any(1)).mean()


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
    """Cross entropy of the other view among the 2N - 1 other features."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z / temperature) @ z.T
    logits.fill_diagonal_(low(logits))
    return F.cross_entropy(logits, own_index(z).roll(len(z1)))


def negative_logits(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Positive logits (2N,), and logits (2N, 2N) with the positives and the diagonal at LOW."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    positive = ((z1 * z2).sum(1) / temperature).repeat(2)
    z = torch.cat([z1, z2])
    sample = own_index(z1).repeat(2)
    logits = (z / temperature) @ z.T
    return positive, logits.masked_fill_(sample[:, None] == sample[None, :], low(logits))


def dcl(z1: Tensor, z2: Tensor, *, temperature: float, sigma: float | None = None) -> Tensor:
    """Decoupled: the positive is not in the denominator; sigma weighs the positives."""
    positive, logits = negative_logits(z1, z2, temperature)
    weight = 1.0
    if sigma is not None:
        similarity = positive[: len(z1)] * temperature
        weight = 2 - len(z1) * torch.softmax(similarity / sigma, 0).repeat(2)
    return (logits.logsumexp(1) - weight * positive).mean()


def corrected(estimate: Tensor, positive: Tensor, temperature: float, tau_plus: float) -> Tensor:
    """mean log(1 + g / u), g the estimate of the negatives' sum without its false negatives."""
    count = len(positive) - 2
    exp_positive = positive.exp()
    corrected_sum = (estimate - tau_plus * count * exp_positive) / (1 - tau_plus)
    floor = count * math.exp(-1 / temperature)
    return torch.log1p(corrected_sum.clamp(min=floor) / exp_positive).mean()


def debiased(z1: Tensor, z2: Tensor, *, temperature: float, tau_plus: float) -> Tensor:
    """Debiased contrastive loss."""
    positive, logits = negative_logits(z1, z2, temperature)
    return corrected(logits.exp().sum(1), positive, temperature, tau_plus)


def hcl(z1: Tensor, z2: Tensor, *, temperature: float, tau_plus: float, beta: float) -> Tensor:
    """Debiased, hard negatives weighted up."""
    positive, logits = negative_logits(z1, z2, temperature)
    weight = torch.softmax(beta * logits, 1)
    estimate = (len(positive) - 2) * (weight * logits.exp()).sum(1)
    return corrected(estimate, positive, temperature, tau_plus)


def nce(
    query: Tensor, key: Tensor, negatives: Tensor, *, temperature: float, num_data: int, Z: float
) -> Tensor:
    """Noise contrastive estimation with negatives (M, D) of unit length."""
    query, key = F.normalize(query, dim=1) / temperature, F.normalize(key, dim=1)
    shift = math.log(Z) + math.log(len(negatives) / num_data)
    positive = (query * key).sum(1) - shift
    negative = query @ negatives.T - shift
    return -(F.logsigmoid(positive).sum() + F.logsigmoid(-negative).sum()) / len(query)


def attraction(query: Tensor, positives: Tensor, t_pos: float) -> Tensor:
    """Squared distances to positives (N, K, D), far ones weighted up: the mean over the rows."""
    distance = (query[:, None] - positives).square().sum(2)
    return (torch.softmax(t_pos * distance, 1) * distance).sum(1).mean()


def repulsion(query: Tensor, negatives: Tensor, own: Tensor | None, t_neg: float) -> Tensor:
    """Minus the squared distances to negatives (M, D), near ones weighted up; pairs in own (N, M)
    do not count."""
    distance = 2 - 2 * (query @ negatives.T)
    logits = -t_neg * distance
    if own is not None:
        logits.masked_fill_(own, low(logits))
    return -(torch.softmax(logits, 1) * distance).sum(1).mean()


def cacr(
    query: Tensor,
    positives: Tensor,
    *,
    negatives: Tensor | None = None,
    t_pos: float = 1.0,
    t_neg: float = 2.0,
) -> Tensor:
    """Contrastive attraction and repulsion; without negatives all other rows' positives are."""
    query, positives = F.normalize(query, dim=1), F.normalize(positives, dim=2)
    own = None
    if negatives is None:
        negatives = positives.flatten(0, 1)
        row = own_index(query)
        own = row[:, None] == row.repeat_interleave(positives.shape[1])[None, :]
    else:
        negatives = F.normalize(negatives, dim=1)
    return attraction(query, positives, t_pos) + repulsion(query, negatives, own, t_neg)


cct = cacr


def cacr_views(views: Tensor, *, t_pos: float = 1.0, t_neg: float = 2.0) -> Tensor:
    """The multi-view form: attraction from every view, repulsion over the view pairs."""
    views = F.normalize(views, dim=2)
    count = len(views)
    own = torch.eye(views.shape[1], dtype=torch.bool, device=views.device)
    attract = [
        attraction(views[v], torch.cat([views[:v], views[v + 1 :]]).transpose(0, 1), t_pos)
        for v in range(count)
    ]
    repel = [repulsion(views[v], views[u], own, t_neg) for v, u in combinations(range(count), 2)]
    return sum(attract) / count + sum(repel) / len(repel)


def w_mse(views: Tensor, *, group_size: int, permutations: Tensor) -> Tensor:
    """Whitening loss of two views, all groups in one batched Cholesky factorisation."""
    groups = views[:, permutations[0]].unflatten(1, (-1, group_size))
    centered = groups - groups.mean(2, keepdim=True)
    factor = torch.linalg.cholesky(centered.mT @ centered / (group_size - 1))
    white = torch.linalg.solve_triangular(factor, centered.mT, upper=False)
    return (2 - 2 * F.cosine_similarity(white[0], white[1], dim=1)).mean()
