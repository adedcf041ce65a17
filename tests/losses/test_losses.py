"""Every loss against its paper's definition in `reference.py`: value and gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from loss_calls import FIRST, backends, by_rows, dense, inputs, ours, with_backends
from oracles import (
    BACKENDS,
    DOUBLE,
    assert_equal_in_double,
    assert_within_budget,
    generator,
    interpreted,
    randn,
    value_and_gradients,
    views,
)
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.losses.table import CASES

parametrize_backends = pytest.mark.parametrize("backend", BACKENDS)


# (temperature, dtype) of kernels that are interpreted: each once, and the largest logits twice
SLOWLY = [(1.0, torch.float32), (0.07, torch.float16), (0.01, torch.float64), (0.01, torch.float16)]


def has_temperatures(name: str) -> bool:
    row, case = CASES[name]
    return case.temperatures or (FIRST[row.name] == name and row.takes("temperature"))


@with_backends()
def test_value_and_gradients_in_double(name, backend):
    reduction = by_rows(name)
    assert_equal_in_double(
        ours(name, backend=backend, reduction=reduction),
        dense(name, reduction=reduction),
        inputs(name),
    )


@pytest.mark.parametrize("name", [name for name in CASES if by_rows(name) == "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(name, reduction):
    given = inputs(name)
    rows = ours(name, reduction="none")(*given)
    reduced = ours(name, reduction=reduction)(*given)
    torch.testing.assert_close(reduced, getattr(rows, reduction)(), rtol=1e-12, atol=1e-12)
    expected = dense(name, reduction=reduction)(*given)
    torch.testing.assert_close(reduced, expected, rtol=1e-11, atol=1e-11)


def check_error_budget(name: str, backend: str, dtype: torch.dtype) -> None:
    reduction = by_rows(name)
    assert_within_budget(
        ours(name, backend=backend, reduction=reduction),
        dense(name, reduction=reduction),
        inputs(name, dtype),
        slack=CASES[name][1].slack,
    )


# what is interpreted rounds in its sweeps, which tests/ops and the first case of a loss look at
@with_backends(interpreted=FIRST.values())
def test_error_budget(name, backend):
    check_error_budget(name, backend, torch.bfloat16)


@with_backends(interpreted=FIRST.values())
def test_error_budget_in_single(name, backend):
    check_error_budget(name, backend, torch.float32)


@with_backends([name for name in CASES if has_temperatures(name)])
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_temperatures(name, backend, temperature, dtype):
    if interpreted(backend) and (temperature, dtype) not in SLOWLY:
        return
    options = {"temperature": temperature, "reduction": "none"}
    assert_within_budget(
        ours(name, backend=backend, **options),
        dense(name, **options),
        inputs(name, dtype),
        slack=64 + 4 / temperature,  # logits are rounded to eps / temperature
    )


def strided(t: Tensor) -> Tensor:
    """The same numbers with gaps between them, and the last two axes exchanged in memory."""
    if t.dim() == 0:
        return t
    turned = t.mT if t.dim() > 1 else t
    spread = torch.stack((turned, torch.zeros_like(turned)), -1)[..., 0]
    spread = spread.mT if t.dim() > 1 else spread
    return spread.detach().requires_grad_(t.requires_grad)


@with_backends(interpreted=FIRST.values())
def test_inputs_of_any_strides(name, backend):
    given = [strided(t) for t in inputs(name)]
    assert not all(t.is_contiguous() for t in given)
    assert_equal_in_double(ours(name, backend=backend), dense(name), given)


@with_backends(interpreted=FIRST.values())
def test_inputs_are_not_changed(name, backend):
    given = inputs(name)
    copies = [t.detach().clone() for t in given]
    ours(name, backend=backend)(*given).backward()
    assert all(torch.equal(after, before) for after, before in zip(given, copies, strict=True))


@pytest.mark.parametrize("axis", [0, 1])
def test_weight_of_the_trace_loss_of_intl(axis):
    """0.01 (log2 - 3) of 16 samples or 64 features; it multiplies the sum of two trace losses."""
    views = randn(2, 16, 64)
    without, one = (ck.intl(views, axis=axis, lam=lam) for lam in (0.0, 1.0))
    weight = 0.03 if axis == 1 else 0.01
    torch.testing.assert_close(ck.intl(views, axis=axis), without + weight * (one - without))


@parametrize_backends
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent"])
def test_near_convergence_in_half_precision(backend, loss):
    """A loss near 1e-9 keeps its digits, which lse - positive would round away."""
    query = torch.eye(16, dtype=torch.bfloat16)
    options = [32.0] if loss == "clip_loss" else []
    keywords = {} if options else {"temperature": 1 / 32}
    run = partial(getattr(ck, loss), backend=backend, reduction="none", **keywords)
    value = run(query, query.clone(), *options)
    candidates = 30 if loss == "nt_xent" else 15
    expected = torch.tensor(candidates, dtype=DOUBLE) * torch.tensor(-32.0, dtype=DOUBLE).exp()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected.expand_as(value), rtol=1e-5, atol=0)


@parametrize_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("loss", ["info_nce", "nt_xent", "dcl", "hcl"])
def test_temperature_001_is_finite_and_right(loss, backend, dtype):
    """Logits reach 100, whose exp overflows float32 when squared."""
    options = {"temperature": 0.01, "reduction": "none"}
    ours = partial(getattr(ck, loss), backend=backend, **options)
    dense = partial(getattr(reference, loss), **options)
    z = randn(33, 16, dtype=dtype)
    assert_within_budget(ours, dense, [z, z.flip(0).contiguous()])
    same = torch.ones(33, 16, dtype=dtype)
    value, *gradients = value_and_gradients(ours, [same, same])
    expected = dense(same.double(), same.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    # the exact gradient is 0; each term of its sums is up to 100
    assert all(g.abs().max() < 1e-4 for g in gradients)


@parametrize_backends
@pytest.mark.parametrize("q, temperature", [(1.0, 0.02), (0.8, 1 / 60), (0.5, 0.01)])
def test_rince_of_false_positives_is_finite(backend, q, temperature):
    """A positive that is far among near negatives: exp(q gap) alone would overflow float32."""
    query = randn(5, 8, dtype=torch.float32)
    options = {"q": q, "temperature": temperature, "reduction": "none"}
    assert_within_budget(
        partial(ck.rince, backend=backend, **options),
        partial(reference.rince, **options),
        [query, -query],
        slack=64 + 4 / temperature,
    )
    near = partial(ck.rince, negatives=query, backend=backend, **options)
    dense = partial(reference.rince, negatives=query.double(), **options)
    value = near(query, -query)
    torch.testing.assert_close(
        value.double(), dense(query.double(), -query.double()), rtol=1e-4, atol=0
    )


@parametrize_backends
def test_rows_without_negatives(backend):
    """All negatives of every row dropped: loss 0 and gradient exactly 0."""
    query, key = views(5, 3)
    one = torch.zeros(5, dtype=torch.long)
    for alpha in (None, 100.0):
        value, *gradients = value_and_gradients(
            partial(
                ck.info_nce, exclude=(one, one), symmetric=True, alpha=alpha, backend=backend,
                reduction="none",
            ),
            [query, key],
        )  # fmt: skip
        assert torch.equal(value, torch.zeros(5, dtype=DOUBLE))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@parametrize_backends
def test_frozen_keys_and_queue(backend):
    """The gradient of the query alone is the same as beside other gradients."""
    query, key, queue = views(7, 5, (11, 5))
    query.requires_grad_()
    loss = ck.info_nce(query, key, negatives=queue, backend=backend)
    (alone,) = torch.autograd.grad(loss, query)
    key.requires_grad_(), queue.requires_grad_()
    loss = ck.info_nce(query, key, negatives=queue, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss, query)[0], alone, rtol=1e-12, atol=0)


@with_backends(FIRST.values())
def test_autocast_keeps_the_precision_of_the_inputs(name, backend):
    if backend == "triton":
        pytest.skip("products in the type of the region: see the next test")
    loss = ours(name, backend=backend)

    def under_autocast(*given):
        with torch.autocast(given[0].device.type, torch.bfloat16):
            return loss(*given)

    given = inputs(name, torch.float32)
    exact = value_and_gradients(loss, given)
    for got, wanted in zip(value_and_gradients(under_autocast, given), exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not usable here")
@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_autocast_casts_the_operands_of_triton(name):
    loss = ours(name, backend="triton")

    def under_autocast(*given):
        with torch.autocast(given[0].device.type, torch.bfloat16):
            return loss(*given)

    def cast_by_hand(*given):
        return loss(*(t.bfloat16() if t.is_floating_point() else t for t in given))

    given = inputs(name, torch.float32)
    got, wanted = (value_and_gradients(f, given) for f in (under_autocast, cast_by_hand))
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-7)
    for a, b in zip(got[1:], wanted[1:], strict=True):
        assert a.dtype == torch.float32
        # by hand, gradients of several operators are added in bfloat16
        assert (a - b).norm() <= torch.finfo(torch.bfloat16).eps * b.norm()


HAS_IDS = [
    n for n, (_, case) in CASES.items() if any(i.kind == "ids" for i in case.inputs.values())
]


@with_backends(HAS_IDS, interpreted=[name for name in HAS_IDS if name in FIRST.values()])
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.uint16, torch.int32, torch.uint64], ids=str
)
def test_ids_of_any_type(name, backend, dtype):
    """Equal ids are equal whatever they are stored as: with bools there are two of them, and those
    of uint64 are beyond int64."""

    def stored(t: torch.Tensor) -> torch.Tensor:
        return (t.long() - 2**63).view(dtype) if dtype == torch.uint64 else t.to(dtype)

    given = inputs(name)
    ids = [t if t.is_floating_point() else (t % 2 if dtype == torch.bool else t) for t in given]
    same = {id(t): stored(t) for t in ids if not t.is_floating_point()}  # one tensor stays one
    assert_equal_in_double(
        lambda *x: ours(name, backend=backend)(*(same.get(id(t), t) for t in x)),
        lambda *x: ours(name, backend=backend)(*x),
        ids,
    )


@parametrize_backends
def test_labels_of_any_value_and_order(backend):
    features = randn(50, 5)
    labels = torch.randint(-(2**40), 2**40, (7,), generator=generator())[
        torch.randint(7, (50,), generator=generator(1))
    ]
    assert_equal_in_double(
        lambda x: ck.sup_con(x, labels, backend=backend),
        lambda x: reference.sup_con(x, labels),
        [features],
    )


SECOND_ORDER = [
    (name, backend)
    for name in FIRST.values()
    for backend in backends(name)
    if backend == "reference"
]


@pytest.mark.parametrize(("name", "backend"), SECOND_ORDER)
def test_second_order_gradients(name, backend):
    given = inputs(name, N=3, D=2)
    # where differences are exact: logits of size 1
    options = {"temperature": 1.0} if CASES[name][0].takes("temperature") else {}
    learned = [i for i, t in enumerate(given) if t.requires_grad]

    def run(*chosen):
        everything = list(given)
        for i, t in zip(learned, chosen, strict=True):
            everything[i] = t
        return ours(name, backend=backend, **options)(*everything)

    assert torch.autograd.gradgradcheck(run, [given[i] for i in learned])


@pytest.mark.parametrize(
    ("name", "backend"),
    [(n, b) for n in FIRST.values() for b in backends(n) if (n, b) not in SECOND_ORDER],
)
def test_second_order_gradients_are_refused_elsewhere(name, backend):
    given = inputs(name)
    with pytest.raises(NotImplementedError, match="second-order"):
        loss = ours(name, backend=backend)(*given)
        (gradient,) = torch.autograd.grad(loss, given[0], create_graph=True)
        gradient.sum().backward()


def test_mi_lower_bound():
    loss = torch.tensor([0.5, 1.0], requires_grad=True)
    bound = ck.mi_lower_bound(loss, 15)
    assert not bound.requires_grad
    torch.testing.assert_close(bound, torch.tensor(16.0).log() - loss.detach())
    bound = ck.mi_lower_bound(loss, torch.tensor([1, 3]))
    torch.testing.assert_close(bound, torch.tensor([2.0, 4.0]).log() - loss.detach())


def test_log_z_replaces_a_z_that_overflows():
    query, key, negatives = (t.float() for t in views(5, 3, (4, 3)))
    options = {"num_data": 1000, "temperature": 0.005}
    loss = ck.nce(query, key, negatives, log_z=200.0, **options)
    expected = ck.nce(query.double(), key.double(), negatives.double(), log_z=200.0, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_half_scalars_are_rounded_once(backend):
    """The scale meets the positives and the sweep, in terms that nearly cancel."""
    z1 = 3 + randn(40, 16, seed=1, dtype=torch.float32)
    z2 = z1 + 0.3 * randn(40, 16, seed=2, dtype=torch.float32)
    for loss, values in (("clip_loss", (20.0,)), ("siglip_loss", (20.0, -10.0))):
        gradients = []
        for dtype in (torch.float32, torch.bfloat16):
            scalars = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in values]
            value = getattr(ck, loss)(z1, z2, *scalars, backend=backend)
            gradients.append(torch.autograd.grad(value, scalars))
        for exact, rounded in zip(*gradients, strict=True):
            torch.testing.assert_close(rounded, exact.bfloat16(), rtol=0, atol=0)
