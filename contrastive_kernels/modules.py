"""A module for each loss: the options of the function at construction, its tensors at the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import (
    distillation,
    guided,
    losses,
    ranking,
    self_similarity,
    transport,
    whitening_loss,
)
from .common import Loss


class ContrastiveLoss(nn.Module):
    """Calls `function` with the options given at construction.

    Options are the function's keyword-only parameters, with its defaults and its meaning. Those
    given at the call, such as `negatives` or `scale`, come on top of them.
    """

    function: ClassVar[Callable[..., Loss]]

    def __init_subclass__(cls) -> None:
        options = [p for p in inspect.signature(cls.function).parameters.values() if _is_option(p)]
        cls.__signature__ = inspect.Signature(options)
        summary = inspect.getdoc(cls.function).split("\n\n")[0]
        cls.__doc__ = f"{summary}\n\nModule form of `{cls.function.__name__}`, same options."

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = type(self).__signature__.parameters
        for name, value in options.items():
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} has no option {name!r}; it has {', '.join(known)}"
                )
            if isinstance(value, Tensor):
                raise TypeError(f"{name} must be a plain option here; give a tensor at the call")
        self.options = options

    def forward(self, *inputs: Tensor, **options: Any) -> Loss:
        return type(self).function(*inputs, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _is_option(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.KEYWORD_ONLY


class InfoNCE(ContrastiveLoss):
    function = staticmethod(losses.info_nce)


class EqCo(ContrastiveLoss):
    function = staticmethod(losses.eqco)


class CLIPLoss(ContrastiveLoss):
    function = staticmethod(losses.clip_loss)


class SigLIPLoss(ContrastiveLoss):
    function = staticmethod(losses.siglip_loss)


class CLIPDistill(ContrastiveLoss):
    function = staticmethod(distillation.clip_distill)


class MNRL(ContrastiveLoss):
    function = staticmethod(ranking.mnrl)


class GIST(ContrastiveLoss):
    function = staticmethod(guided.gist)


class NTXent(ContrastiveLoss):
    function = staticmethod(self_similarity.nt_xent)


class SupCon(ContrastiveLoss):
    function = staticmethod(self_similarity.sup_con)


class DCL(ContrastiveLoss):
    function = staticmethod(self_similarity.dcl)


class Debiased(ContrastiveLoss):
    function = staticmethod(self_similarity.debiased)


class HCL(ContrastiveLoss):
    function = staticmethod(self_similarity.hcl)


class CACR(ContrastiveLoss):
    function = staticmethod(transport.cacr)


class CACRViews(ContrastiveLoss):
    function = staticmethod(transport.cacr_views)


class CCT(ContrastiveLoss):
    function = staticmethod(transport.cct)


class WMSE(ContrastiveLoss):
    function = staticmethod(whitening_loss.w_mse)


class INTL(ContrastiveLoss):
    function = staticmethod(whitening_loss.intl)


class NCE(ContrastiveLoss):
    function = staticmethod(losses.nce)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # nan until the first batch; kept as a logarithm, which no dtype overflows
        self.register_buffer("log_z", torch.tensor(float("nan")))
        self._estimated = False
        self.register_load_state_dict_post_hook(_read_estimated)

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor, **options: Any) -> Loss:
        """`nce` with Z kept from the first batch, as InstDis does, unless Z or log_z is given."""
        options = {**self.options, **options}
        if options.get("Z") is None and options.get("log_z") is None:
            if not self._estimated:
                shared = {k: v for k, v in options.items() if k not in _NOT_FOR_ESTIMATE}
                estimate = losses.estimate_log_z(query, key, negatives, **shared)
                self.log_z = estimate.to(device=self.log_z.device, dtype=self.log_z.dtype)
                self._estimated = True
            options["log_z"] = self.log_z
        return losses.nce(query, key, negatives, **options)


_NOT_FOR_ESTIMATE = ("Z", "log_z", "reduction", "return_stats")


def _read_estimated(module: NCE, _incompatible_keys: Any) -> None:
    module._estimated = not bool(module.log_z.isnan())
