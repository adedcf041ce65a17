"""No loss and no whitening runs an operator that adds in no fixed order on a GPU."""

from __future__ import annotations

import pytest
import torch
from loss_calls import FIRST, by_rows, inputs, ours, with_backends
from oracles import randn, value_and_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive_kernels as ck
from contrastive_kernels.autograd import define
from contrastive_kernels.losses.table import CASES
from contrastive_kernels.ops import rows
from contrastive_kernels.ops.registration import NAMESPACE
from contrastive_kernels.whitening import operators

# What features can meet of the lists in help(torch.use_deterministic_algorithms), torch 2.13, by
# the operators that it comes to: index_add is the backward of index_select, scatter_add of gather.
ANY = {
    "index_add", "index_put", "_index_put_impl", "index_copy", "put", "scatter_add",
    "scatter_reduce", "embedding_dense_backward", "histc", "nll_loss_forward",
}  # fmt: skip
OF_FLOATS = {"cumsum", "bincount", "scatter", "median"}
# kernels that are interpreted are slow
FEW = ("info_nce", "info_nce symmetric", "siglip_loss", "nt_xent", "sup_con", "cacr")


class Recorded(TorchDispatchMode):
    """The operators that run, those within operators of this package included."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator.name().split(".")[0]
        if operator.namespace == NAMESPACE:
            key = torch._C._dispatch_keys(next(t for t in args if isinstance(t, Tensor)))
            with self:
                return torch.library.get_kernel(operator, "CPU").call_boxed(key, *args, **kwargs)
        base = name.split("::")[1].rstrip("_")
        floats = any(isinstance(t, Tensor) and t.is_floating_point() for t in args)
        if base in ANY or (base in OF_FLOATS and floats):
            self.found.add(name)
        return operator(*args, **kwargs)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Sums that CPUs make in another way are made as on a GPU."""
    monkeypatch.setattr(rows, "adds_in_order", lambda x: False)
    monkeypatch.setattr(operators, "_use_cpu_kernel", lambda x: False)


def assert_ordered(function, given: list[Tensor]) -> None:
    with Recorded() as recorded:
        value_and_gradients(function, given)
    assert not recorded.found


@with_backends(interpreted=FEW)
def test_operators_of_a_loss(name, backend, as_on_a_gpu):
    assert_ordered(ours(name, backend=backend, reduction=by_rows(name)), inputs(name))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("method", ["cholesky", "zca", "newton_schulz"])
def test_operators_of_whitening(method, backend, as_on_a_gpu):
    x = randn(2, 24, 5)
    assert_ordered(lambda x: ck.whiten(x, method=method, backend=backend), [x])
    assert_ordered(ck.Whitening(5, method=method), [x[0]])


def test_what_is_recorded():
    """An operator that is listed is found, also in a backward, and in an operator of ours."""
    which = torch.tensor([0, 2, 0])
    library = torch.library.Library(NAMESPACE, "FRAGMENT")

    @define(library)
    def _added_anyhow(x: Tensor, which: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, which, x)

    with Recorded() as recorded:
        _added_anyhow(randn(3, 2), which)
    assert recorded.found == {"aten::index_add"}
    for function in (lambda x: x.index_select(0, which), lambda x: x[which]):
        with Recorded() as recorded:
            value_and_gradients(function, [randn(4, 3)])
        assert recorded.found & {"aten::index_add_", "aten::index_add", "aten::index_put",
                                 "aten::index_put_", "aten::_index_put_impl_"}  # fmt: skip
    with Recorded() as recorded:  # of CPUs
        rows.sum_rows(randn(3, 2), which, 3, "cpu")
    assert recorded.found == {"aten::index_add"}


@with_backends(FIRST.values(), interpreted=())
def test_deterministic_algorithms_run_every_loss(name, backend):
    wanted = value_and_gradients(ours(name, backend=backend), inputs(name))
    torch.use_deterministic_algorithms(True)
    try:
        found = value_and_gradients(ours(name, backend=backend), inputs(name))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [n for n, (row, _) in CASES.items() if row.name == "sup_con"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sums_over_classes_as_on_a_gpu(name, backend, monkeypatch):
    function, given = ours(name, backend=backend), inputs(name)
    wanted = value_and_gradients(function, given)
    monkeypatch.setattr(rows, "adds_in_order", lambda x: False)
    for a, b in zip(value_and_gradients(function, given), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
