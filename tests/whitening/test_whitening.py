"""Whitening against the dense reference: values, closed-form gradients, and what it must refuse."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import pytest
import torch
from oracles import (
    DEVICE,
    DOUBLE,
    assert_equal_in_double,
    assert_within_budget,
    randn,
)
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.backends import CPU_ERROR, unusable_reason
from contrastive_kernels.whitening import operators

METHODS = ["cholesky", "zca", "newton_schulz"]
SHAPES = [(7, 3), (2, 1), (4, 13, 5), (2, 3, 9, 8)]
# around the panels of the kernels, with n = D + 1, and shrunk with fewer samples than features
AWKWARD = [(2, 17, 16), (1, 37, 31), (3, 70, 33), (2, 129, 65), (1, 300, 131), (2, 10, 40)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_value_and_gradient_in_double(shape, eps, method):
    assert_equal_in_double(
        partial(ck.whiten, method=method, eps=eps),
        partial(reference.whiten, method=method, eps=eps),
        [randn(*shape)],
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_awkward_sizes_in_double(shape, method, path):
    singular = shape[1] <= shape[2]
    options = {"method": method, "eps": 0.1 if singular else 0.0}
    expected = options
    if method == "zca" and singular:  # equal eigenvalues, which the reference cannot differentiate
        expected = options | {"method": "newton_schulz", "iterations": 30}
    assert_equal_in_double(
        partial(ck.whiten, **options), partial(reference.whiten, **expected), [randn(*shape)]
    )


@pytest.mark.parametrize("iterations", [1, 2, 3, 6, 7, 40])
def test_newton_schulz_of_any_number_of_steps(iterations, path):
    """The first step and the last one leave products out; many of an ill-conditioned covariance
    blow up what rounding leaves of products that should be symmetric."""
    options = {"method": "newton_schulz", "iterations": iterations, "eps": 1e-4}
    assert_equal_in_double(
        partial(ck.whiten, **options), partial(reference.whiten, **options), [randn(3, 24, 23)]
    )


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("dim", [3, 24, 64, 128, 256])
def test_accuracy_in_single(dim, method, path):
    """Covariance within 1e-5 of I, gradients within 1e-5 of float64, at n = 2 D."""
    n = 2 * dim
    x = randn(2, n, dim, dtype=torch.float32) + 2.0
    upstream = randn(2, n, dim, seed=1, dtype=torch.float32)
    gradients = []
    for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
        whiten = reference.whiten if leaf.dtype == DOUBLE else ck.whiten
        z = whiten(leaf, method=method)
        gradients.append(torch.autograd.grad(z, leaf, upstream.to(leaf.dtype))[0])
        if leaf.dtype == torch.float32:
            covariance = z.detach().double().mT @ z.detach().double() / (n - 1)
    assert (covariance - torch.eye(dim, dtype=DOUBLE)).abs().max() <= 1e-5
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def test_a_large_group_alone_uses_all_threads():
    """More work than one thread should do: batched torch instead of the kernel."""
    x = randn(1, 3000, 40)
    assert operators._takes_cpu_kernel(x, "auto") == (torch.get_num_threads() == 1)
    assert_equal_in_double(ck.whiten, reference.whiten, [x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [16, 10], ids=["twice", "hardly"])
def test_error_budget(dtype, method, n):
    """n twice D, and hardly above D, where the covariance is nearly singular."""
    assert_within_budget(
        partial(ck.whiten, method=method), partial(reference.whiten, method=method),
        [randn(3, n, 8, dtype=dtype)],
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS[:2])
def test_covariance_is_the_identity(method):
    x = randn(5, 64, 32) @ randn(32, 32, seed=1) + 3.0
    z = ck.whiten(x, method=method)
    identity = torch.eye(32, dtype=DOUBLE).expand(5, 32, 32)
    torch.testing.assert_close(z.mT @ z / 63, identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(z.mean(1), torch.zeros(5, 32, dtype=DOUBLE), rtol=0, atol=1e-8)


def test_newton_schulz_converges_to_zca_and_stays_there():
    """The textbook form P <- P (3 I - P P S) / 2 diverges in float64 after about 20 steps."""
    x = randn(3, 16, 8)
    zca = ck.whiten(x, method="zca")
    errors = [
        (ck.whiten(x, method="newton_schulz", iterations=i) - zca).abs().max() for i in (1, 5, 30)
    ]
    assert errors[0] > errors[1] > 1e-3 > 1e-10 > errors[2]


def test_zca_gradient_at_repeated_eigenvalues(path):
    """Differentiating eigh divides by differences of eigenvalues; the closed form does not."""
    x = torch.eye(6, dtype=DOUBLE)[:, :4].repeat(2, 1).requires_grad_()
    upstream = randn(12, 4)
    (gradient,) = torch.autograd.grad(ck.whiten(x, method="zca"), x, upstream)
    step = 1e-6
    for row, column in ((0, 0), (3, 1), (5, 2)):
        moved = torch.zeros_like(x)
        moved[row, column] = step
        with torch.no_grad():
            rise = ck.whiten(x + moved, method="zca") - ck.whiten(x - moved, method="zca")
        expected = (rise * upstream).sum() / (2 * step)
        torch.testing.assert_close(gradient[row, column], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spectrum", ["equal", "in pairs", "steep"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_zca_of_a_given_spectrum(spectrum, dtype, path):
    """What an iteration for eigenvalues may stumble over: Z = X C^-1/2 is known."""
    dim, n = 24, 80
    values = {
        "equal": torch.ones(dim, dtype=DOUBLE),
        "in pairs": torch.arange(1, 1 + dim // 2, dtype=DOUBLE).repeat_interleave(2),
        "steep": torch.logspace(-4, 0, dim, dtype=DOUBLE),
    }[spectrum]
    white = torch.linalg.qr(randn(n, dim + 1) * torch.ones(dim + 1, dtype=DOUBLE))[0]
    white = white - white.mean(0)
    white = torch.linalg.qr(white[:, :dim])[0] * (n - 1) ** 0.5
    turn = torch.linalg.qr(randn(dim, dim, seed=1))[0]
    x = white @ turn * values.sqrt() @ turn.T
    z = ck.whiten(x.to(dtype), method="zca")
    torch.testing.assert_close(z.double(), white, rtol=0, atol=1e-3 if dtype != DOUBLE else 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    x = randn(2, 6, 3).requires_grad_()
    assert torch.autograd.gradcheck(partial(ck.whiten, method=method, eps=0.05), x)


def test_second_order_gradients():
    x = randn(5, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(partial(ck.whiten, backend="reference"), x)
    for method in METHODS:
        z = ck.whiten(x, method=method)
        (first,) = torch.autograd.grad(z.square().sum() + z.sum() ** 3, x, create_graph=True)
        with pytest.raises(NotImplementedError, match='need backend="reference"'):
            first.sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_groups_do_not_mix_and_strides_do_not_matter(method):
    """More groups than are decomposed at once."""
    x = randn(30, 11, 4)
    together = ck.whiten(x.transpose(0, 1), method=method)
    for group in range(11):
        alone = ck.whiten(x[:, group], method=method)
        torch.testing.assert_close(together[group], alone, rtol=1e-10, atol=1e-12)


def test_two_runs_give_equal_bits():
    x = randn(8, 40, 16, dtype=torch.float32)
    for method in METHODS:
        runs = []
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            z = ck.whiten(leaf, method=method)
            z.square().sum(-1).sin().sum().backward()
            runs.append((z, leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(CPU_ERROR is not None or DEVICE != "cpu", reason="no CPU kernels")
@pytest.mark.parametrize("method", METHODS)
def test_bits_do_not_depend_on_threads(method):
    """Nor on which groups a thread decomposes at once."""
    x = randn(7, 40, 16, dtype=torch.float32)
    threads, runs = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaf = x.clone().requires_grad_()
        z = ck.whiten(leaf, method=method, backend="cpu")
        z.square().sum(-1).sin().sum().backward()
        runs.append((z, leaf.grad))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_keeps_the_precision(method):
    x = randn(2, 12, 5, dtype=torch.float32)
    exact = ck.whiten(x, method=method)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z = ck.whiten(leaf, method=method)
        assert ck.whiten(x.bfloat16(), method=method).dtype == torch.float32
        z.sum().backward()
    assert torch.equal(z, exact)


@pytest.mark.parametrize("method", METHODS)
def test_compiles_without_breaks_for_any_size(method):
    compiled = torch.compile(
        partial(ck.whiten, method=method), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for shape in ((3, 8, 4), (5, 16, 6)):
        assert_equal_in_double(compiled, partial(ck.whiten, method=method), [randn(*shape)])


def defective(defect: str, dtype: torch.dtype) -> Tensor:
    """Three groups, one row more than features; the second has the defect."""
    x = randn(3, 9, 8, dtype=dtype)
    if defect == "equal columns":
        x[1, :, 2] = x[1, :, 0]
    elif defect == "equal rows":
        x[1, 8] = x[1, 3]
    elif defect == "constant feature":
        x[1, :, 5] = 1.7
    else:
        huge = 0.1 * torch.finfo(dtype).max  # finite, but its square is not
        x[1, 3, 7] = {"nan": torch.nan, "infinite": torch.inf, "huge": huge}[defect]
    return x


SINGULAR = ["equal columns", "equal rows", "constant feature"]
NOT_FINITE = ["nan", "infinite", "huge"]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("defect", SINGULAR + NOT_FINITE)
def test_a_group_that_fails_is_named(method, defect, dtype, path):
    x = defective(defect, dtype)
    if method == "newton_schulz" and defect in SINGULAR:
        assert torch.isfinite(ck.whiten(x, method=method)).all()  # it takes any
        return
    what = "positive definite: .*use eps > 0" if defect in SINGULAR else "finite: .* NaN, infinite"
    with pytest.raises(ValueError, match=f"group 1 of 3.* is not {what}"):
        ck.whiten(x, method=method)
        ck.check_whitening()  # a GPU is not waited for before
    if defect in SINGULAR:
        assert torch.isfinite(ck.whiten(x, method=method, eps=0.1)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("defect", SINGULAR + NOT_FINITE)
def test_a_group_that_fails_leaves_the_others_alone(method, defect, path):
    if method == "newton_schulz" and defect in SINGULAR:
        return
    x = defective(defect, torch.float32).requires_grad_()
    others = x.detach()[[0, 2]].requires_grad_()
    z, ok = ck.whiten(x, method=method, return_info=True)
    assert ok.tolist() == [True, False, True]
    assert z[1].isnan().all()
    upstream = randn(2, 9, 8, seed=1, dtype=torch.float32)
    (gradient,) = torch.autograd.grad(z[ok], x, upstream)
    alone = ck.whiten(others, method=method)
    (expected,) = torch.autograd.grad(alone, others, upstream)
    torch.testing.assert_close(z[ok], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient[[0, 2]], expected, rtol=1e-4, atol=1e-4)
    assert (gradient[1] == 0).all()


def test_duplicated_rows_are_always_found(path):
    """n = D + 1 with a row twice: the last pivot is rounding, of any size and sign."""
    for seed in range(3):
        x = randn(50, 33, 32, seed=seed, dtype=torch.float32)
        x[:, 32] = x[:, 0]
        _z, ok = ck.whiten(x, return_info=True)
        assert not ok.any()


def test_info_has_the_shape_of_the_groups():
    _z, ok = ck.whiten(randn(2, 3, 9, 8), return_info=True)
    assert ok.shape == (2, 3) and ok.dtype == torch.bool and ok.all()
    assert ck.whiten(randn(9, 8), return_info=True)[1].shape == ()
    with pytest.raises(ValueError, match='return_info needs another backend than "reference"'):
        ck.whiten(randn(9, 8), return_info=True, backend="reference")


@pytest.mark.skipif(DEVICE != "cpu", reason="what is compiled for a GPU does not check")
def test_compiled_for_a_cpu_it_raises_too():
    compiled = torch.compile(ck.whiten, fullgraph=True, backend="aot_eager")
    compiled(randn(3, 9, 8))
    with pytest.raises(RuntimeError, match="a group cannot be whitened: .*use eps > 0"):
        compiled(defective("nan", DOUBLE))


def test_constant_features_give_zero_with_newton_schulz(path):
    x = torch.ones(5, 3, requires_grad=True)
    z = ck.whiten(x, method="newton_schulz")
    (gradient,) = torch.autograd.grad(z, x, torch.randn(5, 3))
    assert torch.equal(z.detach(), torch.zeros(5, 3)) and gradient.count_nonzero() == 0


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((3,), {}, r"x must have shape \(\.\.\., n, D\), got \(3,\)"),
        ((0, 3), {}, "x must not be empty"),
        ((2, 0, 3), {}, "x must not be empty"),
        ((4, 4), {}, "n must be above D = 4"),
        ((4, 5), {"method": "zca"}, "n must be above D = 5"),
        ((1, 3), {"eps": 0.1}, "n must be above D = 3"),
        ((8, 4), {"method": "pca"}, "method must be one of cholesky, zca, newton_schulz"),
        ((8, 4), {"eps": 1.0}, r"eps must be a finite number in \[0, 1\), got 1.0"),
        ((8, 4), {"eps": float("nan")}, "eps must be a finite number"),
        ((8, 4), {"iterations": 0}, "iterations must be at least 1, got 0"),
        ((8, 4), {"backend": "fast"}, "backend must be"),
    ],
)
def test_bad_input(shape, options, message):
    with pytest.raises(ValueError, match=message):
        ck.whiten(torch.randn(shape), **options)


def test_bad_types():
    with pytest.raises(TypeError, match="x must be float32, float64, bfloat16 or float16"):
        ck.whiten(torch.ones(8, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        ck.whiten([[1.0]])


def pairwise(z: Tensor, normalize: bool) -> Tensor:
    if normalize:
        z = z / z.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    pairs = [(a - b).square().sum(-1) for a, b in combinations(z, 2)]
    return torch.stack(pairs).mean(0)


@pytest.mark.parametrize("shape", [(2, 1, 2), (2, 7, 5), (3, 11, 16), (5, 3, 129)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_view_distance(shape, normalize, path):
    function = partial(operators.view_distance, normalize=normalize)
    expected = partial(pairwise, normalize=normalize)
    assert_equal_in_double(function, expected, [randn(*shape)])
    strided = randn(*shape).transpose(1, 2).contiguous().transpose(1, 2)
    assert_equal_in_double(function, expected, [strided])
    assert_within_budget(function, expected, [randn(*shape, dtype=torch.float32)])


def test_view_distance_of_a_row_of_zeros(path):
    z = randn(2, 3, 4)
    z[0, 1] = 0.0
    z.requires_grad_()
    distance = operators.view_distance(z, True)
    (gradient,) = torch.autograd.grad(distance.sum(), z)
    torch.testing.assert_close(distance[1], torch.ones((), dtype=DOUBLE))
    assert gradient.isfinite().all()


def test_permuted_rows():
    permutations = torch.stack([torch.randperm(7) for _ in range(3)])
    assert_equal_in_double(
        lambda x: operators.permute_rows(x, permutations),
        lambda x: torch.cat([x[:, p] for p in permutations], 1),
        [randn(2, 7, 3)],
    )


TRANSFORMED = [(method, "auto") for method in METHODS]
if unusable_reason("cpu", DEVICE) is None:
    TRANSFORMED += [(method, "cpu") for method in METHODS]


@pytest.mark.parametrize(("method", "backend"), TRANSFORMED)
def test_transforms_of_torch_func(method, backend):
    x, weight, along = randn(3, 2, 9, 4), randn(2, 9, 4, seed=1), randn(2, 9, 4, seed=2)

    def total(x):
        return (ck.whiten(x, method=method, backend=backend) * weight).sum()

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(sum(map(total, leaf)), leaf)[0]
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    close(torch.func.grad(total)(x[0]), expected[0])
    close(torch.vmap(torch.func.grad(total))(x), expected)
    close(torch.func.grad(lambda x: torch.vmap(total)(x).sum())(x), expected)
    if backend == "auto":
        close(torch.func.jvp(total, (x[0],), (along,))[1], (expected[0] * along).sum())
    else:
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(total, (x[0],), (along,))


@pytest.mark.skipif(DEVICE != "cpu", reason="errors of a GPU come late")
def test_a_group_that_fails_is_named_within_vmap():
    x = randn(3, 2, 9, 4)
    x[1, 1, :, 0] = 1.0
    with pytest.raises(ValueError, match="group 3 of 6"):
        torch.vmap(ck.whiten)(x)
