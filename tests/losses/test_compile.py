"""torch.compile(fullgraph=True, dynamic=True) of every public loss: one graph for all sizes."""

from __future__ import annotations

from functools import partial

import oracles
import pytest
import torch
from loss_calls import FIRST, inputs, ours

import contrastive_kernels as ck
from contrastive_kernels.losses.table import CASES


def features(rows: int, seed: int, *more: int) -> torch.Tensor:
    return oracles.randn(*more, rows, 5, seed=seed).float().requires_grad_()


def of_case(name: str, n: int) -> list[torch.Tensor]:
    unit = CASES[name][1].unit
    return inputs(name, torch.float32, N=unit * n, M=n + 3)


# each makes the inputs of one call from the number of rows
FUNCTIONS = {
    name: (ours(name), partial(of_case, name))
    for name, (row, case) in CASES.items()
    if case.compiled or name == FIRST[row.name]
}
FUNCTIONS |= {
    "row_stats": (
        lambda x, y: sum(t.sum() for t in ck.row_stats(x, y, scale=2.0, columns=True)),
        lambda n: (features(n, 1), features(2 * n, 2)),
    ),
    "row_softplus": (
        lambda x, y: ck.row_softplus(x, y, scale=2.0, bias=-1.0).sum(),
        lambda n: (features(n, 1), features(2 * n, 2)),
    ),
    "whiten zca": (
        lambda x: ck.whiten(x, method="zca").square().sum(),
        lambda n: (features(n + 6, 1, 2),),
    ),
    "info_nce statistics": (
        lambda q, k: (
            ck.info_nce(q, k, return_stats=True)[0]
            + ck.info_nce(q, k, return_stats=True)[1].negative_similarity
        ),
        lambda n: (features(n, 1), features(n, 2)),
    ),
}


def check(function, make_inputs, compiled, sizes):
    for rows in sizes:
        inputs = make_inputs(rows)
        leaves = [t for t in inputs if t.requires_grad]
        eager, fused = function(*inputs), compiled(*inputs)
        torch.testing.assert_close(fused, eager)
        for a, b in zip(
            torch.autograd.grad(fused, leaves), torch.autograd.grad(eager, leaves), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_for_every_size(name):
    torch._dynamo.reset()
    function, make_inputs = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    check(function, make_inputs, compiled, (6,))
    with torch.compiler.set_stance("fail_on_recompile"):
        check(function, make_inputs, compiled, (11, 20))


def test_inductor():
    torch._dynamo.reset()
    function, make_inputs = FUNCTIONS["nt_xent"]
    check(function, make_inputs, torch.compile(function, fullgraph=True, dynamic=True), (6, 11))


def test_a_module_compiles():
    torch._dynamo.reset()
    module = torch.compile(
        ck.NTXent(temperature=0.2), fullgraph=True, dynamic=True, backend="eager"
    )
    a, b = features(6, 1), features(6, 2)
    torch.testing.assert_close(module(a, b), ck.nt_xent(a, b, temperature=0.2))
