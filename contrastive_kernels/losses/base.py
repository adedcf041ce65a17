"""What makes a function a loss: ranks that meet, help on the options that all share, and a module.

Features are float32, float64, bfloat16 or float16; losses and statistics are float32, or float64
for float64 features.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, ClassVar, Literal, ParamSpec, Protocol, overload

from torch import Tensor, nn

from ..distributed import KeptGroup, collective, world_size
from ..types import Loss, LossStats
from .observe import observable

P = ParamSpec("P")

OPTIONS = {
    "temperature": "a number > 0 that similarities are divided by.",
    "normalize": "divide features by their L2 norm (at least 1e-12) first.",
    "reduction": '"mean", "sum" or "none".',
    "backend": '"auto": the fastest one that is usable here; or "reference", "cpu", "triton" or '
    '"cuda", which never fall back.',
    "group": 'a torch.distributed process group, a DeviceMesh of one dimension, or "world": the '
    "default group, found at the call. Features are then this rank's part of a batch, which may "
    "have no rows, and negatives come from all ranks; what is taken or given for each row is of "
    "this rank's rows. The value is that of one process, and so are the gradients after DDP's mean "
    "over the ranks.",
    "exchange": '"gather" copies all keys to every rank, "ring" lets them travel; "auto" gathers '
    "up to 256 MB.",
    "dims": "ends of prefixes of the features, in any order: the loss is the sum over d in dims of "
    "that of the first d features, normalised by norms of their own (Matryoshka; Kusupati et al. "
    "2022, eq. 1); LossStats are those of the longest.",
    "weights": "of the losses of `dims`; None: 1.",
    "return_stats": "return (loss, LossStats) instead of the loss.",
}
RAISES = """
Raises:
    TypeError, ValueError: an argument that does not fit; the message names it.
    RuntimeError: a backend that cannot run here, with the reason.
    NotImplementedError: a second derivative, unless backend="reference" has no group or chunks. A
        derivative in forward mode (torch.func.jvp, jacfwd, hessian; torch.autograd.forward_ad) with
        another backend than "reference" or "auto", which is dense there; with a group or chunks
        that and every transform of torch.func."""


class LossFunction(Protocol[P]):
    """What type checkers see of a loss: whether LossStats come with it depends on `return_stats`.

    Its other arguments are not checked where that is True.
    """

    __name__: str

    @overload
    def __call__(  # type: ignore[overload-overlap]  # the first that fits counts
        self, *args: Any, return_stats: Literal[True], **options: Any
    ) -> tuple[Tensor, LossStats]: ...

    @overload
    def __call__(self, *args: P.args, **options: P.kwargs) -> Tensor: ...


@overload
def loss(  # type: ignore[overload-overlap]  # likewise
    function: Callable[P, Tensor],
) -> Callable[P, Tensor]: ...


@overload
def loss(function: Callable[P, Loss]) -> LossFunction[P]: ...


def loss(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a loss: it may join a `group`, and its help describes every option."""
    function.__doc__ = _documented(function, OPTIONS)
    return observable(collective(function))


def loss_like(other: Callable[..., Any]) -> Callable[[Callable[P, Loss]], LossFunction[P]]:
    """`loss` for a variant of another one, whose help describes the arguments of both."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__doc__ = _documented(function, _described(other.__doc__ or "") | OPTIONS)
        return observable(collective(function))

    return decorate


def _described(text: str) -> dict[str, str]:
    """What a docstring says of each argument."""
    found = {}
    arguments = text.partition("\n\nArgs:")[2].partition("\n\n")[0]
    for entry in re.split(r"\n    (?=\S)", arguments)[1:]:
        names, _, description = entry.partition(":")
        for name in names.split(","):
            found[name.strip()] = " ".join(description.split())
    return found


def _documented(function: Callable[..., Any], known: dict[str, str]) -> str:
    """The docstring of a loss, with what it leaves out of the arguments that are known."""
    head, *sections = (inspect.getdoc(function) or "").split("\n\nReturns:")
    described = _described(head)
    missing: dict[str, list[str]] = {}  # names by what is said of them
    for name in inspect.signature(function).parameters:
        if name in known and name not in described:
            missing.setdefault(known[name], []).append(name)
    lines = [
        textwrap.fill(
            f"{', '.join(names)}: {text}", 96, initial_indent="    ", subsequent_indent=8 * " "
        )
        for text, names in missing.items()
    ]
    if "\n\nArgs:" not in head:
        head += "\n\nArgs:"
    returns = "".join("\n\nReturns:" + section for section in sections)
    text = "\n".join((head, *lines)) + returns
    return text if "\nRaises:" in text else f"{text}\n{RAISES}"


class ContrastiveLoss(nn.Module):
    """Calls `function` with the options given at construction.

    Options are the function's keyword-only parameters, with its defaults and its meaning. Those
    given at the call, such as `negatives` or `scale`, come on top of them.
    """

    function: ClassVar[Callable[..., Loss]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls) -> None:
        options = [p for p in inspect.signature(cls.function).parameters.values() if _is_option(p)]
        cls.__signature__ = inspect.Signature(options)
        summary = (inspect.getdoc(cls.function) or "").split("\n\n")[0]
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
        # dist.group.WORLD is None before init_process_group
        self.ambiguous = options.get("group", self) is None and world_size() == 1
        if options.get("group") is not None:
            options["group"] = KeptGroup(options["group"])
        self.options = options

    def forward(self, *inputs: Any, **options: Any) -> Loss:
        return type(self).function(*inputs, **self.at_call(options))

    def at_call(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a call, on top of those given at construction."""
        if self.ambiguous and "group" not in options and world_size() > 1:
            raise ValueError(
                f"group was None when this {type(self).__name__} was made, as dist.group.WORLD is "
                'before init_process_group: pass group="world", which is found at the call, or no '
                "group, for losses of each rank alone"
            )
        return {**self.options, **options}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _is_option(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.KEYWORD_ONLY
