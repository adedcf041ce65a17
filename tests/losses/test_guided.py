"""gist against its definition, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    BACKENDS,
    DOUBLE,
    assert_equal_in_double,
    assert_within_budget,
    randn,
    sample,
    value_and_gradients,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from contrastive_kernels import info_nce, reference
from contrastive_kernels.losses import algebra, guided_lse
from contrastive_kernels.losses.gist import gist
from contrastive_kernels.ops import rowwise

aten = torch.ops.aten
OPTIONS = [
    {
        "contrast_anchors": anchors, "contrast_positives": positives, "margin": margin,
        "margin_strategy": strategy,
    }
    for anchors, positives, margin, strategy in product(
        (True, False), (True, False), (0.0, 0.2, -0.4), ("absolute", "relative")
    )
]  # fmt: skip


def features(
    n: int, m: int, dim: int, guide: int, dtype: torch.dtype = DOUBLE
) -> tuple[list[Tensor], list[Tensor]]:
    """Anchors, positives and m negatives; and what a guide makes of them."""

    def texts(dim: int, seed: int) -> list[Tensor]:
        anchor = randn(n, dim, seed=seed) + randn(dim, seed=seed + 1)
        positive = anchor + randn(n, dim, seed=seed + 2)
        return [t.to(dtype) for t in (anchor, positive, randn(m, dim, seed=seed + 3))]

    return texts(dim, 1), texts(guide, 11)


def with_guides(loss: Callable[..., Tensor], guides: list[Tensor], **options):
    """The loss as a function of (anchor, positive, negatives)."""

    def guided_loss(anchor: Tensor, positive: Tensor, negatives: Tensor, **more) -> Tensor:
        return loss(
            anchor, positive, *guides[:2], negatives=negatives, negatives_guide=guides[2],
            **options, **more,
        )  # fmt: skip

    return guided_loss


fused, definition = partial(with_guides, gist), partial(with_guides, reference.gist)


def dropped(guides: list[Tensor]) -> float:
    """Share of the pairs of anchors and positives that the guide drops."""
    a, p, _ = (F.normalize(t, dim=1) for t in guides)
    similarity = a @ p.T
    return (similarity > similarity.diagonal()[:, None]).double().mean().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 4, 3), (2, 3, 1, 2), (7, 5, 3, 6), (13, 2, 7, 4)], ids=str
)
@pytest.mark.parametrize("block", [2**20, 11])
def test_definition(shape, backend, block, monkeypatch):
    monkeypatch.setattr(algebra, "BLOCK_PAIRS", block)  # 11: several blocks, the last one smaller
    inputs, guides = features(*shape)
    for options in sample(backend, OPTIONS, sum(shape), every=12):
        options = options | {"reduction": "none", "temperature": 0.07}
        assert_equal_in_double(
            fused(guides, **options, backend=backend),
            definition(guides, **options), inputs,
        )  # fmt: skip


def test_the_guide_of_these_tests_drops_pairs():
    assert 0.05 < dropped(features(13, 2, 7, 4)[1]) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
def test_error_budget(dtype, temperature):
    inputs, guides = features(23, 9, 16, 8, dtype)
    options = {"temperature": temperature, "reduction": "none"}
    assert_within_budget(fused(guides, **options), definition(guides, **options), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [2**20, 11])
def test_the_model_as_its_own_guide(backend, block, monkeypatch):
    monkeypatch.setattr(algebra, "BLOCK_PAIRS", block)
    inputs, _ = features(13, 7, 4, 4)
    scale = torch.tensor(8.0, dtype=DOUBLE)
    for options in sample(backend, OPTIONS, block, every=12):
        assert_equal_in_double(
            lambda a, p, n, s, o=options: gist(
                a, p, negatives=n, scale=s, reduction="none", backend=backend, **o
            ),
            lambda a, p, n, s, o=options: reference.gist(
                a, p, negatives=n, scale=s, reduction="none", **o
            ),
            [*inputs, scale],
        )


def test_the_mask_of_qwen3():
    """-log exp(s+ / t) / Z of Qwen3-Embedding, with m_ij = 0 where s_ij > s_i+ + 0.1."""
    anchor, positive, negatives = (randn(9, 4, seed=i) for i in range(3))
    q, d, k = (F.normalize(t, dim=1) for t in (anchor, positive, negatives))
    same = torch.eye(9, dtype=torch.bool)
    none = torch.zeros_like(same)
    pos = (q * d).sum(1)
    total, masked = (pos / 0.05).exp(), 0
    for z, own in ((q @ d.T, same), (q @ q.T, same), (d @ d.T, same), (q @ k.T, none)):
        keep = (z <= pos[:, None] + 0.1) & ~own
        masked += int((~keep & ~own).sum())
        total = total + ((z / 0.05).exp() * keep).sum(1)
    assert masked > 0
    found = gist(anchor, positive, negatives=negatives, margin=-0.1, temperature=0.05)
    torch.testing.assert_close(found, (total.log() - pos / 0.05).mean())


def test_a_learned_scale_and_reductions():
    inputs, guides = features(7, 4, 5, 6)
    for reduction in ("mean", "sum", "none"):
        assert_equal_in_double(
            lambda a, p, n, s, r=reduction: fused(guides)(a, p, n, scale=s, reduction=r),
            lambda a, p, n, s, r=reduction: definition(guides)(a, p, n, scale=s, reduction=r),
            [*inputs, torch.tensor(8.0, dtype=DOUBLE)],
        )


def test_without_normalization_and_negatives():
    (anchor, positive, _), (anchor_guide, positive_guide, _) = features(9, 1, 5, 5)
    unit = partial(F.normalize, dim=1)
    guides = anchor_guide, positive_guide
    plain = gist(unit(anchor), unit(positive), *map(unit, guides), normalize=False)
    torch.testing.assert_close(plain, gist(anchor, positive, *guides))


def test_a_guide_that_sees_no_difference_keeps_every_pair():
    """Equal similarities do not exceed each other, whatever their rounding: InfoNCE."""
    for dtype in (torch.float32, DOUBLE):
        (anchor, positive, _), _ = features(37, 1, 6, 1, dtype)
        same = randn(301, seed=3, dtype=dtype).expand(37, 301)
        loss = gist(
            anchor, positive, same, same * 3, contrast_anchors=False, contrast_positives=False
        )
        torch.testing.assert_close(loss, info_nce(anchor, positive, temperature=0.01))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_a_row_without_negatives_has_no_loss_and_no_gradient(dtype):
    inputs, guides = features(5, 3, 4, 4, dtype)
    value, *gradients = value_and_gradients(fused(guides, margin=3.0, reduction="none"), inputs)
    assert value.abs().max() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_only_features_get_a_gradient():
    inputs, guides = features(5, 3, 4, 4)
    inputs[0].requires_grad_()
    guides = [t.requires_grad_() for t in guides]
    fused(guides)(*inputs).backward()
    assert inputs[0].grad.abs().max() > 0
    assert all(t.grad is None for t in (*inputs[1:], *guides))


def test_autocast_changes_nothing():
    inputs, guides = features(9, 3, 8, 8, torch.float32)
    wanted = value_and_gradients(fused(guides), inputs)
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        got = value_and_gradients(fused(guides), inputs)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_statistics():
    inputs, guides = features(9, 3, 8, 8)
    loss, stats = fused(guides)(*inputs, return_stats=True, reduction="none", temperature=0.1)
    similarity = F.cosine_similarity(*inputs[:2])
    torch.testing.assert_close(stats.positive_similarity, similarity.mean())
    torch.testing.assert_close(stats.lse, loss + 10 * similarity)
    assert stats.rank is None


PREFIXES = {"dims": (7, 2, 4), "weights": (1.0, 0.5, 2.0), "reduction": "none"}


def prefixes_apart(guides: list[Tensor | None], **options):
    """The weighted sum of the losses of prefixes, by definition."""

    def total(*inputs: Tensor, **more) -> Tensor:
        parts = []
        for end, weight in zip(PREFIXES["dims"], PREFIXES["weights"], strict=True):
            cut = [t[:, :end] for t in inputs[:3]]
            parts.append(weight * definition(guides, reduction="none", **options, **more)(*cut))
        return torch.stack(parts).sum(0)

    return total


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("block", [2**20, 40])
@pytest.mark.parametrize("normalize", [True, False])
def test_prefixes_in_one_pass(guided, block, normalize, monkeypatch):
    monkeypatch.setattr(algebra, "BLOCK_PAIRS", block)
    # 2**20: the dots of positives are nodes of their own; 40: they are tied to the operands
    monkeypatch.setattr(rowwise, "BLOCK_ELEMENTS", block)
    inputs, guides = features(9, 5, 7, 4)
    guides = guides if guided else [None, None, None]
    scale = torch.tensor(5.0, dtype=DOUBLE)
    options = {"margin": -0.1, "normalize": normalize}
    assert_equal_in_double(
        lambda a, p, n, s: fused(guides, **options, **PREFIXES)(a, p, n, scale=s),
        lambda a, p, n, s: prefixes_apart(guides, **options)(a, p, n, scale=s),
        [*inputs, scale],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget_of_prefixes(dtype):
    inputs, guides = features(23, 9, 7, 8, dtype)
    for temperature in (1.0, 0.01):
        assert_within_budget(
            fused(guides, temperature=temperature, **PREFIXES),
            prefixes_apart(guides, temperature=temperature), inputs,
        )  # fmt: skip


def test_duplicates_of_the_positive_stay_at_every_prefix():
    """They are as similar as it is, whatever rounding says of either."""
    anchor = randn(33, 96, dtype=torch.float32)
    positive = anchor + randn(96, seed=1, dtype=torch.float32)
    dims, alone = (96, 17, 5), {"contrast_anchors": False, "contrast_positives": False}
    one = positive[:1].expand(33, -1).contiguous()
    loss = gist(anchor, one, dims=dims, reduction="none", **alone)
    torch.testing.assert_close(loss, torch.full_like(loss, 3 * math.log(33)))


def test_prefixes_cost_the_products_of_the_longest(monkeypatch):
    (anchor, positive, _), _ = features(12, 1, 24, 1)
    anchor.requires_grad_()
    counters = []

    def into(total, x, y, out_shape=None, **scales):
        return 2 * x[0] * x[1] * y[1]

    def count(_):  # within the operators
        counters.append(FlopCounterMode(display=False, custom_mapping={aten.addmm_: into}))
        return counters[-1]

    monkeypatch.setattr(guided_lse, "full_precision", count)
    counts = []
    for dims in (None, (24, 16, 8)):
        gist(anchor, positive, dims=dims).backward()
        counts.append(sum(counter.get_total_flops() for counter in counters))
        counters.clear()
    assert counts[0] == counts[1] > 0


PAIR = {"anchor": (4, 3), "positive": (4, 3), "anchor_guide": (4, 2), "positive_guide": (4, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positive": (5, 3)}, "anchor and positive must have the same number of rows"),
        ({"positive_guide": (4, 3)}, "anchor_guide and positive_guide .*features D, got 2 and 3"),
        (
            {"anchor_guide": (5, 2), "positive_guide": (5, 2)},
            "anchor_guide must have the 4 rows of anchor on (cpu|cuda:0), got 5 on (cpu|cuda:0)",
        ),
        ({"negatives": (6, 3)}, "negatives and negatives_guide must be given together"),
        (
            {"negatives": (6, 3), "negatives_guide": (5, 2)},
            "negatives_guide must have the 6 rows of negatives",
        ),
        (
            {"negatives": (6, 2), "negatives_guide": (6, 2)},
            "anchor and negatives .*features D, got 3 and 2",
        ),
        (
            {"negatives": (6, 3), "negatives_guide": (6, 3)},
            "anchor_guide and negatives_guide .*features D, got 2 and 3",
        ),
        ({"positive_guide": None}, "anchor_guide and positive_guide must be given together"),
        (
            {"anchor_guide": None, "positive_guide": None, "negatives_guide": (6, 2)},
            "negatives_guide must be None without anchor_guide and positive_guide",
        ),
        ({"margin": float("nan")}, "margin must be a finite number, got nan"),
        ({"margin_strategy": "both"}, "margin_strategy must be one of absolute, .* got 'both'"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"reduction": "average"}, 'reduction must be "mean", "sum" or "none"'),
        ({"backend": "fast"}, "backend must be .* got 'fast'"),
    ],
)
def test_bad_input(changes, message):
    arguments = {
        name: torch.ones(value, device="cpu") if isinstance(value, tuple) else value
        for name, value in (PAIR | changes).items()
    }
    with pytest.raises(ValueError, match=message):
        gist(**arguments)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_operators(whole, guided):
    """Of one process, and as a rank has them, without negatives."""
    anchor, positive, negatives = (randn(5, 3, seed=i).requires_grad_() for i in (1, 2, 3))
    guides = [randn(5, 2, seed=i) for i in (4, 5, 6)]
    kinds, shorter = [True, False, whole], [] if guided else [2]
    limit, scale = (
        randn(1 + len(shorter), 5, seed=7),
        torch.tensor(3.0, dtype=DOUBLE, requires_grad=True),
    )
    more, more_guides = ((negatives, None, None), (guides[2], None, None)) if whole else (
        (None, randn(7, 3, seed=8), randn(7, 3, seed=9)),
        (None, randn(7, 2, seed=8), randn(7, 2, seed=9)),
    )  # fmt: skip
    of_guide = (*guides[:2], *more_guides) if guided else 5 * (None,)
    kinds = [True, False, whole]
    arguments = anchor, positive, *more, *of_guide, limit, scale, 1, kinds, shorter
    torch.library.opcheck(torch.ops.contrastive_kernels.guided_lse.default, arguments)
