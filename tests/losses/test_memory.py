"""No loss copies its features: what a call allocates beyond inputs and gradients grows by a few
numbers for each vector, and what is done in blocks for that gives the numbers of one block."""

from __future__ import annotations

import loss_calls
import pytest
import torch
from allocations import peak_of
from oracles import BACKENDS, DOUBLE, randn

from contrastive_kernels import ops, reference
from contrastive_kernels.losses import algebra, sup_con
from contrastive_kernels.losses.cases import call, letters, tensors
from contrastive_kernels.losses.table import CASES, LOSSES
from contrastive_kernels.ops import rowwise

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built here")

DRAWN = 64  # features, of which as many as are wanted are made
FEATURES = {"D": 16384, "G": 16384, "K": 1}
# Losses that hold more: docs/design.md says what.
MORE = ("w_mse", "intl", "late_interaction", "late_interaction_distill")
# (loss, vectors that it holds for each row, pairs of a block): the queries that have a target; what
# is gradient once it is multiplied by the one from above.
IN_BLOCKS = [
    ("gist", 0, 2**16), ("koleo", 0, 2**16), ("triplet", 0, 2**16), ("cpc", 3, 2**16),
    ("triplet semihard", 0, 2**16), ("clip_distill", 4, 2**9),
]  # fmt: skip
SEVERAL = (
    "info_nce both symmetric margin", "mnrl harder", "mnrl one document, harder", "mnrl defaults",
    "hcl hard", "cacr rbf", "cacr rbf detached", "cacr_views rbf",
)  # fmt: skip
OTHERS = (*MORE, *(name for name, *_ in IN_BLOCKS), "mnrl", "hcl", "cacr_views")
ONE_SWEEP = [row.name for row in LOSSES if row.name not in OTHERS]
LONG = 2**16  # features of 130 rows: more than there are sums of one side apart from gradients
ADDED = (
    "info_nce both symmetric margin", "mnrl harder", "mnrl masked documents", "hcl", "cacr rbf",
    "cacr_views two",
)  # fmt: skip
HALF = {
    "info_nce": torch.bfloat16, "clip_loss": torch.float16, "nt_xent": torch.bfloat16,
    "sup_con": torch.float16, "mnrl": torch.bfloat16,
}  # fmt: skip
KEYS = [
    name
    for name in ("info_nce shared", "info_nce frozen", "info_nce shared bias", "rince shared",
                 "eqco shared", "nce", "nce learned", "cacr negatives", "cacr on the plane")
    if "M" in letters(CASES[name][1])
]  # fmt: skip


def long(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Features of this length, those drawn again and again."""
    if not t.is_floating_point() or t.dim() < 2 or t.shape[-1] != DRAWN:
        return t
    repeated = t.detach().repeat(*(1 for _ in t.shape[1:]), dim // DRAWN)
    return repeated.requires_grad_(t.requires_grad)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def copies(
    name: str, letter: str, sizes: tuple[int, int], dtype: torch.dtype, dim: int = FEATURES["D"],
    reduction: str = "mean",
) -> float:  # fmt: skip
    """Of a vector, for each one more of the rows that a letter stands for."""
    row, case = CASES[name]
    backend = "cpu" if "cpu" in loss_calls.backends(name) else "auto"
    options = {} if case.coupled else {"reduction": reduction}

    def peak(size: int) -> int:
        drawn = tensors(case, dtype=dtype, **{**FEATURES, "D": DRAWN, "G": DRAWN, letter: size})
        given = {key: long(t, dim) for key, t in drawn.items()}
        leaves = [t for t in given.values() if t.requires_grad]

        def step():
            value = call(row.function, case, given, backend=backend, **options)
            return torch.autograd.grad(value.sum(), leaves)

        return peak_of(step)

    few, many = sizes
    return (peak(many) - peak(few)) / (many - few) / (torch.float32.itemsize * dim)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ONE_SWEEP)
def test_no_copy_of_the_batch(name):
    assert copies(name, "N", (130, 180), torch.float32) < 0.02


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "vectors", "pairs"), IN_BLOCKS)
def test_features_that_are_made_unit_or_gathered(name, vectors, pairs, monkeypatch):
    monkeypatch.setattr(algebra, "BLOCK_PAIRS", pairs)
    monkeypatch.setattr(rowwise, "BLOCK_ELEMENTS", 2**16)
    sizes = (32, 64)  # whole blocks
    assert copies(name, "N", sizes, torch.float32, 2**12) < vectors + 0.02


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["koleo", "triplet"])
def test_sums_of_half_gradients_are_those_of_blocks(name, monkeypatch):
    monkeypatch.setattr(algebra, "BLOCK_PAIRS", 2**16)
    assert copies(name, "N", (32, 64), torch.bfloat16, 2**12) < 0.02


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in ADDED), *HALF.items()]
)
def test_no_copy_of_a_batch_whose_gradients_are_added_or_rounded(name, dtype):
    assert copies(name, "N", (130, 150), dtype, LONG) < 0.02


@pytest.mark.parametrize("name", ["clip_loss", "hcl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_in_slabs_are_those_of_the_reference(name, dtype):
    given = loss_calls.inputs(name, dtype, N=130, D=LONG)
    wide = [t.detach().float().requires_grad_(t.requires_grad) for t in given]

    def made(backend, tensors):
        loss = loss_calls.ours(name, backend=backend)(*tensors)
        return torch.autograd.grad(loss, [t for t in tensors if t.requires_grad])

    for a, b in zip(made("cpu", given), made("reference", wide), strict=True):
        rounded = 0 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
        error = (a.float() - b).abs().max()
        assert error <= (2e-5 + rounded) * b.abs().max()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("dtype", "reduction"), [(torch.float32, "none"), (torch.bfloat16, "sum")], ids=str
)
@pytest.mark.parametrize("name", KEYS)
def test_no_copy_of_the_keys(name, dtype, reduction):
    # more than are widened once
    assert copies(name, "M", (300, 600), dtype, reduction=reduction) < 0.02


@pytest.mark.parametrize("name", [*loss_calls.FIRST.values(), "cacr on the plane", *SEVERAL])
def test_blocks_change_nothing(name, monkeypatch):
    if "cpu" not in loss_calls.backends(name):
        pytest.skip("not of this backend")
    given = loss_calls.inputs(name)
    leaves = [t for t in given if t.requires_grad]

    def made():
        loss = loss_calls.ours(name, backend="cpu")(*given)
        return torch.autograd.grad(loss, leaves)

    whole = made()
    monkeypatch.setattr(rowwise, "BLOCK_ELEMENTS", 11)
    monkeypatch.setattr(sup_con, "BLOCK_ELEMENTS", 15)
    for columns in (False, True):  # the way of backends without kernels of rows
        if columns and not name.startswith("sup_con"):
            continue
        if columns:
            monkeypatch.setattr(sup_con, "has_row_kernels", lambda backend: False)
        for a, b in zip(whole, made(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [3.0, -50.0, 400.0])  # 400: rows are done again
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (300, 129), (257, 1)])
def test_two_tensors_are_one_matrix(sizes, dtype, normalize, scale):
    size, dim = 0.2 if not normalize else 1.0, 38
    x, y = (size * randn(n, 2 * dim, seed=i) for i, n in enumerate(sizes))
    x, y = x[:, ::2].to(dtype), y[:, :dim].to(dtype)  # strided, and rows that lie apart
    x, y = x.requires_grad_(), y.requires_grad_()
    n = sum(sizes)
    ids = torch.arange(n) % max(2, n // 2)
    grad = randn(n, seed=7)

    def made(backend, *features):
        given = ops.operands(
            features[0], None, more=features[1], scale=scale, exclude=(ids, ids),
            normalize=normalize, backend=backend,
        )  # fmt: skip
        lse = ops.sweep(given).lse
        seen = lse > -torch.inf
        value = (lse[seen] * grad[seen].to(lse.dtype)).sum()
        return lse, *torch.autograd.grad(value, features)

    exact = made("reference", *(t.detach().double().requires_grad_() for t in (x, y)))
    whole = torch.cat((x, y)).detach().requires_grad_()
    given = ops.operands(
        whole, None, scale=scale, exclude=(ids, ids), normalize=normalize, backend="cpu"
    )
    plain = ops.sweep(given).lse
    found = made("cpu", x, y)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found[0], plain, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, exact, strict=True):
        finite = b[b.isfinite()]
        bound = tolerance * (1 + (finite.abs().max().item() if len(finite) else 0))
        torch.testing.assert_close(a.to(DOUBLE), b, rtol=0, atol=bound)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(5, 2100), (2100, 5)])
def test_gradients_of_half_features_in_slabs(sizes, dtype, learned, mean):
    x, y = (randn(n, 2048, seed=i).to(dtype) for i, n in enumerate(sizes))
    x.requires_grad_()
    y.requires_grad_(learned)
    scale = torch.tensor(20.0, requires_grad=True)
    grad = randn(sizes[0], seed=7).float()
    from contrastive_kernels import _cpu

    def made(x, y, scale, sweep):
        out = sweep(x, y, scale)
        value = (out.lse * grad).sum() + ((out.mean * grad).sum() if mean else 0)
        return torch.autograd.grad(value, [t for t in (x, y, scale) if t.requires_grad])

    found = made(x, y, scale, lambda x, y, scale: ops.sweep(
        ops.operands(x, y, scale=scale, normalize=True, backend="cpu"), mean=mean))  # fmt: skip
    exact = made(
        *(t.detach().float().requires_grad_(t.requires_grad) for t in (x, y, scale)),
        lambda x, y, scale: reference.sweep(x, y, scale=scale, normalize=True, mean=mean),
    )
    # where products are those of bfloat16, coefficients are rounded too
    rounded = 2**-8 if dtype == torch.bfloat16 and _cpu.bfloat16() is not None else 0
    for a, b in zip(found, exact, strict=True):
        bound = torch.finfo(dtype).eps * b.abs() + 1e-5 * (1 + b.abs().max())
        bound += rounded * (b.abs().amax(-1, keepdim=True) if b.dim() > 0 else b.abs())
        assert ((a.float() - b).abs() <= bound).all()
