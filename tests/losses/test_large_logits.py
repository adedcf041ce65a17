"""Logits of 1e3 to 1e7: value and gradients keep the digits that dense float32 does.

exp(z - lse) has to add up to 1 in every row and column. That takes logits of the backward pass
with the bits of those of the forward pass, and an lse that is not rounded to float32.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_calls import by_rows, dense, inputs, ours, with_backends
from oracles import BACKENDS, randn, rms, value_and_gradients

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.losses.cases import call
from contrastive_kernels.losses.table import CASES

SCALES = ("scale", "logit_scale")
NAMES = [
    name
    for name, (row, case) in CASES.items()
    if row.takes("temperature") or any(s in case.inputs for s in SCALES)
]
SHARP = [
    name
    for name, (row, case) in CASES.items()
    if row.takes("t_neg") and "t_neg" not in case.options
]
INTERPRETED = (
    "info_nce symmetric", "info_nce shared", "clip_loss", "siglip_loss", "nt_xent", "hcl", "rince",
    "nce ragged", "cacr rbf", "cacr rbf negatives", "cct",
)  # fmt: skip
EPS = torch.finfo(torch.float32).eps
parametrize_scales = pytest.mark.parametrize("scale", [1e3, 1e5, 1e7])


def hcl(z1, z2, *, temperature=0.5, tau_plus=0.1, beta=1.0, normalize=True, reduction="mean"):
    """The definition in logarithms, where that of the reference overflows."""
    s, positive, negative = reference.two_views(z1, z2, normalize)
    s, positive = s / temperature, positive / temperature

    def over_negatives(z):
        return z.masked_fill(~negative, -torch.inf).logsumexp(1)

    log_ratio = over_negatives((1 + beta) * s) - over_negatives(beta * s) - positive
    log_n = math.log(len(s) - 2)
    log_g = log_n + log_ratio
    if tau_plus > 0:
        above = log_ratio > math.log(tau_plus)
        rest = torch.where(above, log_ratio - math.log(tau_plus), 1.0)
        log_g = torch.where(above, log_g + torch.log(-torch.expm1(-rest)), -torch.inf)
    log_g = torch.maximum(log_g - math.log1p(-tau_plus), log_n - 1 / temperature - positive)
    return reference.reduce(-F.logsigmoid(-log_g), reduction)


def rince(query, key, *, scale=None, temperature=0.1, q=0.5, lam=0.01, reduction="mean", **given):
    """Likewise; by the row of InfoNCE, which is the log of the denominator less the positive."""
    scale = 1 / temperature if scale is None else scale
    gap = reference.info_nce(query, key, scale=scale, reduction="none", **given)
    positive = q * scale * reference.row_dot(query, key, normalize=True)
    rows = (positive + q * (gap + math.log(lam))).exp() - positive.exp()
    return reference.reduce(rows / q, reduction)


IN_LOGARITHMS = {"hcl": hcl, "debiased": partial(hcl, beta=0.0), "rince": rince}


def exact(name: str, **options):
    """The definition, in logarithms where it otherwise overflows."""
    row, case = CASES[name]
    if row.name not in IN_LOGARITHMS:
        return dense(name, **options)
    function = IN_LOGARITHMS[row.name]
    return lambda *given: call(
        function, case, dict(zip(case.inputs, given, strict=True)), whole=True, **options
    )


def scaled(name: str, scale: float):
    """(inputs of a case, options) with logits of that size."""
    row, case = CASES[name]
    given, options = inputs(name, torch.float32, N=19), {"reduction": by_rows(name)}
    learned = [i for i, argument in enumerate(case.inputs) if argument in SCALES]
    for i in learned:
        given[i] = torch.full_like(given[i], scale).requires_grad_()
    if not learned and "scale" in case.options:
        options["scale"] = scale
    elif not learned:
        options["temperature"] = 1 / scale
    return given, options


def assert_as_dense(actual, expected, given, scale: float, slack: float = 16.0) -> None:
    """error(actual) <= 10 error(dense float32), or some roundings, of the value and all gradients.

    A value is the difference of two logits, and loses what they do.
    """
    exact = value_and_gradients(
        expected, [t.double() if t.is_floating_point() else t for t in given]
    )
    results = (value_and_gradients(f, given) for f in (actual, expected))
    for which, (a, b, e) in enumerate(zip(*results, exact, strict=True)):
        error, eager = (rms(t.double() - e) for t in (a, b))
        size = rms(e) + (scale if which == 0 else 1e-9)
        budget = 10 * eager + slack * EPS * size
        assert error <= budget, f"output {which}: error {error:.1e}, budget {budget:.1e}"


@with_backends(NAMES, interpreted=INTERPRETED)
@parametrize_scales
def test_every_loss(name, backend, scale):
    row, case = CASES[name]
    given, options = scaled(name, scale)
    if row.takes("lam") and row.name in IN_LOGARITHMS:
        options["q"] = 10 / scale  # exp(q s) is a number of float32
    fused, definition = ours(name, backend=backend, **options), exact(name, **options)
    assert_as_dense(fused, definition, given, scale, slack=case.slack / 4)


@with_backends([n for n in NAMES if CASES[n][1].options.get("normalize", True)], INTERPRETED)
def test_short_features_have_the_logits_of_unit_vectors(name, backend):
    """Rows of norm 1 / 8, in nearly one direction: logits of 100, not of 100 / 64."""
    row, case = CASES[name]
    given, options = scaled(name, 100.0)
    given = [short_and_alike(t) if t.is_floating_point() and t.dim() > 1 else t for t in given]
    if row.takes("lam") and row.name in IN_LOGARITHMS:
        options["q"] = 0.1
    options["normalize"] = True
    fused, definition = ours(name, backend=backend, **options), exact(name, **options)
    assert_as_dense(fused, definition, given, 100.0, slack=case.slack / 4)


@pytest.mark.parametrize("length", [1e17, 1e20])
def test_long_rows_of_bfloat16(length):
    """Whose products are no numbers of float32, where those of 1 / norm are, or 0."""
    x, y = (length * randn(70, 64, seed=s, dtype=torch.float32) for s in (1, 2))
    x, y = x.bfloat16(), y.bfloat16()
    for loss in (ck.nt_xent, ck.info_nce):
        found, right = (loss(x, y, backend=b).item() for b in ("auto", "reference"))
        assert abs(found - right) <= 1e-5 * abs(right)


def short_and_alike(t):
    short = F.normalize(1 + 0.1 * t.detach(), dim=-1) / 8
    return short.requires_grad_(t.requires_grad)


@with_backends([name for name in NAMES if CASES[name][0].takes("q")], interpreted=("rince",))
def test_infinite_where_it_is(name, backend):
    given, options = scaled(name, 1e3)
    options["q"] = 0.1
    with torch.no_grad():
        right = exact(name, **options)(
            *(t.double() if t.is_floating_point() else t for t in given)
        ).float()
        value = ours(name, backend=backend, **options)(*given)
    assert value.isinf().any() and value.isfinite().any()
    assert torch.equal(value.isinf(), right.isinf()) and not value.isnan().any()
    torch.testing.assert_close(value, right, rtol=0.1 * 1e3 * 64 * EPS, atol=0)


@with_backends(SHARP, interpreted=INTERPRETED)
@pytest.mark.parametrize(("t_neg", "equal"), [(24.0, False), (1e3, True), (1e6, False)])
def test_sharp_weights(name, backend, t_neg, equal):
    """Weights softmax(-t_neg d): no number of the size of t_neg costs digits of d."""
    given = inputs(name, torch.float32, N=19)
    if equal:
        given = [equal_rows(t) if t.dim() == 2 else t for t in given]
    options = {"reduction": by_rows(name), "t_neg": t_neg}
    fused, definition = ours(name, backend=backend, **options), dense(name, **options)
    wide = [t.double() for t in given]
    moved = [t * (1 + EPS * randn(*t.shape, seed=i)) for i, t in enumerate(wide)]
    right, near = (value_and_gradients(definition, tensors) for tensors in (wide, moved))
    results = (value_and_gradients(f, given) for f in (fused, definition))
    length = 1.0 if CASES[name][1].options.get("normalize", True) else longest(wide)
    largest = max(rms(e) for e in right[1:])  # what a gradient that cancels is made of
    for which, (a, b, c, e) in enumerate(zip(*results, near, right, strict=True)):
        error, eager, rounding = (rms(t.double() - e) for t in (a, b, c))
        size = largest if which > 0 else rms(e) + length**2
        budget = 4 * torch.maximum(eager, rounding) + 8 * EPS * size
        assert error <= budget, f"output {which}: error {error:.1e}, budget {budget:.1e}"


def longest(given) -> float:
    return max(t.detach().norm(dim=-1).max().item() for t in given)


def equal_rows(t):
    return t.detach()[torch.arange(len(t)) % 5].contiguous().requires_grad_(t.requires_grad)


LOSSES = {
    "rows": (partial(ck.info_nce), reference.info_nce),
    "rows and columns": (
        partial(ck.info_nce, symmetric=True), partial(reference.info_nce, symmetric=True)
    ),
    "itself": (ck.nt_xent, reference.nt_xent),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("equal", [False, True])
@parametrize_scales
def test_tiles_and_equal_features(backend, loss, normalize, equal, scale):
    """Of several tiles; and where many logits are equal, so that lse is above all of them."""
    fused, definition = LOSSES[loss]
    n, dim = (35 if backend == "triton" else 301), 24
    z1, z2 = (randn(n, dim, seed=seed, dtype=torch.float32) for seed in (1, 2))
    if equal:
        z1, z2 = (equal_rows(t) for t in (z1, z2))
    options = {"normalize": normalize, "reduction": "none"}

    def run(function, x, y, log_scale):
        return function(x, y, scale=log_scale.exp(), **options)

    log_scale = torch.tensor(scale if normalize else scale / dim).log()
    given = [t.requires_grad_() for t in (z1, z2, log_scale)]
    fused = partial(fused, backend=backend)
    assert_as_dense(partial(run, fused), partial(run, definition), given, scale)
