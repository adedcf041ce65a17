"""Calls that nobody thought of, of every loss, the sweeps and whitening: drawn sizes, options,
strides, extremes and patterns of gradients, against the definitions in float64.

The test suite draws always the same; `make fuzz` draws anew, and more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, event, given, strategies
from oracles import BACKENDS, DOUBLE, generator, interpreted, rms
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.losses.base import ContrastiveLoss
from contrastive_kernels.losses.cases import (
    LEARNED,
    Case,
    Row,
    call,
    features,
    ids,
    letters,
    number,
    tensors,
)
from contrastive_kernels.losses.table import LOSSES, definition

SIZES = strategies.sampled_from((1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 65))
FEW = strategies.sampled_from((1, 2, 3, 5, 8))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
BOOL = strategies.booleans()

# What the fuzz gives options that a case leaves at their defaults.
OPTIONS = {
    "normalize": BOOL,
    "reduction": strategies.sampled_from(("mean", "sum", "none")),
    "temperature": strategies.sampled_from((0.01, 0.07, 0.5, 1.0, 3.0)),
    "symmetric": BOOL,
    "in_batch": BOOL,
    "alpha": strategies.sampled_from((0.5, 1.0, 4.0, 1000.0)),
    "beta": strategies.sampled_from((0.0, 0.5, 2.0)),
    "q": strategies.sampled_from((0.1, 0.5, 1.0)),
    "lam": strategies.sampled_from((0.0, 0.01, 0.5)),
    "tau_plus": strategies.sampled_from((0.0, 0.1, 0.5)),
    "sigma": strategies.sampled_from((0.5, 1.0)),
    "t_pos": strategies.sampled_from((0.0, 0.5, 2.0)),
    "t_neg": strategies.sampled_from((0.0, 0.5, 3.0)),
    "detach_weights": BOOL,
    "margin": strategies.sampled_from((0.0, 0.1, -0.2)),
    "margin_strategy": strategies.sampled_from(("absolute", "relative")),
    "contrast_anchors": BOOL,
    "contrast_positives": BOOL,
    "base_temperature": strategies.sampled_from((0.07, 1.0)),
    "negatives_from": strategies.sampled_from(("both", "sequences", "times")),
    "partition_mode": strategies.sampled_from(("joint", "per_direction")),
    "columns": BOOL,
}
FEW_OF = {"V": FEW, "K": FEW, "G": FEW, "T": FEW, "S": FEW, "P": FEW}


def row_stats(
    x: Tensor, y: Tensor, *, columns: bool = False, normalize: bool = False, **options: Any
) -> Tensor:
    """All statistics one after the other; 0 for the lse of a row without a pair."""
    out = ck.row_stats(x, y, columns=columns, normalize=normalize, **options)
    return torch.cat([t.masked_fill(t == -torch.inf, 0.0) for t in out])


def dense_row_stats(x: Tensor, y: Tensor, *, columns: bool = False, **options: Any) -> Tensor:
    out = reference.sweep(x, y, columns=columns, mean=True, **options)
    found = [out.lse, out.mean, out.col_lse, out.col_mean][: 4 if columns else 2]
    return torch.cat([t.masked_fill(t == -torch.inf, 0.0) for t in found])


def dense_row_softplus(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return reference.softplus_sweep(x, y, **options).value


KEYS = {"x": features("N D"), "y": features("M D"), "scale": number(3.0)}
OWN_KEYS = KEYS | {"y": features("N M D")}
BIAS = {"bias": features("M")}
SOME = {"exclude_rows": ids("N", (0, 1, 2, 1)), "exclude_columns": ids("M", (1, 1, 3, 0, 2))}
SWEEPS = {
    "shared": Case(KEYS),
    "bias": Case(KEYS | BIAS),
    "masked": Case(KEYS | BIAS | SOME),
    "own": Case(OWN_KEYS),
    "own, masked": Case(OWN_KEYS | SOME),
}
GROUPS = {
    "groups": Case({"x": features("V N D")}, {}, {"N": 24, "D": 5}),
    "shrunk": Case({"x": features("V N D")}, {"eps": 0.1}, {"N": 7, "D": 11}),
}
# what is called, its definition
CALLED = {row.name: (row, definition(row)) for row in LOSSES} | {
    "row_stats": (Row(row_stats, ContrastiveLoss, SWEEPS), dense_row_stats),
    "row_softplus": (Row(ck.row_softplus, ContrastiveLoss, SWEEPS), dense_row_softplus),
    "whiten": (
        Row(ck.whiten, ContrastiveLoss, GROUPS, backends=("reference", "auto")), reference.whiten
    ),
}  # fmt: skip


class Layout(NamedTuple):
    """How a tensor lies in memory: the last two axes exchanged, gaps between numbers, an offset."""

    turned: bool
    step: int
    offset: int

    def of(self, t: Tensor) -> Tensor:
        if t.dim() == 0:
            return t
        turned = self.turned and t.dim() > 1
        source = t.mT if turned else t
        room = source.new_zeros(self.offset + source.numel() * self.step)
        laid = room[self.offset :: self.step].view(source.shape)
        laid.copy_(source)
        return laid.mT if turned else laid


LAYOUTS = strategies.builds(
    Layout, BOOL, strategies.sampled_from((1, 1, 2)), strategies.sampled_from((0, 0, 1, 3))
)


class Call(NamedTuple):
    """One call: of the case of that name, with the tensors and more options."""

    row: Row
    name: str
    backend: str
    dtype: torch.dtype
    inputs: dict[str, Tensor]
    options: dict[str, Any]

    def __repr__(self) -> str:
        shapes = {
            name: (tuple(t.shape), t.stride(), t.requires_grad) for name, t in self.inputs.items()
        }
        return f"{self.name!r} {self.backend} {self.dtype} {self.options} {shapes}"


def backends(row: Row, case: Case) -> list[str]:
    return [b for b in case.backends or row.backends if b == "auto" or b in BACKENDS]


@strategies.composite
def calls(draw: Callable[..., Any], row: Row) -> Call:
    name = draw(strategies.sampled_from(sorted(row.cases)))
    case = row.cases[name]
    backend = draw(strategies.sampled_from(backends(row, case)))
    dtype = draw(strategies.sampled_from(DTYPES))
    used = sorted(letters(case))
    limit = 9 if interpreted(backend) or "T" in used else 65  # pairs of sets are pairs of tokens
    sizes = {
        letter: min(limit, draw(FEW_OF.get(letter, SIZES)))
        for letter in used
        if letter not in case.sizes or case.unit == 1
    }
    made = tensors(case, dtype=dtype, seed=draw(strategies.integers(0, 9)), **sizes)
    made = {n: extreme(draw, t) for n, t in made.items()}
    kinds = {n: given.kind for n, given in case.inputs.items()}
    same = {n: given.of for n, given in case.inputs.items() if given.kind == "same"}
    for n, t in made.items():
        if t.is_floating_point():
            learn = kinds[n] in LEARNED and draw(BOOL)
            made[n] = draw(LAYOUTS).of(t.detach()).requires_grad_(learn)
    made |= {n: made[source] for n, source in same.items()}
    options = {
        option: draw(strategy)
        for option, strategy in OPTIONS.items()
        if row.takes(option)
        and option not in case.options
        and option not in case.inputs
        and not (option == "temperature" and "scale" in {*case.options, *case.inputs})
        and draw(BOOL)
    }
    if case.coupled:
        options.pop("reduction", None)
    return Call(row, name, backend, dtype, made, options)


def extreme(draw: Callable[..., Any], t: Tensor) -> Tensor:
    """Equal rows, long and short ones, some of zeros."""
    if not t.is_floating_point() or t.dim() < 2:
        return t
    kind = draw(strategies.sampled_from(("as drawn",) * 5 + ("equal", "long", "short", "zeros")))
    event(kind)
    t = t.detach().clone()
    match kind:
        case "equal":
            t[1:] = t[:1].clone()
        case "long":
            t *= 8
        case "short":
            t *= 2.0**-8
        case "zeros":
            t.view(-1, t.shape[-1])[::3] = 0.0
    return t


def outcome(function: Callable[..., Tensor], given: dict[str, Tensor]) -> list[Tensor] | str:
    """Value and gradients for a random gradient from above, or what the error says."""
    given = {  # ids that are one tensor stay so
        n: t.detach().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for n, t in given.items()
    }
    try:
        value = function(given)
    except (TypeError, ValueError) as error:
        return str(error)
    learned = [t for t in given.values() if t.requires_grad]
    if not learned:
        assert not value.requires_grad
        return [value]
    upstream = torch.randn(value.shape, dtype=DOUBLE, generator=generator(99)).to(value.dtype)
    gradients = torch.autograd.grad(value, learned, upstream, materialize_grads=True)
    return [value.detach(), *gradients]


def check(drawn: Call, defined: Callable[..., Tensor]) -> None:
    case = drawn.row.cases[drawn.name]

    def run(function: Callable[..., Tensor], given: dict[str, Tensor], **options: Any) -> Any:
        return outcome(lambda t: call(function, case, t, **{**drawn.options, **options}), given)

    loss, dense = drawn.row.function, partial(run, defined, whole=True)
    wide = {
        n: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for n, t in drawn.inputs.items()
    }
    got = run(loss, drawn.inputs, backend=drawn.backend)
    checked = run(loss, wide, backend="reference")
    if isinstance(got, str) or isinstance(checked, str):
        event("error")
        assert got == checked
        return
    exact, eager = dense(wide), dense(drawn.inputs)
    assert not isinstance(exact, str) and not isinstance(eager, str), (exact, eager)
    assume(all(bool((t.abs() < torch.finfo(drawn.dtype).max / 8).all()) for t in exact))  # no nan
    options = {**case.options, **drawn.options}
    logits = 1 / options.get("temperature", 0.01)  # their size, by which rounding grows
    if not options.get("normalize", True):
        logits *= max(1.0, max(lengths(t).max().item() for t in wide.values() if t.dim() > 1) ** 2)
    learned = [None, *(t for t in wide.values() if t.requires_grad)]
    cancelled = terms_that_cancel(drawn, partial(dense, wide), exact)
    for which, (ours, theirs, right) in enumerate(zip(got, eager, exact, strict=True)):
        eps = (case.slack + 4 * logits) * torch.finfo(ours.dtype).eps
        for scale, rows in apart(learned[which]):
            a, b, e, c = (scale * t.double()[rows] for t in (ours, theirs, right, cancelled[which]))
            if e.numel() == 0:
                continue
            size = rms(e) + rms(exact[0]) * (terms(learned[which]) if scale == 1 else 1.0)
            size = size + rms(c)
            lost = lost_digits(drawn, logits if which else 1.0) * terms(learned[which])
            eps_of_logits = 4 * logits * torch.finfo(ours.dtype).eps
            budget = 2 * rms(b - e).nan_to_num(0.0) + 1e-13 + eps * size + eps_of_logits * lost
            finite = a.isfinite()
            if scale != 1 and budget > scale * torch.finfo(ours.dtype).max:
                a = torch.where(finite, a, e)  # float16 has no number for it
            else:
                assert finite.all(), f"output {which} is not finite"
            error = rms(a - e)
            assert error <= budget, f"output {which}: error {error:.2e}, budget {budget:.2e}"


def terms_that_cancel(
    drawn: Call, dense: Callable[..., list[Tensor]], exact: list[Tensor]
) -> list[Tensor]:
    """For each output, in its shape: the size of terms that it is the small rest of, each rounded
    as it is alone.

    A sum of rows may have rows of both signs. CACR's are attraction less repulsion: the same for
    equal rows, and 0 where a row equals its keys, but made of 2 - 2 cos. RINCE's are a power of the
    denominator less one of the positive.
    """
    cancelled = [torch.zeros_like(t) for t in exact]
    reduction, rows = drawn.options.get("reduction", "mean"), 1
    if drawn.row.takes("reduction") and not drawn.row.cases[drawn.name].coupled:
        each = dense(reduction="none")[0]
        rows = each.numel() if reduction == "sum" else 1
        if reduction != "none":
            cancelled[0] += rows * each.abs().mean()
    parts, floor = exact, 0.0
    if drawn.row.takes("t_neg"):
        parts, floor = dense(beta=0.0), 0.05 * rows
    elif drawn.row.takes("q"):
        parts = dense(lam=1e-30)
    if parts is exact:
        return cancelled
    return [t + part.abs() + floor for t, part in zip(cancelled, parts, strict=True)]


def lost_digits(drawn: Call, scale: float) -> float:
    """By how much the rounding of a logit is in the loss of a row, and of a gradient by `scale`.

    User's ids that do not drop a row's positive leave it in the sweep, which has one pair of ids:
    the loss is log(1 + r (exp(lse - positive) - 1)), r = alpha / K, of two rounded logits.
    """
    rows, columns = (drawn.inputs.get(f"exclude_{of}") for of in ("rows", "columns"))
    if rows is None or columns is None or rows is columns or len(columns) < len(rows):
        return 0.0
    options = {**drawn.row.cases[drawn.name].options, **drawn.options}
    if "negatives" in drawn.inputs and not options.get("in_batch", False):
        return 0.0
    if (rows == columns[: len(rows)]).all():
        return 0.0
    reduced = len(rows) if options.get("reduction") == "sum" else 1
    return scale * reduced * max(1.0, options.get("alpha") or 1.0)


def lengths(t: Tensor) -> Tensor:
    return t.detach().double().norm(dim=-1)


def terms(t: Tensor | None) -> Tensor | float:
    """The size of what the gradient of features is a sum of, which may cancel: it is divided by
    their length."""
    if t is None or t.dim() < 2:
        return 1.0
    length = lengths(t)
    return 1 + 1 / length.masked_fill(length == 0, torch.inf).min()


def apart(t: Tensor | None) -> list[tuple[float, Any]]:
    """(factor, which): the gradient of rows of zeros is one divided by 1e-12."""
    if t is None or t.dim() < 2 or lengths(t).all():
        return [(1.0, ...)]
    zeros = lengths(t) == 0
    return [(1.0, ~zeros), (1e-12, zeros)]


@pytest.mark.parametrize("name", CALLED)
@given(data=strategies.data())
def test_fuzz(name, data):
    row, defined = CALLED[name]
    check(data.draw(calls(row)), defined)
