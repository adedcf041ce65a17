"""pytorch-metric-learning's losses where they run unfused, patched, and how much they hold."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("pytorch_metric_learning")
from conformance import clustered  # noqa: E402
from metric_learning import fallbacks, labels_of, losses  # noqa: E402
from pytorch_metric_learning import distances, miners, reducers  # noqa: E402
from pytorch_metric_learning import losses as peer  # noqa: E402
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices  # noqa: E402

from contrastive_kernels import integrations  # noqa: E402
from contrastive_kernels.integrations import pytorch_metric_learning as fused  # noqa: E402

pytestmark = pytest.mark.usefixtures("metric_learning_status")


def triplets(labels):
    a, p, n = miners.TripletMarginMiner()(clustered(len(labels), 8), labels)
    return a, p, n


class Altered(peer.NTXentLoss):
    def _compute_loss(self, *args):
        return super()._compute_loss(*args)


class AlteredFused(Altered, fused.NTXentLoss):
    pass


UNFUSED = {
    "the distance is LpDistance": ({"distance": distances.LpDistance()}, {}),
    "the similarity has a power": ({"distance": distances.CosineSimilarity(power=2)}, {}),
    "norm with p != 2": ({"distance": distances.CosineSimilarity(p=1)}, {}),
    "are collected": ({"distance": distances.CosineSimilarity(collect_stats=True)}, {}),
    "statistics are collected": ({"reducer": reducers.SumReducer(collect_stats=True)}, {}),
    "an indices_tuple is given": ({}, {"indices_tuple": get_all_pairs_indices}),
    "may leave pairs out": ({}, {"indices_tuple": triplets}),
    "not all embeddings have labels": ({}, {"ref_emb": lambda _: clustered(11, 8, seed=3)}),
    "labels are not integers": ({}, {"labels": lambda labels: labels.double()}),
}


def assert_unfused(reason, ours, theirs, x):
    """Both give the same, and patch_status has a reason with these words."""
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert any(reason in text for reasons in fallbacks().values() for text in reasons)


@losses
@pytest.mark.parametrize("reason", UNFUSED)
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_unfused(name, reason):
    options, arguments = UNFUSED[reason]
    labels = labels_of(11, 4)
    arguments = {"labels": labels} | {k: make(labels) for k, make in arguments.items()}
    ours, theirs = (getattr(module, name)(**options) for module in (fused, peer))
    assert_unfused(
        reason, lambda x: ours(x, **arguments), lambda x: theirs(x, **arguments), clustered(11, 8)
    )


@pytest.mark.parametrize(
    ("reducer", "labels"),
    [
        (reducers.AvgNonZeroReducer, labels_of(11, 3)),
        (lambda: reducers.ClassWeightedReducer(torch.ones(9)), labels_of(11, 3)),
        (lambda: reducers.PerAnchorReducer(reducers.AvgNonZeroReducer()), labels_of(11, 3)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_unfused_reducers_of_pairs(reducer, labels):
    ours, theirs = (module.NTXentLoss(reducer=reducer()) for module in (fused, peer))
    reason = "needs the loss of every pair"
    assert_unfused(reason, lambda x: ours(x, labels), lambda x: theirs(x, labels), clustered(11, 8))


@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_unfused_subclass():
    labels = labels_of(11, 4)
    assert_unfused(
        "_compute_loss is overridden",
        lambda x: AlteredFused()(x, labels),
        lambda x: Altered()(x, labels),
        clustered(11, 8),
    )


@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_unfused_wrappers():
    x, labels = clustered(11, 8), labels_of(11, 4)

    def queue(module, loss, **options):
        return module.CrossBatchMemory(loss, 8, memory_size=20, **options)

    def both(reason, make, *args):
        assert_unfused(
            reason,
            lambda x: make(fused)(x, *args),
            lambda x: make(peer)(x, *args),
            x[: len(labels)],
        )

    miner = miners.MultiSimilarityMiner()
    both("a miner", lambda m: queue(m, m.SupConLoss(), miner=miner), labels)
    both("an indices_tuple chooses", lambda m: queue(m, m.SupConLoss()), labels, triplets(labels))
    both("the loss is ContrastiveLoss", lambda m: queue(m, peer.ContrastiveLoss()), labels)
    both("the loss is ContrastiveLoss", lambda m: m.SelfSupervisedLoss(peer.ContrastiveLoss()), -x)
    x, labels = x[:1], labels[:1]
    both("a batch of one", lambda m: queue(m, m.SupConLoss()), labels)


@losses
def test_fused_wrappers_around_unfused_losses(name):
    """The pairs are made when the loss reads them."""
    x, labels = clustered(11, 8), labels_of(11, 4)
    values = []
    for module in (fused, peer):
        queue = module.CrossBatchMemory(getattr(peer, name)(), 8, memory_size=15)
        queue(x[:7], labels[:7])
        views = module.SelfSupervisedLoss(getattr(peer, name)())
        values.append((queue(x, labels), views(x, x.flip(1))))
    torch.testing.assert_close(*values, rtol=0, atol=0)


@losses
def test_patch(name):
    x, labels = clustered(11, 8), labels_of(11, 4)
    loss = getattr(peer, name)(temperature=0.2)

    def calls():
        status = integrations.patch_status()["pytorch_metric_learning"]
        return status[f"{name}.compute_loss"].fused

    before, wanted = calls(), loss(x, labels)
    assert calls() == before
    with integrations.patched("pytorch_metric_learning", name):
        torch.testing.assert_close(loss(x, labels), wanted, rtol=1e-10, atol=0)
        assert calls() == before + 1
        peer.SelfSupervisedLoss(loss)(x, x.flip(1))
        assert calls() == before + 2
    loss(x, labels)
    assert calls() == before + 2


class ByNumber(peer.SupConLoss):
    """Reads its pairs by their number."""

    def mat_based_loss(self, mat, indices_tuple):
        total = mat[indices_tuple[0], indices_tuple[1]].sum() - mat[indices_tuple[2:]].sum()
        return {"loss": {"losses": total, "indices": None, "reduction_type": "already_reduced"}}


class ByHand(peer.SupConLoss):
    """Expects what the peer's wrappers give."""

    def forward(self, embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None):
        assert indices_tuple is None or isinstance(indices_tuple, tuple)
        return embeddings.square().sum() * len(labels)


class Counted(peer.SupConLoss):
    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        assert indices_tuple is None or isinstance(indices_tuple, tuple)
        return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)


def hooked():
    loss = peer.SupConLoss()
    loss.register_forward_hook(lambda module, inputs, output: output * len(inputs))
    return loss


ByNumber.__name__ = ByHand.__name__ = Counted.__name__ = "SupConLoss"  # the wrappers' condition


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (ByNumber, "loss_method is overridden"),
        (ByHand, "loss.forward is overridden"),
        (Counted, "loss.compute_loss is overridden"),
        (hooked, "loss has hooks"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_wrappers_around_altered_losses(make, reason):
    x, labels = clustered(11, 8), labels_of(11, 4)

    def values(module):
        queue = module.CrossBatchMemory(make(), 8, memory_size=15)
        queue(x[:7], labels[:7])
        views = module.SelfSupervisedLoss(make(), symmetric=True)
        return queue(x, labels), views(x, x.flip(1))

    wanted = values(peer)
    with integrations.patched("pytorch_metric_learning"):
        torch.testing.assert_close(values(peer), wanted, rtol=1e-9, atol=0)
    torch.testing.assert_close(values(fused), wanted, rtol=1e-9, atol=0)
    assert any(reason in reasons for reasons in fallbacks().values())


class PairsOnly(reducers.MeanReducer):
    def pos_pair_reduction(self, losses, *args):
        return losses.max()


class AnchorsOnly(reducers.PerAnchorReducer):
    def __init__(self):
        super().__init__(aggregation_func=lambda losses, counts: losses.sum(1) * 3)


@pytest.mark.parametrize("reducer", [PairsOnly, AnchorsOnly])
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_reducers_of_ones_own_where_each_anchor_has_one_positive(reducer):
    """They reduce pairs otherwise than anchors."""
    x, labels = clustered(12, 8), torch.arange(6).repeat(2)
    ours, theirs = (module.NTXentLoss(reducer=reducer()) for module in (fused, peer))
    reason = f"{reducer.__name__} needs the loss of every pair"
    assert_unfused(reason, lambda x: ours(x, labels), lambda x: theirs(x, labels), x)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


@losses
@pytest.mark.parametrize("form", ["labels", "per anchor", "queue", "views"])
def test_no_matrix_of_pairs(name, form):
    n, dim = 1000, 4
    x, labels = clustered(n, dim).requires_grad_(), labels_of(n, 300)
    loss = getattr(fused, name)()
    queue = fused.CrossBatchMemory(loss, dim, memory_size=2 * n)
    per_anchor = getattr(fused, name)(reducer=reducers.PerAnchorReducer())
    call = {
        "labels": lambda: loss(x, labels),
        "per anchor": lambda: per_anchor(x, labels),
        "queue": lambda: queue(x, labels),
        "views": lambda: fused.SelfSupervisedLoss(loss)(x, x.flip(1)),
    }[form]
    with LargestTensor() as largest:
        call().backward()
    assert largest.numel <= 4 * n * dim
