"""Every loss in the transforms of torch.func, and in forward mode: right, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from loss_calls import FIRST, backends, by_rows, ours, with_backends
from oracles import BACKENDS, DOUBLE, interpreted, randn
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import contrastive_kernels as ck
from contrastive_kernels import ops, reference
from contrastive_kernels.losses.cases import tensors
from contrastive_kernels.losses.table import CASES
from contrastive_kernels.ops import pairs

CHUNKS = [name for name in CASES if name.endswith("chunks")]
AT_HAND = [name for name in CASES if name not in CHUNKS]
KERNELS = [b for b in BACKENDS if b != "reference"]
FIRST_NAMES = list(FIRST.values())
FEW = ["info_nce", "clip_loss", "siglip_loss", "sup_con"]  # have all operators of sweeps


# Every case on its fastest backend here; on all of them those that stand for a loss.
on_kernels = pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "auto") for name in AT_HAND]
    + [
        (name, backend)
        for name in FIRST_NAMES
        for backend in backends(name)
        if name in FEW or not interpreted(backend)
    ],
)


class Problem:
    """A case: its learned inputs, and the loss as a function of them."""

    def __init__(self, name: str, backend: str, seed: int = 0) -> None:
        self.given = list(tensors(CASES[name][1], dtype=DOUBLE, seed=seed).values())
        self.places = [i for i, t in enumerate(self.given) if t.requires_grad]
        self.loss = ours(name, backend=backend, reduction=by_rows(name))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(self.given[i].detach() for i in self.places)

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(range(len(self.places)))

    def directions(self, seed: int) -> tuple[Tensor, ...]:
        return tuple(randn(*t.shape, seed=seed + i) for i, t in enumerate(self.leaves))

    def rows(self, *leaves: Tensor) -> Tensor:
        given = list(self.given)
        for place, leaf in zip(self.places, leaves, strict=True):
            given[place] = leaf
        return self.loss(*given)

    def total(self, *leaves: Tensor) -> Tensor:
        """With a weight of its own for each row."""
        return weighted(self.rows(*leaves))

    def gradients(self) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in self.leaves]
        return torch.autograd.grad(self.total(*leaves), leaves)


def weighted(rows: Tensor) -> Tensor:
    return (rows * weights(rows)).sum()


def weights(rows: Tensor) -> Tensor:
    """Some of any shape; vmap draws no random numbers."""
    return torch.arange(1.0, 1.0 + rows.numel(), dtype=DOUBLE).cos().view(rows.shape)


def has_constants(name: str) -> bool:
    """Whether the loss takes a part of itself as constant: differences see another slope."""
    row, case = CASES[name]
    estimated = row.name == "nce" and "Z" not in case.options
    return estimated or not {"detach_weights", "hardness_mode"}.isdisjoint(case.options)


def inner(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    return sum((s * t).sum() for s, t in zip(a, b, strict=True))


def assert_near(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def in_dual_level(function: Callable[..., Tensor], at: tuple, along: tuple) -> Tensor:
    with forward_ad.dual_level():
        dual = (forward_ad.make_dual(t, d) for t, d in zip(at, along, strict=True))
        return forward_ad.unpack_dual(function(*dual)).tangent


@pytest.mark.parametrize("name", AT_HAND)
def test_forward_mode_in_blocks(name, monkeypatch):
    """Of rows, the last one shorter: no matrix has all pairs."""
    problem = Problem(name, "auto", seed=1)
    leaves, along = problem.leaves, problem.directions(seed=7)

    def ways() -> list:
        found = [jvp(problem.rows, leaves, along)]
        if name in FIRST_NAMES:
            found.append(jvp(grad(problem.total, problem.numbers), leaves, along))
        if CASES[name][0].takes("return_stats"):
            with forward_ad.dual_level():
                stats = ours(name, return_stats=True)(*(t.detach() for t in problem.given))[1]
            found.append([t for t in stats if t is not None])
        return found

    expected = ways()
    monkeypatch.setattr(pairs, "FORWARD_PAIRS", 25)
    torch.testing.assert_close(ways(), expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_large_logits_in_blocks(monkeypatch):
    """Equal rows in several blocks: float32 does not tell their joint lse from that of one."""
    x, y, along = (randn(n, 8, seed=n, dtype=torch.float32) for n in (3, 14, 15))
    x = x.repeat(5, 1)

    def stats(x):
        given = ops.operands(x, y.to(x.dtype), scale=1e6, normalize=True, backend="reference")
        out = ops.sweep(given, mean=True, columns=True)
        return out.lse, out.mean, out.col_lse, out.col_mean

    monkeypatch.setattr(pairs, "FORWARD_PAIRS", 40)
    found = jvp(stats, (x,), (along,))
    monkeypatch.undo()
    exact = jvp(stats, (x.double(),), (along.double(),))
    for part, right in zip(found, exact, strict=True):
        for a, e in zip(part, right, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=0, atol=2e-6 * e.abs().max().item())


def test_forward_mode_is_never_dense(monkeypatch):
    sizes = []
    sweep = reference.sweep

    def seen(x, y, **options):
        sizes.append(len(x))
        return sweep(x, y, **options)

    monkeypatch.setattr(reference, "sweep", seen)
    monkeypatch.setattr(pairs, "FORWARD_PAIRS", 40)
    x, y = randn(17, 3, seed=1), randn(17, 3, seed=2)
    jvp(lambda t: ck.info_nce(t, y), (x,), (y,))
    assert sizes == 8 * [2] + [1]
    sizes.clear()
    ck.info_nce(x, y, backend="reference")
    assert sizes == [17]


@pytest.mark.parametrize("name", AT_HAND)
def test_forward_mode(name):
    problem = Problem(name, "auto")
    leaves, along = problem.leaves, problem.directions(seed=7)
    expected = inner(problem.gradients(), along)
    value, tangent = jvp(problem.total, leaves, along)
    assert_near(value, problem.total(*leaves))
    assert_near(tangent, expected)
    assert_near(in_dual_level(problem.total, leaves, along), expected)
    if has_constants(name):
        return
    step = 1e-6
    up, down = (
        problem.total(*(t + s * d for t, d in zip(leaves, along, strict=True)))
        for s in (step, -step)
    )
    error = (tangent - (up - down) / (2 * step)).abs()
    assert error <= 1e-6 * (1 + up.abs() + tangent.abs()) + 1e-15 * up.abs() / step


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name in CASES
        for backend in backends(name)
        if (name in CHUNKS or backend in KERNELS) and (name in FEW or not interpreted(backend))
    ],
)
def test_kernels_and_chunks_have_no_forward_mode(name, backend):
    problem = Problem(name, backend)
    leaves, along = problem.leaves, problem.directions(seed=7)
    for how in (jvp, in_dual_level):
        with pytest.raises(NotImplementedError, match="forward"):
            how(problem.total, leaves, along)


@on_kernels
def test_gradients(name, backend):
    problem = Problem(name, backend)
    leaves, numbers, expected = problem.leaves, problem.numbers, problem.gradients()
    assert_near(grad(problem.total, numbers)(*leaves), expected)
    rows, pull = vjp(problem.rows, *leaves)
    upstream = weights(rows)
    assert_near(pull(upstream), expected)
    if name in FIRST_NAMES:
        found = jacrev(problem.rows, numbers)(*leaves)
        pulled = (torch.tensordot(upstream, j, upstream.dim()) for j in found)
        assert_near(tuple(pulled), expected)


@on_kernels
def test_batches_of_problems(name, backend):
    problems = [Problem(name, backend, seed) for seed in range(2)]
    shared = ["per_query" in argument for argument in CASES[name][1].inputs]
    dims = tuple(None if one else 0 for one in shared)
    given = [
        each[0] if one else torch.stack([t.detach() for t in each])
        for one, each in zip(shared, zip(*(p.given for p in problems), strict=True), strict=True)
    ]
    loss, places = problems[0].loss, tuple(problems[0].places)
    values = torch.stack([p.loss(*p.given).detach() for p in problems])
    gradients = tuple(map(torch.stack, zip(*(p.gradients() for p in problems), strict=True)))

    def total(*inputs: Tensor) -> Tensor:
        return weighted(loss(*inputs))

    assert_near(vmap(loss, dims)(*given), values)
    assert_near(vmap(grad(total, places), dims)(*given), gradients)
    of_all = grad(lambda *inputs: vmap(total, dims)(*inputs).sum(), places)
    assert_near(of_all(*given), gradients)
    recorded = [t.requires_grad_(i in places) for i, t in enumerate(given)]
    leaves = [recorded[i] for i in places]
    assert_near(torch.autograd.grad(vmap(total, dims)(*recorded).sum(), leaves), gradients)


def test_numbers_that_differ_between_problems():
    keys, numbers = randn(2, 3, 4, 5).view(2, 12, 5), torch.tensor([[5, 7], [6, 6]])
    with pytest.raises(NotImplementedError, match="negatives_per_query must be the same for all"):
        vmap(lambda x, k, n: ck.info_nce(x, x, negatives=k, negatives_per_query=n))(
            randn(2, 2, 5), keys, numbers
        )


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("how", [grad, jacrev, vmap])
def test_chunks_have_no_transforms(name, how):
    for backend in backends(name):
        problem = Problem(name, backend)
        leaves = problem.leaves if how is not vmap else [t[None] for t in problem.leaves]
        with pytest.raises(NotImplementedError, match="chunks cannot be differentiated by"):
            how(problem.total)(*leaves)


def second_order(problem: Problem, along: tuple[Tensor, ...]) -> dict[str, Callable]:
    """Ways to the Hessian times a direction."""
    leaves, numbers = problem.leaves, problem.numbers

    def slope(*at: Tensor) -> Tensor:
        return inner(grad(problem.total, numbers)(*at), along)

    def recorded() -> tuple[Tensor, ...]:
        tracked = [t.clone().requires_grad_() for t in leaves]
        return torch.autograd.grad(slope(*tracked), tracked)

    def backward_in_dual_level() -> tuple[Tensor, ...]:
        with forward_ad.dual_level():
            tracked = [t.clone().requires_grad_() for t in leaves]
            dual = [forward_ad.make_dual(t, d) for t, d in zip(tracked, along, strict=True)]
            found = torch.autograd.grad(problem.total(*dual), tracked)
            return tuple(forward_ad.unpack_dual(t).tangent for t in found)

    return {
        "forward over reverse": lambda: jvp(grad(problem.total, numbers), leaves, along)[1],
        "reverse over forward": lambda: grad(lambda *at: jvp(problem.total, at, along)[1], numbers)(
            *leaves
        ),
        "backward in a dual level": backward_in_dual_level,
        "reverse over reverse": lambda: grad(slope, numbers)(*leaves),
        "recorded reverse over reverse": recorded,
    }


@with_backends(FIRST_NAMES, interpreted=FEW)
def test_second_order(name, backend):
    problem = Problem(name, backend)
    along = problem.directions(seed=7)
    expected = second_order(Problem(name, "reference"), along)["recorded reverse over reverse"]()
    for how, found in second_order(problem, along).items():
        if backend in KERNELS:
            with pytest.raises(NotImplementedError, match=r"second-order|forward-mode"):
                found()
        else:
            torch.testing.assert_close(
                found(), expected, rtol=1e-8, atol=1e-8, msg=lambda text, how=how: f"{how}: {text}"
            )


@pytest.mark.parametrize("name", FIRST_NAMES)
def test_auto_has_forward_over_reverse(name):
    along = Problem(name, "auto").directions(seed=7)
    expected = second_order(Problem(name, "reference"), along)["recorded reverse over reverse"]()
    found = second_order(Problem(name, "auto"), along)
    for how in ("forward over reverse", "reverse over forward", "backward in a dual level"):
        torch.testing.assert_close(found[how](), expected, rtol=1e-8, atol=1e-8)


def test_hessian():
    x, key = randn(4, 3, seed=1), randn(4, 3, seed=2)
    expected = torch.autograd.functional.hessian(
        lambda x: ck.nt_xent(x, key, backend="reference"), x
    )
    assert_near(torch.func.hessian(lambda x: ck.nt_xent(x, key))(x), expected)
    assert_near(jacfwd(grad(lambda x: ck.nt_xent(x, key)))(x), expected)


@with_backends([*FIRST_NAMES, *CHUNKS], interpreted=FEW)
def test_the_upstream_gradient_has_a_tangent(name, backend):
    """The graph was recorded before, by the kernels."""
    problem = Problem(name, backend)
    leaves = [t.requires_grad_() for t in problem.leaves]
    rows = problem.rows(*leaves)
    upstream, along = randn(*rows.shape, seed=5), randn(*rows.shape, seed=6)
    expected = torch.autograd.grad(rows, leaves, along, retain_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(upstream, along)
        try:
            found = torch.autograd.grad(rows, leaves, dual)
        except NotImplementedError as error:
            assert "forward-mode" in str(error)
            assert backend != "reference" or name in CHUNKS
        else:
            assert backend not in KERNELS
            assert_near(tuple(forward_ad.unpack_dual(t).tangent for t in found), expected)


@pytest.mark.parametrize("name", ["nt_xent", "siglip_loss", "gist"])
def test_compiled(name):
    problem = Problem(name, "auto")
    compiled = torch.compile(
        grad(problem.total, problem.numbers), fullgraph=True, backend="aot_eager"
    )
    assert_near(compiled(*problem.leaves), problem.gradients())


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_row_statistics(backend):
    x, y, bias, scale = randn(5, 4), randn(6, 4, seed=1), randn(6, seed=2), randn(seed=3)
    row_ids, col_ids = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 0, 3, 7, 7, 2])

    def stats(x: Tensor, y: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        options = {"scale": scale, "bias": bias, "exclude": (row_ids, col_ids), "backend": backend}
        softmax = ck.row_stats(x, y, columns=True, **options)
        return weighted(torch.cat((*softmax, ck.row_softplus(x, y, **options))))

    leaves = x, y, bias, scale
    recorded = [t.clone().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(stats(*recorded), recorded)
    assert_near(grad(stats, (0, 1, 2, 3))(*leaves), expected)
    batch = [torch.stack((t, t.flip(0) if t.dim() else -t)) for t in leaves]
    found = vmap(grad(stats, (0, 1, 2, 3)))(*batch)
    assert_near(tuple(t[0] for t in found), expected)
    along = tuple(randn(*t.shape, seed=9) for t in leaves)
    if backend in KERNELS:
        with pytest.raises(NotImplementedError, match="forward-mode"):
            jvp(stats, leaves, along)
    else:
        assert_near(jvp(stats, leaves, along)[1], inner(expected, along))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_ids_of_a_batch(backend):
    """Each problem has its own."""
    x, labels = randn(3, 6, 4), torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1], [3] * 6])

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return ck.sup_con(x, labels, backend=backend)

    assert_near(
        vmap(loss)(x, labels), torch.stack([loss(*each) for each in zip(x, labels, strict=True)])
    )


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["info_nce", "siglip_loss"])
def test_keys_of_a_batch_are_not_taken_as_frozen(name, backend):
    """vmap does not show that they need a gradient."""
    query, keys = randn(5, 4).requires_grad_(), randn(3, 5, 4, seed=1).requires_grad_()

    def loss(keys: Tensor) -> Tensor:
        if name == "siglip_loss":
            return ck.siglip_loss(query, keys, 3.0, -2.0, backend=backend)
        return ck.info_nce(query, query, negatives=keys, backend=backend)

    leaves = query, keys
    expected = torch.autograd.grad(torch.stack([loss(each) for each in keys]).sum(), leaves)
    assert_near(torch.autograd.grad(vmap(loss)(keys).sum(), leaves), expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_operators_refuse_tangents(backend):
    x, scale = randn(4, 3), torch.ones((), dtype=DOUBLE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        row_stats = getattr(torch.ops.contrastive_kernels, f"row_stats_{backend}")
        with pytest.raises(NotImplementedError, match="forward-mode"):
            row_stats(dual, x, scale, *5 * (None,), None, True, *5 * (False,))
        row_stats(x, x, scale, *5 * (None,), None, True, *5 * (False,))  # there is none


def test_stores_keep_no_tangent():
    queue, bank = ck.FeatureQueue(4, 3), ck.MemoryBank(4, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn(2, 3), torch.randn(2, 3))
        queue.enqueue(dual)
        bank.update(torch.tensor([0, 2]), dual)
        for kept in (queue.negatives, bank.features):
            assert forward_ad.unpack_dual(kept).tangent is None
