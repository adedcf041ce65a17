"""clip_distill against its definition, with the matrices in full."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from oracles import assert_equal_in_double, assert_within_budget, randn, value_and_gradients
from torch import Tensor

from contrastive_kernels.losses.clip_distill import clip_distill
from contrastive_kernels.reference import clip_distill as definition

NAN = float("nan")


def pairs(n: int, dim: int, seed: int = 0) -> list[Tensor]:
    images = randn(n, dim, seed=seed)
    return [images, images + 0.5 * randn(n, dim, seed=seed + 1)]


def student_and_teacher(n: int, dim: int, teacher_dim: int, scale: float = 5.0) -> list[Tensor]:
    scales = torch.tensor([scale, 2 * scale], dtype=torch.float64)
    return [*pairs(n, dim), scales[0], *pairs(n, teacher_dim, seed=5), scales[1]]


SHAPES = [(2, 1, 1), (2, 3, 5), (7, 5, 5), (13, 11, 2), (37, 16, 31), (131, 3, 64)]
parametrize = pytest.mark.parametrize("shape", SHAPES, ids=str)


@parametrize
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_in_double(shape, normalize, reduction, backend):
    """The gradients too, of both models and both scales."""
    options = {"normalize": normalize, "reduction": reduction}
    assert_equal_in_double(
        lambda *inputs: clip_distill(*inputs, **options, backend=backend),
        lambda *inputs: definition(*inputs, **options),
        student_and_teacher(*shape),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_blocks(reduction):
    assert_equal_in_double(
        lambda *inputs: clip_distill(*inputs, reduction=reduction),
        lambda *inputs: definition(*inputs, reduction=reduction),
        student_and_teacher(1031, 4, 3),  # blocks of 1017 rows
    )


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("learned", [(0,), (1,), (3,), (4,), (0, 2), ()], ids=str)
def test_gradients_that_nobody_needs(reduction, learned):
    """Those of the others are the same."""

    def gradients(loss):
        inputs = student_and_teacher(7, 5, 3)
        needed = [inputs[i].requires_grad_() for i in learned]
        value = loss(*inputs, reduction=reduction)
        assert value.requires_grad == bool(learned)
        return torch.autograd.grad(value.sum(), needed) if learned else ()

    torch.testing.assert_close(gradients(clip_distill), gradients(definition))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saves_nothing_of_the_size_of_a_matrix(reduction):
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    inputs = [t.requires_grad_() for t in student_and_teacher(1031, 4, 3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        clip_distill(*inputs, reduction=reduction)
    assert sizes and max(sizes) <= 1031 * 4


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)  # a unit vector of one entry is constant
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error(shape, scale, dtype):
    """No more than that of the definition; of the teacher, only its targets."""
    *student, image, text, teacher_scale = student_and_teacher(*shape, scale=scale)

    def with_teacher(loss):
        return lambda *inputs: loss(
            *inputs, *(t.to(dtype).to(inputs[0].dtype) for t in (image, text, teacher_scale))
        )

    assert_within_budget(
        with_teacher(clip_distill), with_teacher(definition), [t.to(dtype) for t in student]
    )
    value = clip_distill(*(t.to(dtype) for t in student_and_teacher(*shape)))
    assert value.dtype == torch.float32


def test_a_student_that_has_learned_its_teacher():
    """The gradient vanishes: what is left of it is a rounding of p - q, not of p and q."""
    image, text = pairs(64, 16)
    inputs = [t.float() for t in (image, text, torch.tensor(50.0))]
    teacher = [t.clone() for t in inputs]
    gradients = value_and_gradients(lambda *t: clip_distill(*t, *teacher), inputs)[1:]
    own = value_and_gradients(lambda *t: definition(*t, *teacher), inputs)[1:]
    for gradient, dense in zip(gradients, own, strict=True):
        assert gradient.abs().max() <= 2 * dense.abs().max() + 1e-7


def test_numbers_for_scales():
    image, text, _, teacher_image, teacher_text, _ = student_and_teacher(7, 5, 3)
    inputs = image, text, 3.0, teacher_image, teacher_text, 4.0
    torch.testing.assert_close(clip_distill(*inputs), definition(*inputs))
    one = torch.full((1,), 3.0, dtype=torch.float64, requires_grad=True)
    value = clip_distill(image, text, one, *inputs[3:])
    assert value.shape == () and torch.autograd.grad(value, one)[0].shape == (1,)


def test_models_of_two_types():
    """A teacher in half precision beside a float64 student, and the reverse."""
    inputs = student_and_teacher(7, 5, 3)
    student, teacher = inputs[:3], [t.bfloat16() for t in inputs[3:]]
    value = clip_distill(*student, *teacher)
    assert value.dtype == torch.float64
    torch.testing.assert_close(
        value, definition(*student, *(t.double() for t in teacher)), rtol=1e-5, atol=0.0
    )
    assert clip_distill(*(t.float() for t in student), *inputs[3:]).dtype == torch.float32


def test_autocast_changes_nothing():
    inputs = [t.float() for t in student_and_teacher(37, 16, 5)]
    wanted = value_and_gradients(clip_distill, inputs)

    def autocast(*inputs):
        with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
            return clip_distill(*inputs)

    got = value_and_gradients(autocast, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_blocks_need_no_kernels(monkeypatch):
    # the names in the package are functions
    backends = import_module("contrastive_kernels.backends")
    monkeypatch.setattr(backends, "unusable_reason", lambda *where: "it is not built")
    own_file = import_module("contrastive_kernels.losses.clip_distill")
    monkeypatch.setattr(own_file, "_dense", None)
    inputs = student_and_teacher(7, 5, 3)
    torch.testing.assert_close(clip_distill(*inputs), definition(*inputs))


def test_equal_bits_and_untouched_inputs():
    inputs = [t.float() for t in student_and_teacher(37, 16, 5)]
    copies = [t.clone() for t in inputs]
    runs = [value_and_gradients(clip_distill, inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_features_of_zero():
    inputs = student_and_teacher(5, 3, 3)
    for t in (inputs[0], inputs[4]):
        t[2] = 0.0
    assert all(t.isfinite().all() for t in value_and_gradients(clip_distill, inputs))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_order_needs_the_reference(reduction):
    inputs = [t.requires_grad_() for t in student_and_teacher(3, 2, 2, scale=1.0)]
    found = [
        torch.autograd.grad(
            clip_distill(*inputs, reduction=reduction, backend=backend).sum(), inputs[0],
            create_graph=True,
        )[0]
        for backend in ("auto", "reference")
    ]  # fmt: skip
    torch.testing.assert_close(*found)
    found[1].sum().backward()
    with pytest.raises(NotImplementedError, match='need backend="reference"'):
        (found[0].sum() + inputs[0].sum()).backward()


def x(*shape: int, **options) -> Tensor:
    return torch.ones(shape, **options)


BAD = [
    ({0: [[1.0]]}, TypeError, "^image_features must be a tensor, got list"),
    ({0: x(4)}, ValueError, r"^image_features must have shape \(N, D\), got \(4,\)"),
    ({1: x(5, 3)}, ValueError, "^image_features and text_features .*rows, got 4 and 5"),
    ({1: x(4, 2)}, ValueError, "^image_features and text_features .*features D, got 3 and 2"),
    ({2: NAN}, ValueError, "^logit_scale must be a finite number, got nan"),
    ({2: x(2)}, ValueError, r"^logit_scale must be .*one element, got shape \(2,\)"),
    ({3: x(4, 2).long()}, TypeError, "^teacher_image_features must be float32.*got int64"),
    (
        {4: x(4, 3)}, ValueError,
        "^teacher_image_features and teacher_text_features .*features D, got 2 and 3",
    ),
    (
        {3: x(6, 2), 4: x(6, 2)}, ValueError,
        "^teacher_image_features must have the 4 rows of image_features, got 6",
    ),
    (
        {3: x(4, 2, device="meta"), 4: x(4, 2, device="meta")}, ValueError,
        "^teacher_image_features must be on (cpu|cuda:0), got meta",
    ),
    ({5: NAN}, ValueError, "^teacher_logit_scale must be a finite number, got nan"),
    (
        {0: x(1, 3), 1: x(1, 3), 3: x(1, 2), 4: x(1, 2)}, ValueError,
        "^image_features must have at least 2 rows: a batch of one has no negatives",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input(changes, error, message):
    inputs = dict(enumerate((x(4, 3), x(4, 3), 1.0, x(4, 2), x(4, 2), 1.0))) | changes
    with pytest.raises(error, match=message):
        clip_distill(*inputs.values())


def test_bad_options():
    inputs = x(4, 3), x(4, 3), 1.0, x(4, 2), x(4, 2), 1.0
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or "none", got'):
        clip_distill(*inputs, reduction="average")
    with pytest.raises(ValueError, match="backend must be .* got 'fast'"):
        clip_distill(*inputs, backend="fast")
    for backend in ("cpu", "triton", "cuda"):
        with pytest.raises(RuntimeError, match=f'backend="{backend}" cannot run .* no kernels for'):
            clip_distill(*inputs, backend=backend)
