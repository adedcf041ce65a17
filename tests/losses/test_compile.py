"""torch.compile(fullgraph=True, dynamic=True) of every public loss: one graph for all sizes."""

from __future__ import annotations

from functools import partial

import oracles
import pytest
import torch
from loss_calls import FIRST, inputs, ours

import contrastive_kernels as ck
from contrastive_kernels.losses.table import CASES
from contrastive_kernels.ops import NAMESPACE

# Of these, which have all operators, gradients are traced too; of the others the loss itself.
TRACED = {
    "info_nce": {"row_stats"},
    "info_nce masked": {"row_dot"},
    "siglip_loss": {"row_softplus"},
    "mnrl nested": {"nested_stats"},
    "gist": {"guided_lse"},
    "late_interaction": {"max_sim"},
    "sup_con": {"class_dot"},
    "cacr": {"row_distance"},
    "w_mse": {"permute_rows", "view_distance", "whiten_cholesky"},
    "intl": {"whiten_newton_schulz"},
    "koleo": {"top_k"},
    "triplet semihard": {"semi_hard"},
    "whiten zca": {"whiten_zca"},
    "clip_distill": set(),  # a Function of torch
    "hcl": set(),  # sums of many statistics
}


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


def operators(graph: torch.fx.GraphModule) -> set[str]:
    """Ours, without the names of their backends."""
    targets = (node.target for node in graph.graph.nodes)
    names = [t.name() for t in targets if isinstance(t, torch._ops.OpOverload)]
    ours = (name.split("::")[1] for name in names if name.startswith(NAMESPACE))
    return {name.removesuffix("_cpu").removesuffix("_triton") for name in ours}


def as_it_is(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
    assert operators(graph) <= set.union(*TRACED.values())
    return graph.forward


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_for_every_size(name):
    torch._dynamo.reset()
    function, make_inputs = FUNCTIONS[name]
    backend = "aot_eager" if name in TRACED else as_it_is
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
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
