"""Sweeps at several prefixes of the features against a dense one of each prefix."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    BACKENDS,
    DOUBLE,
    assert_equal_in_double,
    assert_within_budget,
    randn,
    value_and_gradients,
)
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.ops import operands, softplus_sweep, sweep

needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built here")
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not usable here")

# rows, keys, ends: one pair, primes, whole tiles and one more or less
SHAPES = [
    (1, 1, (2,)), (1, 5, (2, 3)), (67, 131, (3, 7, 20)), (64, 128, (64, 128)),
    (65, 127, (2, 3, 4, 130)), (129, 33, (63, 65, 128)), (257, 300, (16, 600)),
]  # fmt: skip


def ids_of(rows: int, keys: int, kind: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    own, other = torch.arange(rows) % 7, torch.arange(keys) % 11
    if kind is None:
        return {}
    return {"exclude": (own, other)} if kind == "exclude" else {"keep": (own, other % 3)}


def nested(ends, *, columns=False, softplus=False, aligned=False, backend="cpu", **options):
    """All results of x (N, D), y (M, D), scale and, where it is given, bias, in one vector."""

    def call(x, y, scale, *bias):
        given = operands(
            x, y, scale=scale, bias=bias[0] if bias else None, ends=ends,
            backend=backend, aligned=aligned, **options,
        )  # fmt: skip
        out = softplus_sweep(given) if softplus else sweep(given, columns=columns)
        lse = out.value if softplus else out.lse
        more = [] if softplus or out.col_lse is None else [out.col_lse]
        more += [] if out.partner is None else [out.partner]
        return torch.cat([lse, *more], 1).flatten()

    return call


def dense(ends, *, columns=False, softplus=False, aligned=False, normalize=False, **options):
    def call(x, y, scale, *bias):
        parts = []
        for end in ends:
            short, keys = x[:, :end], y[:, :end]
            given = {"scale": scale, "bias": bias[0] if bias else None, "normalize": normalize}
            if softplus:
                out = [reference.softplus_sweep(short, keys, **given, **options).value]
            else:
                found = reference.sweep(short, keys, columns=columns, **given, **options)
                out = [found.lse, *([found.col_lse] if columns else [])]
            if aligned:
                z = scale * reference.row_dot(short, keys[: len(x)], normalize=normalize)
                out.append(z + bias[0][: len(x)] if bias else z)
            parts.append(torch.cat(out))
        return torch.cat(parts)

    return call


def finite(call):
    """-inf of what has no pair as a number, so that upstream gradients meet no inf * 0."""
    return lambda *given: (lambda out: out.masked_fill(out == -torch.inf, 0.0))(call(*given))


def two_sides(shape, kind, ids, normalize, backend):
    """What takes (x, y, scale, bias), ours and dense, and these in float64."""
    n, m, ends = shape
    options = {
        "columns": kind == "columns", "softplus": kind == "softplus", "normalize": normalize,
        "aligned": n <= m and ids != "keep", **ids_of(n, m, ids),
    }  # fmt: skip
    given = [randn(n, ends[-1]), randn(m, ends[-1], seed=1), torch.tensor(3.0, dtype=DOUBLE)]
    given.append(randn(m, seed=2))
    return (
        finite(nested(ends, backend=backend, **options)), finite(dense(ends, **options)), given
    )  # fmt: skip


@needs_cpu
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ids", [None, "exclude", "keep"])
@pytest.mark.parametrize("kind", ["rows", "columns", "softplus"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_two_sides(shape, kind, ids, normalize):
    ours, theirs, given = two_sides(shape, kind, ids, normalize, "cpu")
    assert_equal_in_double(ours, theirs, given)
    assert_within_budget(ours, theirs, [t.float() for t in given])


@needs_triton
@pytest.mark.parametrize(
    ("shape", "kind", "ids", "normalize"),
    [
        (SHAPES[0], "columns", None, True),
        (SHAPES[2], "columns", "exclude", True),
        (SHAPES[3], "rows", None, True),
        (SHAPES[5], "columns", "keep", False),
        (SHAPES[1], "softplus", "keep", False),
        (SHAPES[2], "softplus", "exclude", True),
    ],
    ids=str,
)
def test_on_triton(shape, kind, ids, normalize):
    ours, theirs, given = two_sides(shape, kind, ids, normalize, "triton")
    assert_equal_in_double(ours, theirs, given)


@pytest.fixture
def small_pieces(monkeypatch):
    """Of Triton: 256 x 256 products at a time, and states of so few parts as can be."""
    from contrastive_kernels.triton import engine, stored

    monkeypatch.setattr(stored, "LEAST_BYTES", 1 << 18)
    monkeypatch.setattr(engine, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(engine, "PARTIAL_BYTES", 1 << 12)


@needs_triton
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("columns", torch.bfloat16), ("softplus", torch.float32), ("rows", torch.float16)],
)
def test_pieces_on_triton(small_pieces, kind, dtype):
    ours, theirs, given = two_sides((270, 520, (16, 40)), kind, "exclude", True, "triton")
    x, y, scale, bias = given
    assert_within_budget(ours, theirs, [x.to(dtype), y.to(dtype), scale.float(), bias.float()])


@needs_triton
@pytest.mark.parametrize(("n", "together"), [(33, True), (140, False)])
def test_of_itself_on_triton(small_pieces, n, together):
    rows = torch.arange(n).repeat(2)
    given = [randn(n, 20), randn(n, 20, seed=1), torch.tensor(3.0, dtype=DOUBLE)]
    options = {"normalize": True, "together": together}
    ours = finite(of_itself((2, 20), (rows, rows), backend="triton", **options))
    theirs = finite(dense_of_itself((2, 20), (rows, rows), **options))
    assert_equal_in_double(ours, theirs, given)


def of_itself(ends, ids, *, normalize, together, backend="cpu"):
    """lse and, where they are not copied, partners of the rows of x and y, which are one matrix."""

    def call(x, y, scale):
        both = {"more": y} if together else {}
        features = x if together else torch.cat((x, y))
        given = operands(
            features, None, scale=scale, exclude=ids, ends=ends, backend=backend, aligned=together,
            normalize=normalize, **both,
        )  # fmt: skip
        out = sweep(given)
        return torch.cat((out.lse, out.partner) if together else (out.lse,), 1).flatten()

    return call


def dense_of_itself(ends, ids, *, normalize, together):
    def call(x, y, scale):
        parts = []
        for end in ends:
            z = torch.cat((x, y))[:, :end]
            parts.append(reference.sweep(z, z, scale=scale, exclude=ids, normalize=normalize).lse)
            dot = reference.row_dot(x[:, :end], y[:, :end], normalize=normalize)
            parts += [(scale * dot).repeat(2)] * together
        return torch.cat(parts)

    return call


@needs_cpu
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("scale", [3.0, -2.0, 500.0])
@pytest.mark.parametrize("n", [1, 33, 64, 150])
def test_of_itself(n, scale, together):
    ends, rows = (2, 5, 70), torch.arange(n).repeat(2)
    options = {"normalize": scale > 0}
    given = [randn(n, 70), randn(n, 70, seed=1), torch.tensor(scale, dtype=DOUBLE)]
    ours = finite(of_itself(ends, (rows, rows), together=together, **options))
    theirs = finite(dense_of_itself(ends, (rows, rows), together=together, **options))
    assert_equal_in_double(ours, theirs, given)
    assert_within_budget(ours, theirs, [t.float() for t in given], slack=64 + abs(scale))


@needs_cpu
@pytest.mark.parametrize("scale", [0.0, 1e2, 1e4])
def test_scales(scale):
    """0, and logits that need a shift of their own; negatives alone may be far below them."""
    ends, own = (1, 4, 32), torch.arange(80)
    y = -randn(80, 32) + 0.05 * randn(80, 32, seed=1)
    given = [randn(80, 32), y, torch.tensor(scale, dtype=DOUBLE)]
    options = {"columns": True, "normalize": True, "exclude": (own, own), "aligned": True}
    assert_equal_in_double(nested(ends, **options), dense(ends, **options), given)
    single = [t.float() for t in given]
    assert_within_budget(
        nested(ends, **options), dense(ends, **options), single, slack=64 + 4 * scale
    )


@needs_cpu
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_is_kept_changes_no_bit(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, y = (randn(601, 48, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    scale = torch.tensor(20.0, requires_grad=True)
    ends, found = (8, 16, 48), []
    calls = [nested(ends, columns=True, normalize=True, aligned=True)]
    calls.append(of_itself(ends, None, normalize=True, together=False))
    # nothing, some blocks, the longest prefixes of the one and of the other, all
    for limit in (0, 2**20, 7 * 2**19, 7 * 2**21, 2**26):
        with ck.workspace_limit(limit):
            found.append([])
            for call in calls:
                out = call(x, y, scale)
                found[-1] += [out, *torch.autograd.grad(out.sum(), (x, y, scale))]
                del out
    torch.set_num_threads(before)
    for some in found[1:]:
        assert all(map(torch.equal, some, found[0]))


@needs_cpu
def test_strides_and_half_types():
    wide = [randn(70, 2 * 40, seed=s, dtype=torch.float32) for s in (1, 2)]
    given = [w[:, ::2].requires_grad_() for w in wide] + [torch.tensor(9.0)]
    options = {"columns": True, "normalize": True}
    assert_within_budget(nested((7, 40), **options), dense((7, 40), **options), given)
    for dtype in (torch.float16, torch.bfloat16):
        half = [t.detach().to(dtype) for t in given[:2]] + [torch.tensor(9.0)]
        assert_within_budget(nested((7, 40), **options), dense((7, 40), **options), half)


# whole pairs of features, and ends between the two of one
HALF_SHAPES = [
    (1, 1, (2,)), (65, 1, (2, 7, 64)), (1, 67, (5, 6)), (67, 131, (3, 33, 66)),
    (300, 270, (63, 64, 65, 190)), (40, 300, (32, 256)),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["rows", "columns", "softplus", "itself"])
@pytest.mark.parametrize("shape", HALF_SHAPES, ids=str)
def test_products_of_bfloat16(shape, kind):
    """Only coefficients of gradients are rounded, where the processor has such products."""
    n, m, ends = shape
    m = n if kind == "itself" else m
    x = randn(n, ends[-1], dtype=torch.bfloat16)
    given = [x, randn(m, ends[-1], seed=1, dtype=torch.bfloat16), torch.tensor(3.0)]
    if kind == "itself":
        ids, options = torch.arange(n).repeat(2), {"normalize": True, "together": True}
        calls = [make(ends, (ids, ids), **options) for make in (of_itself, dense_of_itself)]
    else:
        given.append(randn(m, seed=2, dtype=torch.float32))
        options = {"normalize": True, "columns": kind == "columns", "softplus": kind == "softplus"}
        calls = [make(ends, aligned=n <= m, **options) for make in (nested, dense)]
    got = value_and_gradients(finite(calls[0]), given)
    exact = value_and_gradients(finite(calls[1]), [t.double() for t in given])
    for a, right in zip(got, exact, strict=True):
        eps = 2**-7 if a.dtype == torch.bfloat16 else 2e-6
        size = right.abs().max() if a.dim() > 0 else exact[0].abs().sum().sqrt()
        assert ((a.double() - right).abs() <= eps * size + 1e-7).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_operators(backend):
    operator = getattr(torch.ops.contrastive_kernels, f"nested_stats_{backend}").default
    x, y = (randn(6, 5, seed=s).requires_grad_() for s in (1, 2))
    scale = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)
    none = 4 * (None,)
    for symmetric, softplus in ((False, False), (True, False), (False, True)):
        bias = None if symmetric else randn(6, seed=3).requires_grad_()
        columns = not (softplus or symmetric)
        together = symmetric and backend == "cpu"
        y_or_none = None if symmetric and not together else y
        args = (x, y_or_none, scale, bias, *none, [2, 5], softplus, True, columns, together, True)
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("ends", [[], [0, 5], [2, 2, 5], [3], [5, 3], [3, 6]])
def test_ends_that_do_not_fit(ends, backend):
    x, scale = randn(4, 5), torch.tensor(1.0, dtype=DOUBLE)
    with pytest.raises(ValueError, match="ends must ascend from above 0 to D = 5"):
        getattr(torch.ops.contrastive_kernels, f"nested_stats_{backend}")(
            x, x, scale, *5 * (None,), ends, False, True, False, False, False
        )
