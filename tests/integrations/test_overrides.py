"""What a user puts in the place of a part of a package's loss counts, in the drop-in and in the
patched class: the value and gradients are those of the package alone, and the status says why."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import clustered, run, since
from oracles import DOUBLE, randn
from override_cases import CASES, DIM, HOME, C, Case, L, N, P, S
from torch import nn

from contrastive_kernels.integrations import patch_status, patched, swap

pytestmark = pytest.mark.filterwarnings("ignore:.*runs unfused", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def other_tests_are_warned_too():
    """Of reasons that are met here: a reason warns once."""
    yield
    for of_peer in swap._imported.values():
        for each in of_peer:
            each.fallbacks.clear()


class Model(nn.Module):
    """Gives its inputs, under a name, as embeddings."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, features):
        return {"sentence_embedding": features[self.name]}


def guided(cls: type) -> Any:
    """The loss without a tokenizer, which its constructor asks for."""
    loss = cls.__new__(cls)
    nn.Module.__init__(loss)
    loss.model, loss.guide, loss.must_retokenize = Model("model"), Model("guide"), False
    loss.temperature, loss.margin, loss.margin_strategy = 0.2, -0.1, "absolute"
    loss.contrast_anchors = loss.contrast_positives = True
    loss.gather_across_devices = loss.show_progress_bar = False
    loss.mini_batch_size = 4
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(-1), nn.CrossEntropyLoss()
    return loss


def make(case: Case, home: Any) -> nn.Module:
    cls = getattr(home, case.name)
    cls = case.base(cls) if case.base else cls
    torch.manual_seed(0)
    if "GIST" in case.name:
        loss = guided(cls)
    elif case.peer == S:
        loss = cls(Model("model"))
    else:
        loss = cls(**case.options())
    changed = case.change(loss) if case.change else None
    loss = changed if isinstance(changed, nn.Module) else loss
    return loss.double()


class Call(nn.Module):
    """The loss of two views, called as its package's trainers do."""

    def __init__(self, case: Case, loss: nn.Module) -> None:
        super().__init__()
        self.case, self.loss = case, loss

    def forward(self, a, b):
        case, loss = self.case, self.loss
        if case.peer == L:
            return loss(a, b)
        if case.peer == C:
            more = (-1.5,) if case.name == "SigLipLoss" else ()
            return loss(F.normalize(a, dim=1), F.normalize(b, dim=1), 4.0, *more)
        if case.peer == P:
            return loss(torch.cat((a, b)), torch.tensor([0, 0, 1, 1, 1, 2, 3] * 2))
        guides = clustered(N, 3, seed=5), clustered(N, 3, seed=6)
        if case.name == "CachedGISTEmbedLoss":
            return loss.calculate_loss(*([list(t.split(4)) for t in side] for side in
                                         ((a, b), guides)))  # fmt: skip
        pairs = zip((a, b), guides, strict=True)
        return loss([{"model": e, "guide": g} for e, g in pairs], None)


def views() -> list[torch.Tensor]:
    a = clustered(N, DIM)
    return [a, a + 0.3 * randn(N, DIM, seed=1)]


def outcome(case: Case, home: Any) -> tuple[list[torch.Tensor], set[str], int]:
    """Value and gradients, the new reasons, and how many calls ran fused."""

    def counts() -> tuple[dict, int]:
        status = patch_status().get(case.peer, {})
        losses = [s for label, s in status.items() if "create_indices" not in label]
        reasons: dict[str, int] = {}
        for s in losses:
            for reason, count in s.fallback.items():
                reasons[reason] = reasons.get(reason, 0) + count
        return reasons, sum(s.fused for s in losses)

    before, fused = counts()
    result = run(Call(case, make(case, home)), views(), DOUBLE)
    after, now = counts()
    return result, {r for r, n in after.items() if n > before.get(r, 0)}, now - fused


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda c: f"{c.name}: {c.reason}")


@named(CASES)
def test_an_override_counts(case):
    pytest.importorskip(case.peer)
    home = importlib.import_module(HOME[case.peer])
    ours = importlib.import_module(f"contrastive_kernels.integrations.{case.peer}")
    wanted = outcome(case, home)[0]
    assert wanted[1].any()
    with patched(case.peer):
        patched_outcome = outcome(case, home)
    for result, reasons, fused in (outcome(case, ours), patched_outcome):
        assert (reasons, fused) == ((set(), 1) if case.reason is None else ({case.reason}, 0))
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-12)


@named([c for c in CASES if c.change and c.reason and "zero" not in c.reason])
def test_an_override_changes_something(case):
    """Else the comparison would say nothing."""
    pytest.importorskip(case.peer)
    home = importlib.import_module(HOME[case.peer])
    plain, changed = (outcome(c, home)[0] for c in (case._replace(change=None), case))
    assert plain[0].shape != changed[0].shape or not torch.allclose(plain[1], changed[1], 1e-3)


MONKEYS = [
    (L, "DCLLoss", "lightly.loss:DCLLoss._loss", "_loss is overridden"),
    (L, "NTXentLoss", "torch.nn:CrossEntropyLoss.forward", "cross_entropy.forward is overridden"),
    (L, "DCLLoss", "lightly.utils.dist:world_size", "world_size is overridden"),
    (C, "ClipLoss", "open_clip.loss:ClipLoss.get_logits", "get_logits is overridden"),
    (C, "ClipLoss", "open_clip.loss:gather_features", "gather_features is overridden"),
    (P, "SupConLoss", "pytorch_metric_learning.distances:DotProductSimilarity.compute_mat",
     "distance.compute_mat is overridden"),
    (P, "SupConLoss", "pytorch_metric_learning.utils.loss_and_miner_utils:logsumexp",
     "logsumexp is overridden"),
    (S, "GISTEmbedLoss", HOME[S] + ":GISTEmbedLoss.sim_matrix", "sim_matrix is overridden"),
    *[(S, "MultipleNegativesRankingLoss",
       "sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking:get_rank",
       "get_rank is overridden")] * since("sentence-transformers", "6.0"),
]  # fmt: skip


@pytest.mark.parametrize(("peer", "name", "path", "reason"), MONKEYS, ids=lambda v: str(v))
def test_what_is_replaced_in_the_package_counts(peer, name, path, reason, monkeypatch):
    pytest.importorskip(peer)
    home = importlib.import_module(HOME[peer])
    ours = importlib.import_module(f"contrastive_kernels.integrations.{peer}")
    original = pkgutil.resolve_name(path)
    of, name_of = re.fullmatch(r"(.+)[.:](\w+)", path).groups()

    def changed(*args, **options):
        return doubled_or_same(original(*args, **options))

    monkeypatch.setattr(pkgutil.resolve_name(of), name_of, changed)
    case = Case(peer, name, reason)
    wanted = outcome(case, home)[0]
    with patched(peer):
        patched_outcome = outcome(case, home)
    for result, reasons, fused in (outcome(case, ours), patched_outcome):
        assert (reasons, fused) == ({reason}, 0)
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-12)


def doubled_or_same(out: Any) -> Any:
    if isinstance(out, int):
        return out
    return tuple(2 * o for o in out) if isinstance(out, tuple) else 2 * out


def test_a_replaced_helper_of_info_nce_counts(monkeypatch):
    peer = pytest.importorskip("info_nce")
    fused = importlib.import_module("contrastive_kernels.integrations.info_nce")
    monkeypatch.setattr(peer, "normalize", lambda *tensors: tensors)
    wanted = run(peer.InfoNCE(), views(), DOUBLE)
    with patched("info_nce"):
        got = run(peer.InfoNCE(), views(), DOUBLE)
    for result in (got, run(fused.InfoNCE(), views(), DOUBLE)):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)
    assert patch_status()["info_nce"]["info_nce"].fallback["normalize is overridden"] >= 2
