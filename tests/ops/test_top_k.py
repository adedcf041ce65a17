"""The largest products of each row, against a search of float64 rows one by one."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import BACKENDS, DOUBLE, interpreted, randn
from torch.library import opcheck

import contrastive_kernels as ck

parametrize_backend = pytest.mark.parametrize("backend", BACKENDS)
KERNELS = [name for name in BACKENDS if name != "reference"]
HALVES = [torch.bfloat16, torch.float16]


def definition(
    x, y, k, exclude=None, keep=None, threshold=None, largest=True, normalize=True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's list of (product, id), sorted; the values that it names."""
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    s = x @ y.T
    sign = 1 if largest else -1
    worst = -sign * torch.inf
    ids = torch.full((len(x), k), -1)
    for i, row in enumerate((sign * s.detach()).tolist()):
        limit = torch.inf if threshold is None else sign * float(threshold[i])
        found = [
            (-value, j)
            for j, value in enumerate(row)
            if value < limit
            and (exclude is None or exclude[0][i] != exclude[1][j])
            and (keep is None or keep[0][i] == keep[1][j])
        ]
        chosen = [j for _, j in sorted(found)[:k]]
        ids[i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return torch.where(ids < 0, worst, s.gather(1, ids.clamp(min=0))), ids


def id_pair(n, m, classes):
    ids = torch.randint(classes, (n + m,), generator=oracles.generator(5))
    return ids[:n], ids[n:]


def finite(found):
    """What a test can compare and differentiate."""
    values, ids = found
    return torch.where(ids < 0, 0.0, values)


# rows, keys, features, k: one of each; k beyond M; tiles and blocks plus or minus one; long lists
SIZES = [(1, 1, 1, 1), (5, 3, 7, 5), (63, 129, 17, 4), (65, 127, 33, 1), (3, 1025, 8, 20)]
OPTIONS = {
    "plain": lambda n, m: {},
    "dot": lambda n, m: {"normalize": False},
    "smallest": lambda n, m: {"largest": False},
    "exclude": lambda n, m: {"exclude": id_pair(n, m, 3)},
    "keep": lambda n, m: {"keep": id_pair(n, m, 2), "normalize": False},
    "both": lambda n, m: {"exclude": id_pair(n, m, 5), "keep": id_pair(m, n, 2)[::-1]},
    "threshold": lambda n, m: {"threshold": 0.3 * randn(n, seed=9)},
    "smallest beyond": lambda n, m: {"threshold": 0.3 * randn(n, seed=9), "largest": False},
}


@parametrize_backend
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_ids_and_gradients(sizes, options, backend):
    n, m, d, k = sizes
    if interpreted(backend) and (n > 5 or options in ("smallest", "both")):
        pytest.skip("enough, for an interpreter")
    x, y, given = randn(n, d), randn(m, d, seed=1), OPTIONS[options](n, m)
    values, ids = ck.top_k(x, y, k, backend=backend, **given)
    wanted_values, wanted_ids = definition(x, y, k, **given)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(values, wanted_values, rtol=1e-12, atol=1e-12)
    oracles.assert_equal_in_double(
        lambda x, y: finite(ck.top_k(x, y, k, backend=backend, **given)),
        lambda x, y: finite(definition(x, y, k, **given)),
        [x, y],
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("normalize", [False, True])
def test_error_budget(dtype, normalize, backend):
    n, m, d, k = (4, 40, 16, 3) if interpreted(backend) else (70, 300, 48, 7)
    inputs = [randn(n, d).to(dtype), randn(m, d, seed=1).to(dtype)]
    oracles.assert_within_budget(
        lambda x, y: ck.top_k(x, y, k, normalize=normalize, backend=backend).values,
        lambda x, y: ck.top_k(x, y, k, normalize=normalize, backend="reference").values,
        inputs,
    )


@parametrize_backend
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_ties_go_to_the_smaller_id(dtype, backend):
    """Small whole numbers, whose products are exact in every order."""
    n, m, d, k = (3, 50, 4, 6) if interpreted(backend) else (67, 700, 6, 9)
    x, y = (
        torch.randint(-2, 3, (rows, d), generator=oracles.generator(rows)).double()
        for rows in (n, m)
    )
    threshold = (x @ y.T).median(1).values  # that of some key, which is not below it
    ids = {"exclude": id_pair(n, m, 5), "keep": id_pair(m, n, 2)[::-1]}
    runs = [{}, {"threshold": threshold}, {"threshold": threshold, "largest": False} | ids]
    if interpreted(backend):
        runs = runs[1:2] if dtype == torch.bfloat16 else runs[2:]
    for options in runs:
        given = {"normalize": False, **options}
        values, ids = definition(x, y, k, **given)
        found = ck.top_k(x.to(dtype), y.to(dtype), k, backend=backend, **given)
        assert torch.equal(found.ids, ids) and torch.equal(found.values.double(), values)


@pytest.mark.parametrize("backend", KERNELS)
def test_copies_of_a_key_tie_wherever_they_lie(backend):
    copies = 5 if interpreted(backend) else 90
    y = randn(7, 19, seed=1, dtype=torch.float32).repeat(copies, 1)
    ids = ck.top_k(randn(5, 19, dtype=torch.float32), y, 2 * copies, backend=backend).ids
    first = ids[:, :1] % 7 + 7 * torch.arange(copies)
    assert torch.equal(ids[:, :copies], first)


@parametrize_backend
def test_too_few_keys(backend):
    x, y = randn(3, 4), randn(2, 4, seed=1)
    ids = torch.tensor([0, 1, 2]), torch.tensor([1, 1])
    values, found = ck.top_k(x, y, 3, exclude=ids, threshold=randn(3) * 0 + 2, backend=backend)
    assert found[1].tolist() == [-1] * 3 and values[1].tolist() == [-torch.inf] * 3
    assert found[0, 2] == -1 and values[0, 2] == -torch.inf and set(found[0, :2].tolist()) == {0, 1}
    least = ck.top_k(x, y, 3, largest=False, exclude=ids, backend=backend)
    assert least.values[1].tolist() == [torch.inf] * 3 and least.ids[1].tolist() == [-1] * 3
    for grad in (torch.nan, torch.inf):  # of what is not there, nothing comes
        x.requires_grad_()
        values = ck.top_k(x, y, 3, exclude=ids, backend=backend).values
        values.backward(torch.where(values.detach().isinf(), grad, 1.0))
        assert x.grad.isfinite().all()


@parametrize_backend
def test_nan_comes_first_and_is_never_hidden(backend):
    x, y = randn(3, 4), randn(40, 4, seed=1)
    y[[7, 30], 2] = torch.nan
    for options in ({}, {"largest": False}, {"threshold": randn(3) - 5}):
        values, ids = ck.top_k(x, y, 3, backend=backend, **options)
        assert ids[:, :2].tolist() == [[7, 30]] * 3
        assert values[:, :2].isnan().all() and not values[:, 2].isnan().any()
    unknown = torch.full((3,), torch.nan)
    assert (ck.top_k(x, y, 3, threshold=unknown, backend=backend).ids[:, 2] == -1).all()
    x[1] = torch.nan
    values, ids = ck.top_k(x, y, 3, backend=backend)
    assert ids[1].tolist() == [0, 1, 2] and values[1].isnan().all()
    kinds = torch.zeros(40, dtype=torch.int64)
    kinds[[7, 30]] = 1
    values, ids = ck.top_k(x[:1], y, 40, keep=(kinds[:1], kinds), backend=backend)
    assert (ids[0] >= 0).sum() == 38 and not values.isnan().any()


@parametrize_backend
@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
def test_chunks_are_the_whole(dtype, backend):
    n, m = (2, 10) if interpreted(backend) else (33, 400)
    x, y = randn(n, 9).to(dtype), randn(m, 9, seed=1).to(dtype)
    y[m // 2 :] = y[: m - m // 2]  # everything twice
    given = {"exclude": id_pair(n, m, 4), "threshold": 0.5 + 0.1 * randn(n, seed=3)}
    chunks = list(y.split([m // 3, 0, m - m // 3]))
    runs = [(4, given), (m + 2, {}), (3, given | {"largest": False})]
    for k, options in runs[: 1 if interpreted(backend) else None]:
        whole, parts = (x.clone().requires_grad_() for _ in range(2))
        wanted = ck.top_k(whole, y, k, backend=backend, **options)
        found = ck.top_k(parts, chunks, k, backend=backend, **options)
        assert torch.equal(found.ids, wanted.ids)
        eps = torch.finfo(found.values.dtype).eps
        torch.testing.assert_close(found.values, wanted.values, rtol=8 * eps, atol=8 * eps)
        upstream = randn(n, k, seed=7).to(wanted.values.dtype)
        for of in (wanted, found):
            finite(of).backward(upstream)
        error = (parts.grad - whole.grad).abs().max()  # sums in another order
        assert error <= 16 * torch.finfo(dtype).eps * whole.grad.abs().max()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ engine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(5, 3000, 3), (300, 900, 40), (70, 260, 260)], ids=str)
def test_any_number_of_threads(sizes, dtype):
    n, m, k = sizes
    x, y = randn(n, 16).to(dtype), randn(m, 16, seed=1).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(ck.top_k(x, y, k, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))
    dense = ck.top_k(x.double(), y.double(), k, backend="reference")
    torch.testing.assert_close(found[0].values.double(), dense.values, rtol=1e-5, atol=1e-6)
    assert found[0].ids.sort(1).values.diff(dim=1).min() > 0  # each once


@parametrize_backend
def test_strides_and_other_types_of_ids(backend):
    x, y = randn(6, 9).T[:4], randn(12, 20, seed=1)[::2, 1:19:3]
    x, y = x[:, :6], y[:, :6]
    ids = id_pair(4, 6, 2)
    wanted = ck.top_k(x.contiguous(), y.contiguous(), 3, exclude=ids, backend=backend)
    strided = tuple(torch.stack((t, t), 1).to(torch.int16)[:, 0] for t in ids)
    found = ck.top_k(x, y, 3, exclude=strided, backend=backend)
    assert torch.equal(found.ids, wanted.ids)
    torch.testing.assert_close(found.values, wanted.values)


@pytest.mark.parametrize("backend", KERNELS)
def test_registration(backend):
    x, y = randn(4, 3).requires_grad_(), randn(6, 3, seed=1).requires_grad_()
    operator = getattr(torch.ops.contrastive_kernels, f"top_k_{backend}")
    opcheck(operator, (x, y, *6 * (None,), 2, True))
    if not interpreted(backend):
        ids = id_pair(4, 6, 2)
        opcheck(operator, (x, y, *ids, None, None, x[:, 0].detach(), None, 7, False))
    values = ck.top_k(x, y, 2, backend=backend).values
    gradient = torch.autograd.grad(values.sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second-order"):
        gradient.sum().backward()


def test_gradients_where_they_are_needed():
    x, y = randn(5, 4).requires_grad_(), randn(9, 4, seed=1).requires_grad_()
    both = torch.autograd.grad(ck.top_k(x, y, 3).values.sum(), (x, y))
    of_x = torch.autograd.grad(ck.top_k(x, y.detach(), 3).values.sum(), x)
    of_y = torch.autograd.grad(ck.top_k(x.detach(), y, 3).values.sum(), y)
    assert all(map(torch.equal, both, (*of_x, *of_y)))
    assert not ck.top_k(x, y, 3).ids.requires_grad


def test_every_derivative_of_the_reference():
    x, y = randn(3, 4), randn(6, 4, seed=1)

    def values(x, y):
        return ck.top_k(x, y, 2, backend="reference").values

    inputs = (x.requires_grad_(), y.requires_grad_())
    assert torch.autograd.gradcheck(values, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(values, inputs)


def test_transforms():
    x, y = randn(3, 4), randn(6, 4, seed=1)

    def total(x, y):
        return ck.top_k(x, y, 2).values.square().sum()

    wanted = torch.autograd.grad(total(x.requires_grad_(), y), x)[0]
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(total)(x, y), wanted)
    many = torch.stack((x, 2 * x + 1))
    found = torch.func.vmap(lambda x: ck.top_k(x, y, 2))(many)
    for i, each in enumerate(many):
        alone = ck.top_k(each, y, 2)
        assert torch.equal(found.ids[i], alone.ids) and torch.equal(found.values[i], alone.values)
    tangent = randn(3, 4, seed=4)
    _, pushed = torch.func.jvp(lambda x: total(x, y), (x,), (tangent,))
    torch.testing.assert_close(pushed, (wanted * tangent).sum())
    with pytest.raises(NotImplementedError, match="keys in chunks"):
        torch.func.grad(lambda x: ck.top_k(x, [y], 2).values.sum())(x)


def test_compiled():
    compiled = torch.compile(
        lambda x, y: ck.top_k(x, y, 3, threshold=x[:, 0]).values.clamp(min=-2).sum(),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for n, m in ((5, 9), (7, 30)):
        x, y = randn(n, 4).requires_grad_(), randn(m, 4, seed=1).requires_grad_()
        eager = ck.top_k(x, y, 3, threshold=x[:, 0]).values.clamp(min=-2).sum()
        wanted = torch.autograd.grad(eager, (x, y))
        assert all(map(torch.equal, torch.autograd.grad(compiled(x, y), (x, y)), wanted))


@parametrize_backend
def test_autocast_leaves_precision(backend):
    if backend == "triton":
        pytest.skip("features are cast to the type of the region, as for its other operators")
    x, y = (randn(n, 16, seed=n, dtype=torch.float32) for n in (5, 40))
    wanted = ck.top_k(x, y, 3, backend=backend)
    with torch.autocast(oracles.DEVICE, dtype=torch.bfloat16):
        found = ck.top_k(x, y, 3, backend=backend)
        chunks = ck.top_k(x, [y[:30], y[30:]], 3, backend=backend)
    assert all(map(torch.equal, wanted, found)) and torch.equal(chunks.ids, wanted.ids)


def test_nothing_of_the_size_of_the_matrix():
    if "cpu" not in BACKENDS:
        pytest.skip("needs the C++ engine")
    from contrastive_kernels import _cpu

    x, y = randn(2000, 8, dtype=torch.float32), randn(8000, 8, seed=1, dtype=torch.float32)
    _cpu.memory_peak()
    held = _cpu.memory_peak()  # by what came before
    ck.top_k(x, y, 10, backend="cpu")
    assert _cpu.memory_peak() - held < torch.get_num_threads() * 2**20 < 2000 * 8000


ERRORS = {
    "queries": (dict(queries=torch.ones(3)), ValueError, r"queries must have shape \(N, D\)"),
    "no queries": (dict(queries=torch.ones(0, 2)), ValueError, "queries must not be empty"),
    "keys": (dict(keys=torch.ones(5, 3)), ValueError, "queries and keys .* features D, got 2 and"),
    "no keys": (dict(keys=torch.ones(0, 2)), ValueError, "keys must not be empty"),
    "own keys": (dict(keys=torch.ones(3, 5, 2)), ValueError, r"keys must have shape \(N, D\)"),
    "k": (dict(k=0), ValueError, "k must be a whole number of at least 1, got 0"),
    "k of a share": (dict(k=1.5), ValueError, "k must be a whole number .* got 1.5"),
    "threshold": (dict(threshold=torch.ones(5)), ValueError, r"threshold must have shape \(3,\)"),
    "exclude": (dict(exclude=torch.ones(3)), TypeError, "exclude must be a pair"),
    "keep": (
        dict(keep=(torch.arange(3), torch.arange(4))), ValueError,
        r"keep: col_ids must have shape \(5,\)",
    ),
    "backend": (dict(backend="cuda"), RuntimeError, "has no kernels for this operation"),
}  # fmt: skip


@pytest.mark.parametrize("options, error, message", ERRORS.values(), ids=ERRORS)
def test_what_does_not_fit_is_refused(options, error, message):
    given = {"queries": torch.ones(3, 2), "keys": torch.ones(5, 2), "k": 2} | options
    with pytest.raises(error, match=message):
        ck.top_k(**given)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ engine")
@pytest.mark.parametrize("k, y", [(0, torch.ones(5, 2)), (2, torch.ones(3, 5, 2))])
def test_the_operator_looks_at_what_it_gets(k, y):
    with pytest.raises(ValueError, match=r"top_k needs y \(M, D\) and k >= 1"):
        torch.ops.contrastive_kernels.top_k_cpu(torch.ones(3, 2), y, *6 * (None,), k, True)


def test_double_stays_double():
    assert ck.top_k(randn(2, 3), randn(4, 3), 1).values.dtype == DOUBLE
