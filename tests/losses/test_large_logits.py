"""Logits of 1e3 to 1e7: value and gradients keep the digits that dense float32 does.

exp(z - lse) has to add up to 1 in every row and column. That takes logits of the backward pass
with the bits of those of the forward pass, and an lse that is not rounded to float32.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from loss_calls import by_rows, dense, inputs, ours, with_backends
from oracles import BACKENDS, randn, rms, value_and_gradients

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.losses.table import CASES

# whose definition holds exp of a logit, which overflows
OVERFLOWS = ("rince", "hcl", "debiased")
# an estimated log Z meets the log of each row's number before the logit: up to 70 times dense
WORSE = ("nce ragged",)
SCALES = ("scale", "logit_scale")
NAMES = [
    name
    for name, (row, case) in CASES.items()
    if row.name not in OVERFLOWS
    and name not in WORSE
    and (row.takes("temperature") or any(s in case.inputs for s in SCALES))
]
INTERPRETED = ("info_nce symmetric", "info_nce shared", "clip_loss", "siglip_loss", "nt_xent")
parametrize_scales = pytest.mark.parametrize("scale", [1e3, 1e5, 1e7])


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
        budget = 10 * eager + slack * torch.finfo(torch.float32).eps * size
        assert error <= budget, f"output {which}: error {error:.1e}, budget {budget:.1e}"


@with_backends(NAMES, interpreted=INTERPRETED)
@parametrize_scales
def test_every_loss(name, backend, scale):
    row, case = CASES[name]
    given = inputs(name, torch.float32, N=19)
    options = {"reduction": by_rows(name)}
    learned = [i for i, argument in enumerate(case.inputs) if argument in SCALES]
    for i in learned:
        given[i] = torch.full_like(given[i], scale).requires_grad_()
    if not learned and "scale" in case.options:
        options["scale"] = scale
    elif not learned:
        options["temperature"] = 1 / scale
    fused, definition = ours(name, backend=backend, **options), dense(name, **options)
    assert_as_dense(fused, definition, given, scale, slack=case.slack / 4)


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
        z1, z2 = (t[torch.arange(n) % 5].contiguous() for t in (z1, z2))
    options = {"normalize": normalize, "reduction": "none"}

    def run(function, x, y, log_scale):
        return function(x, y, scale=log_scale.exp(), **options)

    log_scale = torch.tensor(scale if normalize else scale / dim).log()
    given = [t.requires_grad_() for t in (z1, z2, log_scale)]
    fused = partial(fused, backend=backend)
    assert_as_dense(partial(run, fused), partial(run, definition), given, scale)
