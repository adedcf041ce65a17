"""Kernels that were written for GPUs; all are optional, and one that cannot run says why."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .baseline import Baseline, Loss
from .loading import Unavailable, missing

# The narrowest values that attention takes; only its log-sum-exp is wanted.
VALUE_WIDTH = 16
# The widest head of inf_cl's kernels.
INF_CL_WIDTH = 256


def attention_lse(attention: Callable[..., tuple]) -> Callable[..., Tensor]:
    """log sum_j exp(scale <x_i, y_j>) as flex_attention returns it beside its output."""
    try:
        from torch.nn.attention.flex_attention import AuxRequest
    except ImportError as error:
        raise Unavailable(f"flex_attention cannot return its log-sum-exp: {error}") from error

    def lse(x: Tensor, y: Tensor, scale: float, score_mod: Callable | None = None) -> Tensor:
        value = y.new_zeros(1, 1, len(y), VALUE_WIDTH)
        _, auxiliary = attention(
            x[None, None],
            y[None, None],
            value,
            score_mod=score_mod,
            scale=scale,
            return_aux=AuxRequest(lse=True),
        )
        return auxiliary.lse[0, 0]

    return lse


def _without_itself(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return torch.where(row == column, -torch.inf, score)


def attention_info_nce(attention: Callable[..., tuple]) -> Loss:
    row_lse = attention_lse(attention)

    def info_nce(
        query: Tensor, key: Tensor, *, negatives: Tensor | None = None, temperature: float
    ) -> Tensor:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        positive = (query * key).sum(1) / temperature
        lse = row_lse(query, key if negatives is None else negatives, 1 / temperature)
        if negatives is not None:
            lse = torch.logaddexp(lse, positive)
        return (lse - positive).mean()

    return info_nce


def attention_nt_xent(attention: Callable[..., tuple]) -> Loss:
    row_lse = attention_lse(attention)

    def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        positive = (z[: len(z1)] * z[len(z1) :]).sum(1) / temperature
        lse = row_lse(z, z, 1 / temperature, _without_itself)
        return (lse - positive.repeat(2)).mean()

    return nt_xent


def _flex(loss_of: Callable[[Callable[..., tuple]], Loss]) -> Baseline:
    def load() -> Loss:
        from torch.nn.attention.flex_attention import flex_attention

        return loss_of(torch.compile(flex_attention, dynamic=False))

    return Baseline("flex_attention, its lse", load, compiles=True)


def _inf_cl() -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy of the rows of x y^T, the positives on the diagonal."""
    try:
        from inf_cl import cal_inf_loss
    except ImportError as error:
        raise missing("inf_cl") from error

    def rows(x: Tensor, y: Tensor) -> Tensor:
        # features are split into heads of one power of two; a scale of its own needs processes
        return cal_inf_loss(x, y, head_dim=math.gcd(INF_CL_WIDTH, x.shape[1]))

    return rows


def _inf_cl_info_nce() -> Loss:
    rows = _inf_cl()

    def info_nce(query: Tensor, key: Tensor, *, temperature: float) -> Tensor:
        return rows(F.normalize(query, dim=1) / temperature, F.normalize(key, dim=1))

    return info_nce


def _inf_cl_clip() -> Loss:
    rows = _inf_cl()

    def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        images = logit_scale * F.normalize(image_features, dim=1)
        texts = F.normalize(text_features, dim=1)
        return (rows(images, texts) + rows(texts, images)) / 2

    return clip_loss


def _siglip_kernel() -> Loss:
    try:
        from siglip_kernel import fused_siglip_loss
    except ImportError as error:
        raise missing("siglip-kernel") from error

    def siglip_loss(
        image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
    ) -> Tensor:
        images, texts = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
        return fused_siglip_loss(images, texts, logit_scale.log(), logit_bias)

    return siglip_loss


FLEX_INFO_NCE = _flex(attention_info_nce)
FLEX_NT_XENT = _flex(attention_nt_xent)
INF_CL_INFO_NCE = Baseline("inf_cl.cal_inf_loss", _inf_cl_info_nce, "inf_cl")
INF_CL_CLIP = Baseline("inf_cl.cal_inf_loss, twice", _inf_cl_clip, "inf_cl")
SIGLIP_KERNEL = Baseline("siglip_kernel", _siglip_kernel, "siglip-kernel")
