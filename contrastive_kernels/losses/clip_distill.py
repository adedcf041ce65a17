"""Losses with soft targets: the student's similarities learn those of a teacher."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import in_forward_mode, in_transform, once_differentiable, precise
from ..backends import resolve_backend, runs_dense
from ..checks import check_other_rows, check_reduction, check_views, scalar
from ..distributed import join
from ..ops import full_precision
from ..types import Group
from .algebra import add_up, gather_only, row_blocks, unit
from .base import ContrastiveLoss, loss


@loss
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
    backend: str = "auto",
    group: Group | None = None,
    exchange: str = "auto",
) -> Tensor:
    """Knowledge distillation (Hinton et al. 2015) between CLIP models, as open_clip has it.

    loss_i = -1/2 sum_j (q_ij log p_ij + q'_ij log p'_ij): the cross-entropy from the softmax q of
    the teacher's logits to the student's p, from image i to the texts and (primed) from text i to
    the images; logits = logit_scale <image, text>.

    Neither matrix is stored: blocks of 2**20 pairs are made, their gradient in the same pass (in a
    second one for reduction="none"). A log-sum-exp from a sweep would spare some products, but
    could be rounded otherwise than the logits, which shows in the gradient p - q near convergence.
    With a `group` each rank holds the features of all ranks, O(N (D + D')): there is no
    exchange="ring".

    Args:
        image_features, text_features: the student's, (N, D), row i of one belongs to row i of the
            other.
        logit_scale: number or tensor of one element, already exponentiated; may be learned.
        teacher_image_features, teacher_text_features: (N, D'), likewise. They get a gradient too
            if they need one.
        teacher_logit_scale: likewise.
        exchange: "auto" or "gather".
        backend: "auto", or "reference": both matrices in full, differentiable any number of times.

    Returns:
        0-d, or (N,): the average of the two directions of each pair.
    """
    whole = group is None  # else the rank's part may be empty
    n = check_views("image_features", image_features, "text_features", text_features, whole=whole)
    teachers = check_views(
        "teacher_image_features", teacher_image_features,
        "teacher_text_features", teacher_text_features, whole=whole,
    )  # fmt: skip
    if teachers != n:
        raise ValueError(
            f"teacher_image_features must have the {n} rows of image_features, got {teachers}"
        )
    if teacher_image_features.device != image_features.device:
        raise ValueError(
            f"teacher_image_features must be on {image_features.device}, "
            f"got {teacher_image_features.device}"
        )
    check_reduction(reduction)
    resolve_backend(backend, image_features.device, kernels=())
    scale = scalar("logit_scale", logit_scale)
    teacher_scale = scalar("teacher_logit_scale", teacher_logit_scale)

    gather_only("clip_distill", exchange)
    batch, _ = join(group, n, exchange=exchange)
    check_other_rows("image_features", batch.total)

    summed = reduction != "none"
    image, text = scale * unit(image_features, normalize), unit(text_features, normalize)
    teacher_image = teacher_scale * unit(teacher_image_features, normalize, image.dtype)
    teacher_text = unit(teacher_text_features, normalize, image.dtype)
    if runs_dense(backend) or in_transform():
        cross_entropy = functools.partial(_dense, summed)
    else:
        cross_entropy = functools.partial(_SoftCrossEntropy.apply, summed, torch.is_grad_enabled())
    all_images, all_texts, all_teacher_images, all_teacher_texts = (
        batch.gather_keys(x) for x in (image, text, teacher_image, teacher_text)
    )
    rows = cross_entropy(image, all_texts, teacher_image, all_teacher_texts)
    columns = cross_entropy(text, all_images, teacher_text, all_teacher_images)
    total = 0.5 * (rows + columns)
    return batch.reduce(total, reduction == "mean") if summed else total


class CLIPDistill(ContrastiveLoss):
    function = staticmethod(clip_distill)


def _dense(summed: bool, x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor) -> Tensor:
    reduction = "sum" if summed else "none"
    if not in_forward_mode():
        return _dense_cross_entropy(x, y, teacher_x, teacher_y, reduction)
    parts = [
        _dense_cross_entropy(x[rows], y, teacher_x[rows], teacher_y, reduction)
        for rows in row_blocks(x.shape[0], y.shape[0])
    ]
    return add_up(parts) if summed else torch.cat(parts)


@precise
def _dense_cross_entropy(
    x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor, reduction: str
) -> Tensor:
    return F.cross_entropy(x @ y.T, torch.softmax(teacher_x @ teacher_y.T, 1), reduction=reduction)


class _SoftCrossEntropy(torch.autograd.Function):
    """-sum_j q_ij log p_ij, p and q being the softmax of <x_i, y_j>, student and teacher.

    (N,); or `summed`, and then the gradient is taken in the same pass, if it is to be `recorded`.
    """

    @staticmethod
    def forward(
        ctx: Any, summed: bool, recorded: bool,
        x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor,
    ) -> Tensor:  # fmt: skip
        features = x, y, teacher_x, teacher_y
        ctx.summed = ctx.ready_made = summed
        needs = ctx.needs_input_grad[2:] if summed and recorded else (False,) * 4
        grads = _zeros(features, needs)
        loss = x.new_empty(x.shape[0])
        for rows, log_p, q, spare in _blocks(*features):
            loss[rows] = -torch.mul(q, log_p, out=spare).sum(1)
            _add_gradients(rows, log_p, q, spare, None, features, grads)
        ctx.save_for_backward(*(grads if summed else features))
        return loss.sum() if summed else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.summed:
            return None, None, *(None if g is None else g * grad for g in ctx.saved_tensors)
        features = ctx.saved_tensors
        grads = _zeros(features, ctx.needs_input_grad[2:])
        for rows, log_p, q, spare in _blocks(*features):
            torch.mul(q, log_p, out=spare)
            _add_gradients(rows, log_p, q, spare, grad[rows, None], features, grads)
        return None, None, *grads


def _zeros(features: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    pairs = zip(features, needs, strict=True)
    return [torch.zeros_like(t) if need else None for t, need in pairs]


def _blocks(
    x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(rows, log p, q, spare memory of their size) of block after block, in one workspace: blocks
    allocated one by one would scatter over the heap."""
    workspace = None
    for rows in row_blocks(x.shape[0], y.shape[0]):
        if workspace is None:  # the first block is the largest
            workspace = x.new_empty(3, rows.stop, y.shape[0])
        logits, log_p, q = workspace[:, : rows.stop - rows.start]
        with full_precision(x):
            torch.mm(x[rows], y.T, out=logits)
            torch.log_softmax(logits, 1, out=log_p)
            torch.mm(teacher_x[rows], teacher_y.T, out=logits)
            torch.softmax(logits, 1, out=q)
        yield rows, log_p, q, logits


def _add_gradients(
    rows: slice,
    log_p: Tensor,
    q: Tensor,
    product: Tensor,
    weight: Tensor | None,
    features: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> None:
    """Add what a block gives, `weight` being the gradient of its rows; `product` is q log p. Both
    `log_p` and `product` are overwritten."""
    student, teacher = grads[:2], grads[2:]
    if any(g is not None for g in teacher):
        # d/dt of -sum q log p is -q (log p - sum q log p)
        product.addcmul_(q, product.sum(1, keepdim=True), value=-1).neg_()
        _add_products(rows, product, weight, features[2:], teacher)
    if any(g is not None for g in student):
        _add_products(rows, log_p.exp_().sub_(q), weight, features[:2], student)


def _add_products(
    rows: slice,
    logit_grad: Tensor,
    weight: Tensor | None,
    features: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> None:
    (x, y), (x_grad, y_grad) = features, grads
    if weight is not None:
        logit_grad.mul_(weight)
    with full_precision(x):
        if x_grad is not None:
            torch.mm(logit_grad, y, out=x_grad[rows])
        if y_grad is not None:
            y_grad.addmm_(logit_grad.T, x[rows])
