"""What a loss and its gradients must be, in float64 on the same (rounded) inputs.

Large sizes are summed over blocks of rows, so that no float64 similarity matrix is stored whole.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]

# Entries of one float64 block of the similarity matrix (128 MiB).
BLOCK = 2**24


class Truth(NamedTuple):
    """Value and gradients in float64; gradients of the inputs that require one.

    value: a tensor where that is what the step returns.
    rows: where only these rows of the gradients are known; the value may then be nan: unknown.
    """

    value: float | Tensor
    gradients: Tensors
    rows: Tensor | None = None


Oracle = Callable[..., Truth]


def _leaves(tensors: Tensors) -> Tensors:
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in tensors.items()
    }


def _gradients(leaves: Tensors) -> Tensors:
    return {name: t.grad for name, t in leaves.items() if t.grad is not None}


def whole(loss: Callable[..., Tensor]) -> Oracle:
    """The oracle of a small case: `loss` itself in float64."""

    def evaluate(tensors: Tensors, options: dict, backward: bool = True) -> Truth:
        leaves = _leaves(tensors)
        value = loss(**leaves, **options)
        if backward:
            value.backward()
        return Truth(value.item(), _gradients(leaves))

    return evaluate


def result(function: Callable[..., Tensor]) -> Oracle:
    """The oracle of a forward pass that returns a tensor: `function` itself in float64."""

    def evaluate(tensors: Tensors, options: dict, backward: bool = False) -> Truth:
        if backward:
            raise ValueError("a tensor has no backward pass: project it, and use whole()")
        with torch.no_grad():
            return Truth(function(**_leaves(tensors), **options), {})

    return evaluate


def by_rows(row_sum: Callable[..., Tensor]) -> Oracle:
    """The oracle of a large case: `row_sum(rows, **features)` is the loss summed over a slice.

    It gets features of unit length; the gradient is accumulated with respect to these and taken
    through the normalisation once.
    """

    def evaluate(tensors: Tensors, options: dict, backward: bool = True) -> Truth:
        leaves = _leaves(tensors)
        unit = {n: F.normalize(t, dim=-1) if t.dim() > 1 else t for n, t in leaves.items()}
        features = {n: t.detach().requires_grad_(t.requires_grad) for n, t in unit.items()}
        count = len(next(iter(tensors.values())))
        columns = max(len(t) for t in tensors.values() if t.dim() > 0)
        step = max(1, BLOCK // columns)
        value = 0.0
        with next(iter(tensors.values())).device:  # what row_sum creates belongs there
            for start in range(0, count, step):
                rows = slice(start, min(start + step, count))
                part = row_sum(rows, **features, **options) / count
                if backward:
                    part.backward()
                value += part.item()
        if backward:
            wanted = [n for n, t in unit.items() if t.requires_grad]
            torch.autograd.backward([unit[n] for n in wanted], [features[n].grad for n in wanted])
        return Truth(value, _gradients(leaves))

    return evaluate


def sampled_query(count: int) -> Oracle:
    """The oracle of an info_nce too large for `by_rows`: `count` rows of the query's gradient."""

    def evaluate(tensors: Tensors, options: dict, backward: bool = True) -> Truth:
        query, key = (tensors[name].detach() for name in ("query", "key"))
        generator = torch.Generator(query.device).manual_seed(0)
        rows = torch.randperm(len(query), device=query.device, generator=generator)[:count]
        sample = query[rows].double().requires_grad_()
        keys = F.normalize(key.double(), dim=1)
        step = max(1, BLOCK // len(keys))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            logits = F.normalize(sample[part], dim=1) @ keys.T / options["temperature"]
            (F.cross_entropy(logits, rows[part], reduction="sum") / len(query)).backward()
        return Truth(math.nan, {"query": sample.grad}, rows)

    return evaluate


def _index(rows: slice) -> Tensor:
    return torch.arange(rows.start, rows.stop)


def _direction(rows: slice, query: Tensor, key: Tensor, scale: float | Tensor) -> Tensor:
    return F.cross_entropy(scale * query[rows] @ key.T, _index(rows), reduction="sum")


def info_nce(
    rows: slice,
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float,
    symmetric: bool = False,
) -> Tensor:
    scale = 1 / temperature
    if negatives is not None:
        positive = scale * (query[rows] * key[rows]).sum(1)
        lse = (scale * query[rows] @ negatives.T).logsumexp(1)
        return (torch.logaddexp(positive, lse) - positive).sum()
    loss = _direction(rows, query, key, scale)
    return (loss + _direction(rows, key, query, scale)) / 2 if symmetric else loss


def clip_loss(rows: slice, image_features: Tensor, text_features: Tensor, logit_scale: Tensor):
    images = _direction(rows, image_features, text_features, logit_scale)
    return (images + _direction(rows, text_features, image_features, logit_scale)) / 2


def nt_xent(rows: slice, z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
    z = torch.cat([z1, z2])
    loss = torch.zeros((), dtype=z.dtype)
    for first, other in ((0, len(z1)), (len(z1), 0)):
        anchor, positive = _index(rows) + first, _index(rows) + other
        logits = z[anchor] @ z.T / temperature
        itself = F.one_hot(anchor, len(z)).bool()
        logits = logits.masked_fill(itself, -torch.inf)
        loss = loss + F.cross_entropy(logits, positive, reduction="sum") / 2
    return loss


def siglip_loss(
    rows: slice,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
) -> Tensor:
    logits = logit_scale * image_features[rows] @ text_features.T + logit_bias
    return -F.logsigmoid(-logits).sum() - logits[:, rows].diagonal().sum()


def sup_con(rows: slice, features: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    logits = features[rows] @ features.T / temperature
    itself = _index(rows)[:, None] == torch.arange(len(features))[None, :]
    positive = (labels[rows, None] == labels[None, :]) & ~itself
    log_p = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return -(torch.where(positive, log_p, 0.0).sum(1) / positive.sum(1).clamp(min=1)).sum()


def cacr(
    rows: slice,
    query: Tensor,
    positives: Tensor,
    *,
    negatives: Tensor,
    t_pos: float = 1.0,
    t_neg: float = 2.0,
) -> Tensor:
    near = (query[rows, None] - positives[rows]).square().sum(2)
    attract = (torch.softmax(t_pos * near, 1) * near).sum()
    far = 2 - 2 * query[rows] @ negatives.T
    return attract - (torch.softmax(-t_neg * far, 1) * far).sum()
