"""open_clip's losses, fused, against open_clip's own."""

from __future__ import annotations

import pytest
import torch
from oracles import DOUBLE, randn

pytest.importorskip("open_clip")
from conformance import assert_conforms, clustered, run  # noqa: E402
from open_clip import loss as peer  # noqa: E402

from contrastive_kernels.integrations import open_clip as fused  # noqa: E402
from contrastive_kernels.integrations import patched  # noqa: E402

SHAPES = [(1, 8), (2, 1), (5, 3), (37, 16)]
TEMPERATURES = [1.0, 0.07, 0.01]
parametrize = pytest.mark.parametrize("shape", SHAPES, ids=str)
parametrize_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)
# scalars after the scale
BIAS = {"ClipLoss": (-1.0,) if fused.HAS_BIAS else (), "SigLipLoss": (-1.0,)}
with_bias = pytest.mark.skipif(not fused.HAS_BIAS, reason="ClipLoss has a logit_bias since 2.32")
may_run_unfused = pytest.mark.filterwarnings("ignore:.*runs unfused")


def features(n: int, dim: int, seed: int = 0) -> list[torch.Tensor]:
    """Image and text features of about unit length."""
    images = clustered(n, dim, seed=seed) / dim**0.5
    return [images, images + 0.3 / dim**0.5 * randn(n, dim, seed=seed + 1)]


def scalar(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, value, dtype=DOUBLE)


def swap(label: str):
    return next(swap for swap in fused.PEER.swaps if swap.label == label)


def many(shape: tuple[int, int]) -> bool:
    """Whether a comparison of errors of bfloat16 means something: of few entries it is chance."""
    return shape[0] > 30


@parametrize
@parametrize_temperature
@may_run_unfused
def test_clip(shape, temperature):
    inputs = [*features(*shape), scalar(1 / temperature)]
    assert_conforms(fused.ClipLoss(), peer.ClipLoss(), inputs, bfloat16=many(shape))


@parametrize
@parametrize_temperature
def test_siglip(shape, temperature):
    inputs = [*features(*shape), scalar(1 / temperature), scalar(-10.0)]
    assert_conforms(fused.SigLipLoss(), peer.SigLipLoss(), inputs, bfloat16=many(shape))


@parametrize
@parametrize_temperature
@may_run_unfused
def test_distill(shape, temperature):
    """A teacher of another dimension, sharper than its student, without gradient."""
    inputs = [*features(*shape), scalar(1 / temperature)]
    inputs += [*features(shape[0], shape[1] + 3, seed=5), scalar(2 / temperature)]

    def both(cls):
        loss = cls()
        return lambda *t: torch.stack(loss(*t[:3], *(teacher.detach() for teacher in t[3:])))

    assert_conforms(
        both(fused.DistillClipLoss), both(peer.DistillClipLoss), inputs, bfloat16=many(shape)
    )


def test_distill_learns_the_teacher_too():
    inputs = [*features(37, 16), scalar(10.0), *features(37, 7, seed=5), scalar(10.0)]

    def second(cls):
        loss = cls()
        return lambda *tensors: loss(*tensors)[1]

    assert_conforms(second(fused.DistillClipLoss), second(peer.DistillClipLoss), inputs)


@parametrize
@may_run_unfused
def test_coca(shape):
    n = shape[0]
    labels = torch.arange(n * 4).reshape(n, 4) % 7
    inputs = [*features(*shape), randn(n, 4, 7, seed=3), labels, scalar(14.3)]

    def both(cls):
        loss = cls(caption_loss_weight=2.0, clip_loss_weight=0.5)
        return lambda *inputs: torch.stack(loss(*inputs))

    assert_conforms(both(fused.CoCaLoss), both(peer.CoCaLoss), inputs, bfloat16=many(shape))


@pytest.mark.parametrize("scale", [14.3, scalar(14.3, 1), scalar(14.3, 1, 1), -3.0, 0.0], ids=str)
@pytest.mark.parametrize("bias", [None, -2.0, scalar(-2.0), scalar(-2.0, 1)], ids=str)
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_numbers_and_tensors_of_one_entry(name, scale, bias):
    """The bias cancels in CLIP's softmax, and has a gradient of 0."""
    scalars = (scale, bias) if BIAS[name] else (scale,)
    inputs = [*features(11, 5), *(t for t in scalars if isinstance(t, torch.Tensor))]

    def call(cls):
        loss = cls()

        def with_numbers(images, texts, *tensors):
            tensors = iter(tensors)
            picked = [next(tensors) if isinstance(t, torch.Tensor) else t for t in scalars]
            return loss(images, texts, *picked)

        return with_numbers

    # in half precision the peer's product of features and a scale of shape [1] has two types
    half = not isinstance(scale, torch.Tensor)
    assert_conforms(call(getattr(fused, name)), call(getattr(peer, name)), inputs, bfloat16=half)


@with_bias
def test_a_bias_keeps_its_gradient():
    bias = torch.zeros(1, requires_grad=True)
    fused.ClipLoss()(*(t.float() for t in features(5, 3)), 14.3, bias).backward()
    assert bias.grad.item() == 0.0


def test_output_dict():
    images, texts = features(7, 5)
    teacher = features(7, 6, seed=2)
    logits, labels = randn(7, 4, 9, seed=3), torch.ones(7, 4, dtype=torch.long)
    calls = [
        ("ClipLoss", {}, (images, texts, 14.3)),
        ("SigLipLoss", {}, (images, texts, 14.3, -10.0)),
        ("DistillClipLoss", {}, (images, texts, 14.3, *teacher, 20.0)),
        (
            "CoCaLoss",
            {"caption_loss_weight": 1.0, "clip_loss_weight": 2.0},
            (images, texts, logits, labels, 14.3),
        ),
    ]
    if not fused.HAS_BIAS:  # output_dict comes fourth
        ours, theirs = (module.ClipLoss()(images, texts, 14.3, True) for module in (fused, peer))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0.0)
        with pytest.raises(TypeError, match="logit_bias"):
            fused.ClipLoss()(images, texts, 14.3, logit_bias=-1.0)
    for name, options, inputs in calls:
        got, wanted = (
            getattr(module, name)(**options)(*inputs, output_dict=True) for module in (fused, peer)
        )
        assert got.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(got[key], wanted[key], rtol=1e-10, atol=0.0)


def test_called_by_keyword_as_the_train_loop_does():
    images, texts = features(7, 5)
    output = {"image_features": images, "text_features": texts, "logit_scale": scalar(14.3)}
    for name, more in (("ClipLoss", {}), ("SigLipLoss", {"logit_bias": scalar(-10.0)})):
        got, wanted = (getattr(module, name)()(**output, **more) for module in (fused, peer))
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0.0)


def test_cached_labels():
    losses = [module.ClipLoss(cache_labels=True) for module in (fused, peer)]
    for n in (5, 7):
        for loss in losses:
            loss(*features(n, 3), 14.3)
        ours, theirs = losses
        assert ours.prev_num_logits == theirs.prev_num_logits == n
        assert ours.labels.keys() == theirs.labels.keys()
        assert all(torch.equal(ours.labels[key], theirs.labels[key]) for key in theirs.labels)
    assert not fused.ClipLoss().labels


def converged(n: int = 64, dim: int = 32) -> list[torch.Tensor]:
    """Pairs that are told apart with a loss near 0."""
    images = torch.nn.functional.normalize(randn(n, dim), dim=1)
    return [t.bfloat16() for t in (images, images, scalar(30.0))]


def test_bfloat16_near_convergence():
    """The peer's logits, rounded to bfloat16, lose the loss and its gradient."""
    inputs = converged()
    exact = run(peer.ClipLoss(), inputs, DOUBLE)
    eager = run(peer.ClipLoss(), inputs, torch.bfloat16)
    ours = run(fused.ClipLoss(), inputs, torch.bfloat16)
    assert (eager[0] - exact[0]).abs() > 0.1 * exact[0]
    assert (ours[0] - exact[0]).abs() < 1e-4 * exact[0]
    for a, wanted in zip(ours[1:], exact[1:], strict=True):
        assert (a - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_half_features_with_a_float32_scale_of_one_entry(name):
    """The peer raises."""
    images, texts = (t.bfloat16() for t in features(7, 5))
    inputs = images, texts, torch.full((1,), 14.3), *(torch.zeros(1) for _ in BIAS[name])
    with pytest.raises(RuntimeError):
        getattr(peer, name)()(*inputs)
    wanted = getattr(peer, name)()(*(t.double() for t in inputs))
    value = getattr(fused, name)()(*inputs)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=0.0)


@may_run_unfused
def test_one_pair():
    images, texts = (t.requires_grad_() for t in features(1, 4))
    reason = "a batch of one pair has no negatives"
    before = swap("ClipLoss.forward").fallbacks[reason]
    value = fused.ClipLoss()(images, texts, 14.3)
    assert swap("ClipLoss.forward").fallbacks[reason] == before + 1
    assert value == 0.0 and not torch.autograd.grad(value, images)[0].any()


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_features_that_are_no_pairs(name):
    """The peer broadcasts one text to all images in SigLipLoss."""
    with pytest.raises(ValueError, match="must have the same number of rows, got 5 and 1"):
        getattr(fused, name)()(randn(5, 3), randn(1, 3), 14.3, *BIAS[name])


class OtherLogits(fused.ClipLoss):
    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
        logits = torch.zeros(len(image_features), len(text_features), dtype=image_features.dtype)
        return logits, logits


class OtherLabels(fused.SigLipLoss):
    def get_ground_truth(self, device, dtype, num_logits, negative_only=False):
        return torch.zeros(num_logits, num_logits, dtype=dtype)


class OtherDistance(fused.DistillClipLoss):
    def dist_loss(self, teacher_logits, student_logits):
        return (teacher_logits - student_logits).square().mean()


TEACHER = (*features(5, 4, seed=2), 20.0)


@pytest.mark.parametrize(
    ("loss", "label", "inputs", "reason"),
    [
        (OtherLogits(), "ClipLoss.forward", (14.3,), "get_logits is overridden"),
        (OtherLabels(), "SigLipLoss.forward", (14.3, 0.0), "get_ground_truth is overridden"),
        (OtherDistance(), "DistillClipLoss.forward", (14.3, *TEACHER), "dist_loss is overridden"),
        (
            fused.ClipLoss(), "ClipLoss.forward", (randn(5, 1),),
            "logit_scale has more than one entry",
        ),
        *[(
            fused.ClipLoss(), "ClipLoss.forward", (14.3, randn(5)),
            "logit_bias has more than one entry",
        )] * fused.HAS_BIAS,
        (
            fused.SigLipLoss(), "SigLipLoss.forward", (14.3, randn(5, 1)),
            "logit_bias has more than one entry",
        ),
        (
            fused.DistillClipLoss(), "DistillClipLoss.forward", (14.3, *TEACHER[:2], randn(5, 1)),
            "dist_logit_scale has more than one entry",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_falls_back(loss, label, inputs, reason):
    """The peer's own code runs, with what a subclass changed."""
    images, texts = features(5, 4)
    before = swap(label).fallbacks.get(reason, 0)
    value = loss(images, texts, *inputs)
    assert swap(label).fallbacks[reason] == before + 1
    own = getattr(peer, label.removesuffix(".forward")).forward
    torch.testing.assert_close(value, own(loss, images, texts, *inputs), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "DistillClipLoss"])
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_without_a_process_group_the_peers_code_and_its_error(name):
    inputs = BIAS.get(name, TEACHER)
    reason = "rank and world_size are not those of the default process group"
    before = swap(f"{name}.forward").fallbacks[reason]
    with pytest.raises(ValueError, match="Default process group has not been initialized"):
        getattr(fused, name)(rank=0, world_size=2)(*features(5, 4), 14.3, *inputs)
    assert swap(f"{name}.forward").fallbacks[reason] == before + 1


def test_exact_gradients_must_run_fused():
    """The peer's code cannot give them."""
    loss = fused.ClipLoss(rank=0, world_size=2, grad_scale="exact")
    with pytest.raises(RuntimeError, match='"exact" must run fused over processes, but rank and'):
        loss(*features(5, 4), 14.3)


def test_horovod_is_the_peers():
    loss = fused.ClipLoss(rank=0, world_size=2, use_horovod=True)
    with (
        pytest.warns(UserWarning, match="features are gathered by horovod"),
        pytest.raises(AssertionError, match="horovod"),
    ):
        loss(*features(5, 4), 14.3)


def test_grad_scale():
    options = {"caption_loss_weight": 1.0, "clip_loss_weight": 1.0}
    for name, more in (("ClipLoss", {}), ("SigLipLoss", {}), ("CoCaLoss", options)):
        cls = getattr(fused, name)
        assert cls(**more).grad_scale == "peer"
        assert cls(**more, grad_scale="exact").grad_scale == "exact"
        with pytest.raises(ValueError, match="grad_scale must be 'peer' or 'exact', got 'mean'"):
            cls(**more, grad_scale="mean")


def test_a_patch_sets_grad_scale():
    with patched("open_clip", grad_scale="exact"):
        with pytest.raises(RuntimeError, match="must run fused"):
            peer.ClipLoss(rank=0, world_size=2)(*features(5, 4), 14.3)
        assert fused.ClipLoss().grad_scale == "peer"  # the drop-in has its own
    assert not hasattr(peer.ClipLoss, "grad_scale") and not hasattr(peer.SigLipLoss, "grad_scale")


def test_patch_serves_coca():
    loss = peer.CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=2.0)
    images, texts = features(7, 5)
    inputs = images, texts, randn(7, 4, 9), torch.ones(7, 4, dtype=torch.long), 14.3
    wanted = loss(*inputs)
    before = swap("ClipLoss.forward").fused_calls
    with patched("open_clip", "ClipLoss"):
        got = loss(*inputs)
        assert swap("ClipLoss.forward").fused_calls == before + 1
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0.0)
    assert peer.ClipLoss.forward is not fused.ClipLoss.forward


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_compiles_in_one_graph(name):
    loss = getattr(fused, name)()
    inputs = [*(t.float() for t in features(7, 5)), torch.tensor(14.3)]
    inputs += [torch.tensor(bias) for bias in BIAS[name]]
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
