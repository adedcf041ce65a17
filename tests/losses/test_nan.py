"""NaN in gives NaN out, whatever its bits are, in every loss."""

from __future__ import annotations

import itertools

import torch
from loss_calls import FIRST, by_rows, dense, inputs, ours, with_backends
from nans import NANS, put_nan

from contrastive_kernels.losses.table import CASES

# whitening raises, and says which group it is; a lonely anchor has the loss 0
NAMES = [
    name
    for name, (row, _) in CASES.items()
    if row.name not in ("w_mse", "intl") and name != "sup_con lonely"
]


@with_backends(NAMES, interpreted=FIRST.values())
def test_nan_of_any_bits_reaches_the_loss(name, backend):
    """From every input, to the rows that it reaches in the definition."""
    kinds = itertools.cycle(NANS)
    reduction = by_rows(name)
    loss = ours(name, reduction=reduction, backend=backend)
    definition = dense(name, reduction=reduction)
    reached = False
    for which, t in enumerate(inputs(name, torch.float32)):
        if t.is_floating_point():
            bits = next(kinds)
            given = [u.detach() for u in inputs(name, torch.float32)]
            put_nan(given[which], 0, bits)
            expected = definition(*given).isnan()
            assert torch.equal(loss(*given).isnan(), expected), (which, hex(bits))
            reached = reached or bool(expected.any())
    assert reached
