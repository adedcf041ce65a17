"""The operators of rows and what belongs to each against their definitions, of every dtype."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import DOUBLE, randn
from torch.library import opcheck

from contrastive_kernels.ops import class_dot, has_row_kernels, row_distance

pytestmark = pytest.mark.skipif(
    "cpu" not in oracles.BACKENDS or oracles.DEVICE != "cpu", reason="needs the C++ engine"
)
SIZES = [(1, 1, 1), (5, 3, 7), (37, 2, 33), (70, 130, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
parametrize_normalize = pytest.mark.parametrize("normalize", [False, True], ids=["as is", "unit"])


def widened(x, normalize):
    x = x if x.dtype == DOUBLE else x.float()
    return F.normalize(x, dim=-1) if normalize else x


def distance(x, y, normalize):
    return (widened(y, normalize) - widened(x, normalize).unsqueeze(1)).square().sum(-1)


def products(x, labels, normalize):
    z = widened(x, normalize)
    same = labels[:, None] == labels[None, :]
    others = torch.where(same.fill_diagonal_(False), 1.0, 0.0).to(z.dtype) @ z
    return (z * others).sum(-1)


def places(labels):
    return torch.searchsorted(labels.sort().values, labels).int()


def labels_of(n, classes):
    return torch.randint(classes, (n,), generator=oracles.generator(7))


@parametrize_normalize
@pytest.mark.parametrize("sizes", SIZES)
def test_distances(sizes, normalize):
    n, k, d = sizes
    x, y = randn(n, d), randn(n, k, d, seed=1)
    oracles.assert_equal_in_double(
        lambda x, y: row_distance(x, y, normalize), lambda x, y: distance(x, y, normalize), [x, y]
    )
    for dtype in DTYPES:
        oracles.assert_within_budget(
            lambda x, y: row_distance(x, y, normalize),
            lambda x, y: distance(x, y, normalize),
            [x.to(dtype), y.to(dtype)],
        )


@parametrize_normalize
@pytest.mark.parametrize("classes", [1, 4, 60])
@pytest.mark.parametrize("sizes", [(1, 1), (37, 33), (130, 16)])
def test_products_with_the_rows_of_a_class(sizes, classes, normalize):
    n, d = sizes
    labels = labels_of(n, classes)
    found, expected = (
        lambda x: class_dot(x, places(labels), normalize),
        lambda x: products(x, labels, normalize),
    )
    x = randn(n, d)
    oracles.assert_equal_in_double(found, expected, [x])
    for dtype in DTYPES:
        oracles.assert_within_budget(found, expected, [x.to(dtype)])


@parametrize_normalize
def test_strided_rows(normalize):
    x, y, labels = randn(9, 6).T, randn(5, 9, 6, seed=1).permute(2, 0, 1), labels_of(6, 2)
    oracles.assert_equal_in_double(
        lambda x, y: row_distance(x, y, normalize), lambda x, y: distance(x, y, normalize), [x, y]
    )
    oracles.assert_equal_in_double(
        lambda x: class_dot(x, places(labels), normalize),
        lambda x: products(x, labels, normalize),
        [x],
    )


def test_gradients_where_they_are_needed():
    x, y = randn(5, 4), randn(5, 3, 4, seed=1)
    both = torch.autograd.grad(
        row_distance(x.requires_grad_(), y.requires_grad_(), True).sum(), (x, y)
    )
    of_x = torch.autograd.grad(row_distance(x, y.detach(), True).sum(), x)
    of_y = torch.autograd.grad(row_distance(x.detach(), y, True).sum(), y)
    assert all(map(torch.equal, both, (*of_x, *of_y)))


def test_raised_norms_are_constants():
    x, y = randn(4, 3), randn(4, 2, 3, seed=1)
    x[0], x[1] = 0, 1e-14 * x[1]
    y[1, 0], y[2, 1] = 1e-13 * y[1, 0], 0
    got = oracles.value_and_gradients(lambda x, y: row_distance(x, y, True), [x, y])
    wanted = oracles.value_and_gradients(lambda x, y: distance(x, y, True), [x, y])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    labels = torch.tensor([0, 0, 1, 0])
    got = oracles.value_and_gradients(lambda x: class_dot(x, places(labels), True), [x])
    wanted = oracles.value_and_gradients(lambda x: products(x, labels, True), [x])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_equal_rows_have_no_distance():
    x = randn(6, 50, dtype=torch.float32).requires_grad_()
    y = x.detach().unsqueeze(1).requires_grad_()
    value = row_distance(x, y, True)
    assert not value.any()
    assert not any(g.any() for g in torch.autograd.grad(value.sum(), (x, y)))
    alone = class_dot(x, torch.arange(6, dtype=torch.int32), True)
    assert not alone.any() and not torch.autograd.grad(alone.sum(), x)[0].any()


def test_nan_is_never_hidden():
    x, y = randn(4, 3), randn(4, 2, 3, seed=1)
    x[0, 0] = y[1, 1, 2] = torch.nan
    assert row_distance(x, y, True).isnan().tolist() == [
        [True] * 2,
        [False, True],
        *[[False] * 2] * 2,
    ]
    labels = torch.tensor([0, 0, 1, 1])
    assert class_dot(x, places(labels), True).isnan().tolist() == [True, True, False, False]


def test_registration():
    x, y = randn(4, 3).requires_grad_(), randn(4, 2, 3, seed=1).requires_grad_()
    place = places(labels_of(4, 2))
    operators = torch.ops.contrastive_kernels
    opcheck(operators.row_distance_cpu, (x, y, True))
    opcheck(operators.class_dot_cpu, (x, place, True))
    for value in (row_distance(x, y, True), class_dot(x, place, True)):
        gradient = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="second-order"):
            gradient.sum().backward()


def test_any_number_of_threads():
    x, y, labels = randn(600, 64), randn(600, 9, 64, seed=1), labels_of(600, 3)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((row_distance(x, y, True), class_dot(x, places(labels), True)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_bad_operands():
    x = randn(4, 3)
    for place in ([0, 0, 2, -1], [0, 0, 4, 2], [3, 3, 3, 3]):
        with pytest.raises(IndexError, match="place must have numbers of rows that come before"):
            class_dot(x, torch.tensor(place, dtype=torch.int32), True)
    with pytest.raises(ValueError, match=r"place must have shape \(4\)"):
        class_dot(x, torch.zeros(3, dtype=torch.int32), True)
    with pytest.raises(ValueError, match="and not be empty"):
        class_dot(x[:0], torch.zeros(0, dtype=torch.int32), True)
    with pytest.raises(ValueError, match="y must have shape"):
        row_distance(x, randn(5, 2, 3), True)
    with pytest.raises(ValueError, match=r"grad must have shape \[4, 2\]"):
        operator = torch.ops.contrastive_kernels.row_distance_backward_cpu
        y, values = randn(4, 2, 3), randn(4, 2)
        operator(x, y, values, values[:2], True, [True, True])


def test_who_has_them():
    assert [has_row_kernels(name) for name in ("cpu", "triton", "reference")] == [
        True,
        False,
        False,
    ]
