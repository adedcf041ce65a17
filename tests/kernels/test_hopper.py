"""The engine for Hopper without a GPU: its arithmetic and its schedule, from its own source."""

from __future__ import annotations

import gluon_emulation as emulation
import oracles
import pytest
import torch
from gluon_emulation import Descriptor, Pointer
from schedules import Schedule, Wrong
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not oracles.interpreted("triton") or "triton" not in oracles.BACKENDS,
    reason="kernels are not interpreted here",
)
KERNELS = emulation.emulated()
# A unit of the last place of what weights are rounded to.
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def pointers(record):
    """A record of tensors, with the addresses of their elements."""
    return record._replace(
        **{
            name: Pointer(t.reshape(-1))
            for name, t in record._asdict().items()
            if isinstance(t, Tensor) and name != "features"
        }
    )


def emulate(kernel, grid, *arguments, tile=None, **constants):
    """A launch of the Gluon kernel, on its own source."""
    converted = []
    for one in arguments:
        if isinstance(one, Tensor):
            assert one.is_contiguous()
            converted.append(Pointer(one.reshape(-1)))
        elif hasattr(one, "block_shape"):
            converted.append(Descriptor(one.base, one.block_shape))
        else:
            converted.append(pointers(one) if hasattr(one, "_asdict") else one)
    for name in ("PUSH", "COEFFICIENT"):
        if name in constants:
            constants[name] = getattr(KERNELS["folds"], constants[name].fn.__name__)
    gluon = getattr(KERNELS["hopper_sweep"], kernel.fn.__name__)
    emulation.launch(gluon, grid, len(arguments), *converted, **constants)


@pytest.fixture
def hopper(monkeypatch):
    """The host code sees a Hopper; returns the names of the sweeps that its engine took."""
    from contrastive_kernels.triton import configs, engine, hopper_sweep

    taken: list[str] = []
    launch = engine.launch

    def either(kernel, grid, *arguments, **options):
        if kernel in (hopper_sweep.attend_kernel, hopper_sweep.gradient_sweep_kernel):
            taken.append(kernel.fn.__name__)
            emulate(kernel, grid, *arguments, **options)
        else:
            launch(kernel, grid, *arguments, **options)

    def empty(*shape, **options) -> Tensor:
        made = torch.empty(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(engine, "launch", either)
    monkeypatch.setattr(
        engine.Problem, "empty",
        lambda self, *shape, dtype=None: empty(shape, dtype=dtype or self.dtype),
    )  # fmt: skip
    monkeypatch.setattr(configs, "properties", lambda device: configs.Properties(90, 2))
    monkeypatch.setenv("CK_HOPPER", "1")
    return taken


def numbers(n: int, m: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * m + dim)
    x, y = (torch.randn(size, dim, generator=generator).to(dtype) for size in (n, m))
    return x, y, torch.randn(m, generator=generator)


def ids(n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n) % 7, torch.arange(m) % 5


def truth(x, y, scale, bias, exclude, keep, unit, softplus=False):
    """(statistic, its gradient by each own vector and by the scale) in float64, and how large the
    sums of a gradient's terms are without their signs."""
    x, y = x.double().requires_grad_(), y.double()
    scales = torch.full((len(x), 1), scale, dtype=torch.float64, requires_grad=True)
    a, b = (torch.nn.functional.normalize(t, dim=1) if unit else t for t in (x, y))
    z = scales * (a @ b.T) + (0.0 if bias is None else bias.double())
    for pair, drops in ((exclude, True), (keep, False)):
        if pair is not None:
            z = z.masked_fill((pair[0][:, None] == pair[1]) == drops, -torch.inf)
    result = torch.nn.functional.softplus(z).sum(1) if softplus else z.logsumexp(1)
    dx, dscale, dz = torch.autograd.grad(result.sum(), (x, scales, z))
    terms = scale * dz.nan_to_num() @ b.abs() / (x.norm(dim=1, keepdim=True) if unit else 1.0)
    slope = dscale[:, 0].nan_to_num()
    return result.detach(), dx.nan_to_num(), slope, float(terms.detach().max())


def check(actual, expected, dtype):
    """Weights are rounded to the features' type, then the gradient is, and what projects it."""
    *expected, terms = expected
    bounds = (2e-6, 3 * EPS[dtype] * terms, 2 * EPS[dtype])
    for number, (got, exact, bound) in enumerate(zip(actual, expected, bounds, strict=True)):
        finite = exact.isfinite()
        assert got.shape == exact.shape and torch.equal(finite, got.isfinite())
        if finite.any():
            largest = 1.0 if number == 1 else float(exact[finite].abs().max())
            error = float((got.double() - exact)[finite].abs().max())
            assert error <= bound * largest, (number, error / largest, bound)


OPTIONS = ("plain", "exclude", "keep", "bias", "exclude keep bias", "not unit", "exclude not unit")
SIZES = ((1, 67), (129, 1), (65, 257), (100, 300), (128, 128))
CASES = [
    (dtype, 64, option, SIZES[(number + shift) % len(SIZES)])
    for shift, dtype in enumerate(EPS)
    for number, option in enumerate(OPTIONS)
] + [
    (torch.bfloat16, 128, "exclude", (65, 257)),
    (torch.float16, 128, "not unit", (100, 300)),
    (torch.bfloat16, 256, "bias", (65, 67)),
    (torch.float16, 256, "keep", (129, 1)),
]


@pytest.mark.parametrize(("dtype", "dim", "option", "sizes"), CASES)
def test_statistics_and_gradients(hopper, dtype, dim, option, sizes):
    from contrastive_kernels import triton

    n, m = sizes
    x, y, bias = numbers(n, m, dim, dtype)
    bias = bias if "bias" in option else None
    exclude = ids(n, m) if "exclude" in option else None
    keep = (ids(n, m)[0] % 3, ids(n, m)[1] % 3) if "keep" in option else None
    unit = "not unit" not in option
    scale = 10.0 if unit else 0.3
    out = triton.row_stats(
        x, y, torch.tensor(scale), bias, *(exclude or (None, None)), *(keep or (None, None)), None,
        mean=False, normalize=unit, columns=False, attend=True, together=False, aligned=False,
    )  # fmt: skip
    expected = truth(x, y, scale, bias, exclude, keep, unit)
    check((out[0], out[7], out[8]), expected, dtype)
    assert bool(hopper) == (option != "exclude keep bias")


# (which sides' statistics have gradients, what else there is)
UPSTREAM = [
    ("rows", "exclude", torch.bfloat16, 64),
    ("rows", "bias", torch.float16, 64),
    ("rows", "not unit", torch.float16, 128),
    ("columns", "keep", torch.bfloat16, 64),
    ("rows columns", "exclude", torch.float16, 64),
    ("rows columns", "bias", torch.bfloat16, 128),
    ("itself", "exclude", torch.bfloat16, 64),
    ("softplus", "exclude not unit", torch.float16, 64),
    ("rows columns", "not unit", torch.bfloat16, 256),
]


@pytest.mark.parametrize(("sides", "option", "dtype", "dim"), UPSTREAM)
def test_gradients_of_statistics(hopper, sides, option, dtype, dim):
    from contrastive_kernels import triton

    symmetric, softplus, unit = sides == "itself", sides == "softplus", "not unit" not in option
    n, m = (100, 100) if symmetric else (65, 300)
    x, y, bias = numbers(n, m, dim, dtype)
    x[3] = 0.0  # 1 / norm is 1e12
    y = x if symmetric else y
    bias = bias if "bias" in option else None
    exclude = ids(n, m) if "exclude" in option else None
    keep = (ids(n, m)[0] % 3, ids(n, m)[1] % 3) if "keep" in option else None
    if symmetric:
        exclude = (exclude[0], exclude[0])
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(size, generator=generator) for size in (n, m)]
    grads[0] *= "columns" != sides
    grads[1] *= "columns" in sides

    leaves = [t.double().requires_grad_() for t in (x, x if symmetric else y)]
    scale = torch.tensor(10.0 if unit else 0.3, dtype=torch.float64, requires_grad=True)
    wide = None if bias is None else bias.double().requires_grad_()
    a, b = (torch.nn.functional.normalize(t, dim=1) if unit else t for t in leaves)
    z = scale * (a @ b.T) + (0.0 if wide is None else wide)
    z.retain_grad()
    kept = z
    for pair, drops in ((exclude, True), (keep, False)):
        if pair is not None:
            kept = kept.masked_fill((pair[0][:, None] == pair[1]) == drops, -torch.inf)
    lses = [kept.logsumexp(1), kept.logsumexp(0)]
    values = [torch.nn.functional.softplus(kept).sum(1)] if softplus else lses
    sum((v * g.double()).sum() for v, g in zip(values, grads, strict=False)).backward()

    given = (x, None if symmetric else y, scale.detach().float(), bias)
    pairs = (*(exclude or (None, None)), *(keep or (None, None)))
    needs = [True, not symmetric, True, bias is not None]
    if softplus:
        out = triton.row_softplus_backward(*given, *pairs, None, grads[0], None, unit, needs)
    else:
        rounded = [t.detach().float() for t in lses]
        low = [(t.detach() - r).float() for t, r in zip(lses, rounded, strict=True)]
        none = torch.empty(0)
        passed = [
            g if has else None
            for g, has in zip(grads, (sides != "columns", "columns" in sides), strict=True)
        ]
        out = triton.row_stats_backward(
            *given, *pairs, rounded[0], none, rounded[1], none, none, none, *low, passed[0], None,
            passed[1], None, None, unit, needs, False,
        )  # fmt: skip
    dx, dy = (t.grad for t in leaves)
    wanted = [dx + dy] if symmetric else [dx, dy]
    of_pairs = z.grad.abs() + (z.grad.abs().T if symmetric else 0.0)
    others = [b] if symmetric else [b, a]
    for side, exact in enumerate(wanted):
        norm = leaves[side].norm(dim=1, keepdim=True).clamp(1e-12) if unit else 1.0
        terms = scale * (of_pairs if side == 0 else of_pairs.T) @ others[side].abs() / norm
        held = exact.abs() < torch.finfo(dtype).max  # by float16 not where the norm is 1e-12
        error = (out[side].double() - exact).abs()[held]
        # a gradient that is small is a subnormal number
        size = 3 * terms.detach().amax(1, keepdim=True) + torch.finfo(dtype).smallest_normal
        bound = (EPS[dtype] * size).expand_as(exact)[held]
        assert held.sum() >= exact.numel() - dim and bool((error <= bound).all()), side
    size = float((z.grad * z.detach()).abs().nan_to_num(0.0).sum() / scale.detach())
    assert abs(float(out[2]) - float(scale.grad)) <= EPS[dtype] * size
    if wide is not None:
        assert float((out[3] - wide.grad).abs().max()) <= 1e-5
    assert hopper == ["gradient_sweep_kernel"] * (1 if symmetric else 2)


def test_a_sum_of_softplus(hopper):
    from contrastive_kernels import triton

    x, y, _ = numbers(100, 300, 64, torch.bfloat16)
    out = triton.row_softplus(
        x, y, torch.tensor(4.0), None, *ids(100, 300), None, None, None, True,
        [True, False, True, False], False,
    )  # fmt: skip
    total, gradient, slope, terms = truth(x, y, 4.0, None, ids(100, 300), None, True, softplus=True)
    expected = (total.sum()[None], gradient, slope.sum()[None], terms)
    check((out[0], out[4], out[6][None]), expected, x.dtype)
    assert hopper


def test_large_logits_are_swept_again(hopper):
    """Where the fixed shift takes all terms: the other engine's running maximum. Not in 10 rows."""
    from contrastive_kernels import triton

    x, y, _ = numbers(70, 130, 64, torch.bfloat16)
    x[:10] = y[:10]
    out = triton.row_stats(
        x, y, torch.tensor(400.0), None, None, None, None, None, None, mean=False, normalize=True,
        columns=False, attend=True, together=False, aligned=False,
    )  # fmt: skip
    check((out[0], out[7], out[8]), truth(x, y, 400.0, None, None, None, True), x.dtype)
    assert hopper


@pytest.mark.parametrize("reason", ["off", "architecture", "dim", "strided", "float32"])
def test_what_it_does_not_take_is_the_other_engines(hopper, monkeypatch, reason):
    from contrastive_kernels import triton
    from contrastive_kernels.triton import configs, engine

    x, y, _ = numbers(20, 30, 48 if reason == "dim" else 64, torch.bfloat16)
    if reason == "off":
        monkeypatch.delenv("CK_HOPPER")
    if reason == "architecture":
        monkeypatch.setattr(configs, "properties", lambda device: configs.Properties(100, 2))
    if reason == "strided":
        y = y.T.contiguous().T
        monkeypatch.setattr(engine, "COPY_BYTES", 0)  # too many to be copied
    if reason == "float32":
        x, y = x.float(), y.float()
    out = triton.row_stats(
        x, y, torch.tensor(10.0), None, None, None, None, None, None, mean=False, normalize=True,
        columns=False, attend=True, together=False, aligned=False,
    )  # fmt: skip
    check((out[0], out[7], out[8]), truth(x, y, 10.0, None, None, None, True), torch.bfloat16)
    assert not hopper


def test_the_check_of_a_gpu(hopper, monkeypatch):
    from contrastive_kernels.triton import hopper as host
    from contrastive_kernels.triton import hopper_check

    given = (torch.device("cpu"), (65, 67), (64,))
    assert hopper_check.fault(*given) is None
    assert hopper.count("attend_kernel") == 2 and hopper.count("gradient_sweep_kernel") == 6
    right = host.weighed_gradients
    monkeypatch.setattr(host, "weighed_gradients", lambda *a: right(*a).roll(1))
    assert "the error of dy of rows is" in hopper_check.fault(*given)
    monkeypatch.setattr(host, "TILES", {})
    assert "it does not take these sweeps" in hopper_check.fault(*given)


def recorded(kernels, stages: int, tiles: int, gradient: bool = False):
    """A program of so many tiles, and what it did."""
    n, m, dim, block = 128, 16 * tiles, 16, 16
    x, y, _ = numbers(n, m, dim, torch.bfloat16)
    side, sums = kernels["tiles"].Side, kernels["sweep"].Partial
    made = sums(Pointer(torch.zeros(6 * n)), Pointer(torch.zeros(n * dim)))
    names = ("inverse", "lse", "grad_lse") if gradient else ("inverse",)
    each = torch.ones(m)
    own, other = side(x, dim, 1, n), side(y, dim, 1, m, **dict.fromkeys(names, Pointer(each)))
    vectors = (Descriptor(x, [64, dim]), Descriptor(y, [block, dim]))
    given = (*vectors, *len(names) * [Descriptor(each, [block])], own, other, Pointer(each))
    last = (dim, block, stages)
    module, folds = kernels["hopper_sweep"], kernels["folds"]
    if gradient:
        fold = (None, made, tiles, folds.softmax_coefficient, False)
        return emulation.launch(module.gradient_sweep_kernel, (1, 1), 0, *given, *fold, *last)
    fold = (None, None, made, tiles, folds.softmax_push, -torch.inf, False, 80.0)
    return emulation.launch(module.attend_kernel, (1, 1), 0, *given, *fold, *last)


ORDERS = [(4, 1, False), (4, 5, False), (3, 4, False), (2, 2, False), (2, 5, False), (2, 3, True)]


@pytest.mark.parametrize(("stages", "tiles", "gradient"), ORDERS)
def test_every_order_of_the_parts_is_right(stages, tiles, gradient):
    from contrastive_kernels.triton import hopper

    assert {tile.stages for tile in hopper.TILES.values()} <= {2, 3, 4}
    assert Schedule(recorded(KERNELS, stages, tiles, gradient)).explore() > 50 * tiles


FAULTS = {
    "the next tile before it is there": (
        "mbarrier.wait(ready.index(following), ((n + 1) // STAGES) & 1)", "pass"),
    "a buffer that is still read": ("mbarrier.wait(empty.index(stage), ((n // STAGES) & 1) ^ 1)",
                                    "pass"),
    "free too early": (
        "warpgroup_mma_wait(0, (products, weighted, weights))\n        mbarrier.arrive",
        "mbarrier.arrive(empty.index(stage), count=1) or "
        "warpgroup_mma_wait(0, (products, weighted, weights))\n        (lambda *_, **__: 0)"),
    "never free": ("        mbarrier.arrive(empty.index(stage), count=1)\n", ""),
    "the wrong phase": ("((n + 1) // STAGES) & 1)", "(n // STAGES) & 1)"),
    "both wait for their turn": ("(n & 1) ^ (1 - GROUP)", "n & 1"),
    "numbers that no barrier counts": ("(lse_tiles is not None) + ", ""),
    "free for one of two": ("mbarrier.init(empty.index(stage), count=GROUPS)",
                            "mbarrier.init(empty.index(stage), count=1)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_schedule_is_found(fault):
    wrong = emulation.emulated({"hopper_sweep": FAULTS[fault]})
    with pytest.raises((Wrong, AssertionError)):
        for tiles in (3, 5):
            Schedule(recorded(wrong, 2, tiles, "numbers" in fault)).explore()
