"""Losses with soft targets: the student's similarities learn those of a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import in_forward_mode, in_transform, once_differentiable, precise
from ..backends import resolve_backend, runs_dense
from ..checks import check_other_rows, check_reduction, check_views, scalar
from ..distributed import Shards, join
from ..ops import full_precision
from ..types import Group, statistics_dtype
from .algebra import add_up, gather_only, row_blocks, unit
from .base import ContrastiveLoss, loss
from .units import Units, units


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
    dtype = statistics_dtype(image_features)
    features = [
        t.to(dtype)
        for t in (
            image_features, text_features, teacher_image_features, teacher_text_features
        )
    ]  # fmt: skip
    if isinstance(batch, Shards):
        features += [batch.gather_keys(t) for t in features]
    scales = [
        s.to(image_features.device, dtype)
        if isinstance(s, Tensor)
        else torch.full((), s, dtype=dtype, device=image_features.device)
        for s in (scale, teacher_scale)
    ]
    if runs_dense(backend) or in_transform():
        total = _dense(summed, normalize, scales, features)
    else:
        total = _SoftCrossEntropy.apply(
            summed, torch.is_grad_enabled(), normalize, *scales, *features
        )
    return batch.reduce(total, reduction == "mean") if summed else total


class CLIPDistill(ContrastiveLoss):
    function = staticmethod(clip_distill)


class _Direction(NamedTuple):
    """Rows x against y, of the student and of the teacher, by their places among the features."""

    x: int
    y: int
    teacher_x: int
    teacher_y: int


def _directions(features: Sequence[Tensor]) -> tuple[_Direction, _Direction]:
    """From images to texts and back; the second half of the features, if there is one, is of all
    ranks."""
    every = len(features) - 4
    return _Direction(0, 1 + every, 2, 3 + every), _Direction(1, every, 3, 2 + every)


def _dense(
    summed: bool, normalize: bool, scales: Sequence[Tensor], features: Sequence[Tensor]
) -> Tensor:
    reduction = "sum" if summed else "none"
    made = [unit(t, normalize) for t in features]
    found = []
    for direction in _directions(features):
        x, y, teacher_x, teacher_y = (made[place] for place in direction)
        x, teacher_x = scales[0] * x, scales[1] * teacher_x
        if not in_forward_mode():
            found.append(_dense_cross_entropy(x, y, teacher_x, teacher_y, reduction))
            continue
        parts = [
            _dense_cross_entropy(x[rows], y, teacher_x[rows], teacher_y, reduction)
            for rows in row_blocks(x.shape[0], y.shape[0])
        ]
        found.append(add_up(parts) if summed else torch.cat(parts))
    return 0.5 * (found[0] + found[1])


@precise
def _dense_cross_entropy(
    x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor, reduction: str
) -> Tensor:
    return F.cross_entropy(x @ y.T, torch.softmax(teacher_x @ teacher_y.T, 1), reduction=reduction)


class _SoftCrossEntropy(torch.autograd.Function):
    """-1/2 sum_j q_ij log p_ij of both directions, p and q being the softmax of
    scale <x_i, y_j>, student and teacher.

    (N,); or `summed`, and then the gradient is taken in the same pass, if it is to be `recorded`.
    """

    @staticmethod
    def forward(
        ctx: Any, summed: bool, recorded: bool, normalize: bool, *tensors: Tensor
    ) -> Tensor:
        ctx.summed = ctx.ready_made = summed
        ctx.normalize = normalize
        needs = ctx.needs_input_grad[3:] if summed and recorded else (False,) * len(tensors)
        sums = _Sums(tensors, needs, normalize)
        loss = tensors[0].new_zeros(tensors[2].shape[0])
        for direction, rows, log_p, q, spare in sums.blocks():
            loss[rows] -= 0.5 * torch.mul(q, log_p, out=spare).sum(1)
            sums.add(direction, rows, log_p, q, spare, None)
        ctx.save_for_backward(*(sums.gradients() if summed else tensors))
        return loss.sum() if summed else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.summed:
            return *3 * (None,), *(None if g is None else g * grad for g in ctx.saved_tensors)
        sums = _Sums(ctx.saved_tensors, ctx.needs_input_grad[3:], ctx.normalize)
        for direction, rows, log_p, q, spare in sums.blocks():
            torch.mul(q, log_p, out=spare)
            sums.add(direction, rows, log_p, q, spare, grad[rows, None])
        return *3 * (None,), *sums.gradients()


class _Sums:
    """The gradients of both scales and all features, from block to block."""

    def __init__(self, tensors: Sequence[Tensor], needs: Sequence[bool], normalize: bool) -> None:
        self.scales, features = tensors[:2], tensors[2:]
        self.units = [units(t, normalize) for t in features]
        self.directions = _directions(features)
        made = [
            torch.zeros_like(t) if need else None for t, need in zip(tensors, needs, strict=True)
        ]
        self.of_scales, self.of_units = made[:2], made[2:]

    def blocks(self) -> Iterator[tuple[_Direction, slice, Tensor, Tensor, Tensor]]:
        """(direction, rows, log p, q, spare memory of their size) of block after block, in one
        workspace: blocks allocated one by one would scatter over the heap."""
        workspace = None
        for direction in self.directions:
            x, y, teacher_x, teacher_y = (self.units[place] for place in direction)
            columns = y.features.shape[0]
            for rows in row_blocks(x.features.shape[0], columns):
                if workspace is None:  # the first block is the largest
                    workspace = y.features.new_empty(3, rows.stop, columns)
                logits, log_p, q = workspace[:, : rows.stop - rows.start]
                self._products(0, x, y, rows, logits)
                torch.log_softmax(logits, 1, out=log_p)
                self._products(1, teacher_x, teacher_y, rows, logits)
                torch.softmax(logits, 1, out=q)
                yield direction, rows, log_p, q, logits

    def _products(self, which: int, x: Units, y: Units, rows: slice, out: Tensor) -> None:
        with full_precision(out):
            torch.mm(self.scales[which] * x.of(rows), y.features.T, out=out)
        if y.lengths is not None:
            out.div_(y.lengths.T)

    def add(
        self,
        direction: _Direction,
        rows: slice,
        log_p: Tensor,
        q: Tensor,
        product: Tensor,
        weight: Tensor | None,
    ) -> None:
        """Add what a block gives, `weight` being the gradient of its rows; `product` is q log p.
        Both `log_p` and `product` are overwritten."""
        if self._need(1, direction.teacher_x, direction.teacher_y):
            # d/dt of -sum q log p is -q (log p - sum q log p)
            product.addcmul_(q, product.sum(1, keepdim=True), value=-1).neg_()
            self._add(1, direction.teacher_x, direction.teacher_y, rows, product, weight)
        if self._need(0, direction.x, direction.y):
            self._add(0, direction.x, direction.y, rows, log_p.exp_().sub_(q), weight)

    def _need(self, which: int, *places: int) -> bool:
        made = (self.of_scales[which], *(self.of_units[place] for place in places))
        return any(t is not None for t in made)

    def _add(
        self, which: int, x: int, y: int, rows: slice, logit_grad: Tensor, weight: Tensor | None
    ) -> None:
        scale, of_scale = self.scales[which], self.of_scales[which]
        to_x, to_y, of_x, of_y = self.of_units[x], self.of_units[y], self.units[x], self.units[y]
        logit_grad.mul_(0.5 if weight is None else 0.5 * weight)
        block = of_x.of(rows)
        with full_precision(logit_grad):
            if to_y is not None:
                to_y.addmm_(logit_grad.T, scale * block)
            if to_x is None and of_scale is None:
                return
            if of_y.lengths is not None:
                logit_grad.div_(of_y.lengths.T)
            attended = logit_grad @ of_y.features
        if of_scale is not None:
            of_scale += (attended * block).sum()
        if to_x is not None:
            to_x[rows].addcmul_(attended, scale)

    def gradients(self) -> list[Tensor | None]:
        of_features = [
            None if total is None else of.gradient(total)
            for of, total in zip(self.units, self.of_units, strict=True)
        ]
        return [*self.of_scales, *of_features]
