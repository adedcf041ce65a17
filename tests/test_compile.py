"""torch.compile(fullgraph=True, dynamic=True) of every public loss: one graph for all sizes."""

from __future__ import annotations

import oracles
import pytest
import torch

import contrastive_kernels as ck

GROUP = 8


def features(rows: int, seed: int, *more: int) -> torch.Tensor:
    return oracles.randn(*more, rows, 5, seed=seed).float().requires_grad_()


def labels(rows: int) -> torch.Tensor:
    return torch.arange(rows) % 3


# each makes the inputs of one call from the number of rows
CASES = {
    "row_stats": (
        lambda x, y: sum(t.sum() for t in ck.row_stats(x, y, scale=2.0, columns=True)),
        lambda n: (features(n, 1), features(2 * n, 2)),
    ),
    "row_softplus": (
        lambda x, y: ck.row_softplus(x, y, scale=2.0, bias=-1.0).sum(),
        lambda n: (features(n, 1), features(2 * n, 2)),
    ),
    "info_nce": (ck.info_nce, lambda n: (features(n, 1), features(n, 2))),
    "info_nce queue": (
        lambda q, k, negatives: ck.info_nce(q, k, negatives=negatives, alpha=100.0),
        lambda n: (features(n, 1), features(n, 2), features(40, 3).detach()),
    ),
    "info_nce per query": (
        lambda q, k, negatives: ck.info_nce(q, k, negatives=negatives, in_batch=True),
        lambda n: (features(n, 1), features(n, 2), features(7, 3, n)),
    ),
    "eqco": (ck.eqco, lambda n: (features(n, 1), features(n, 2))),
    "nt_xent": (ck.nt_xent, lambda n: (features(n, 1), features(n, 2))),
    "clip_loss": (
        lambda x, y, t: ck.clip_loss(x, y, t.exp()),
        lambda n: (features(n, 1), features(n, 2), torch.tensor(1.5, requires_grad=True)),
    ),
    "siglip_loss": (
        lambda x, y, t, b: ck.siglip_loss(x, y, t.exp(), b),
        lambda n: (
            features(n, 1), features(n, 2),
            torch.tensor(1.5, requires_grad=True), torch.tensor(-3.0, requires_grad=True),
        ),
    ),
    "sup_con": (ck.sup_con, lambda n: (features(n, 1), labels(n))),
    "sup_con views": (ck.sup_con, lambda n: (features(2, 1, n), labels(n))),
    "dcl": (ck.dcl, lambda n: (features(n, 1), features(n, 2))),
    "dclw": (lambda a, b: ck.dcl(a, b, sigma=0.5), lambda n: (features(n, 1), features(n, 2))),
    "debiased": (ck.debiased, lambda n: (features(n, 1), features(n, 2))),
    "hcl": (ck.hcl, lambda n: (features(n, 1), features(n, 2))),
    "nce": (
        lambda q, k, negatives: ck.nce(q, k, negatives, num_data=1000),
        lambda n: (features(n, 1), features(n, 2), features(9, 3).detach()),
    ),
    "cacr": (ck.cacr, lambda n: (features(n, 1), features(4, 2, n))),
    "cacr rbf": (
        lambda q, p, negatives: ck.cacr(q, p, negatives=negatives, cost="rbf"),
        lambda n: (features(n, 1), features(n, 2), features(30, 3)),
    ),
    "cacr_views": (ck.cacr_views, lambda n: (features(n, 1, 3),)),
    "cct": (ck.cct, lambda n: (features(n, 1), features(n, 2))),
    "w_mse": (
        lambda views, permutations: ck.w_mse(
            views, group_size=GROUP, permutations=permutations
        ),
        lambda n: (features(GROUP * n, 1, 2), torch.arange(GROUP * n).flip(0)[None]),
    ),
    "intl": (ck.intl, lambda n: (features(n, 1, 2),)),
    "intl features": (lambda views: ck.intl(views, axis=1), lambda n: (features(n, 1, 3),)),
    "whiten zca": (
        lambda x: ck.whiten(x, method="zca").square().sum(),
        lambda n: (features(n + 6, 1, 2),),
    ),
    "info_nce statistics": (
        lambda q, k: ck.info_nce(q, k, return_stats=True)[0]
        + ck.info_nce(q, k, return_stats=True)[1].negative_similarity,
        lambda n: (features(n, 1), features(n, 2)),
    ),
}  # fmt: skip


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


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_every_size(name):
    torch._dynamo.reset()
    function, make_inputs = CASES[name]
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph

    check(
        function, make_inputs,
        torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager"), (6, 11),
    )  # fmt: skip
    torch._dynamo.reset()
    counted = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for rows in (6, 11, 20):
        counted(*make_inputs(rows))
    assert len(graphs) == 1, f"{len(graphs)} graphs for 3 sizes"


@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_inductor(name):
    torch._dynamo.reset()
    function, make_inputs = CASES[name]
    check(function, make_inputs, torch.compile(function, fullgraph=True, dynamic=True), (6, 11))


def test_a_module_compiles():
    torch._dynamo.reset()
    module = torch.compile(
        ck.NTXent(temperature=0.2), fullgraph=True, dynamic=True, backend="eager"
    )
    a, b = features(6, 1), features(6, 2)
    torch.testing.assert_close(module(a, b), ck.nt_xent(a, b, temperature=0.2))
