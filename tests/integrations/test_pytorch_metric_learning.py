"""pytorch-metric-learning's losses, fused, against the package's own."""

from __future__ import annotations

import pytest
import torch
from oracles import randn

pytest.importorskip("pytorch_metric_learning")
from conformance import clustered, run  # noqa: E402
from metric_learning import conform, labels_of, losses  # noqa: E402
from pytorch_metric_learning import distances, reducers, regularizers  # noqa: E402
from pytorch_metric_learning import losses as peer  # noqa: E402

from contrastive_kernels.integrations import pytorch_metric_learning as fused  # noqa: E402

pytestmark = pytest.mark.usefixtures("metric_learning_status")
TEMPERATURES = [1.0, 0.07, 0.01, -1.0]
temperatures = pytest.mark.parametrize("temperature", TEMPERATURES)

# labels of a batch; not contiguous, some negative
BATCHES = {
    "one": [5],
    "a pair": [5, 5],
    "two alone": [5, 6],
    "three": [5, 6, 5],
    "no positives": [4, 1, 3, -2, 0],
    "no negatives": [7] * 5,
    "twice": [*range(13), *range(13)],
    "one alone": [9, 9, 2, 8, 2],
    "mixed": [3, -40, 3, 3, 10**12, 0, -40, 3, 1, 0, 10**12, 8, 3, 8, 8, 6, 0],
}


@losses
@temperatures
@pytest.mark.parametrize(("batch", "dim"), [*((batch, 16) for batch in BATCHES), ("mixed", 1)])
def test_losses(name, temperature, batch, dim):
    labels = torch.tensor(BATCHES[batch])
    conform(
        lambda module: getattr(module, name)(temperature=temperature),
        [clustered(len(labels), dim), labels],
    )


@losses
@temperatures
@pytest.mark.parametrize(
    ("n", "m", "classes"), [(1, 2, 1), (1, 7, 2), (7, 1, 2), (5, 19, 3), (23, 11, 9), (13, 13, 40)]
)
def test_references(name, temperature, n, m, classes):
    inputs = [clustered(n, 12), labels_of(n, classes), clustered(m, 12, seed=1)]
    ref_labels = labels_of(m, classes, seed=1)

    def loss_of(module):
        loss = getattr(module, name)(temperature=temperature)
        return lambda x, labels, ref: loss(x, labels, ref_emb=ref, ref_labels=ref_labels)

    conform(loss_of, inputs)


@losses
def test_one_pair_of_each_kind_is_too_few(name):
    """The peer's loss is 0 then; with one more reference it is not."""
    x, ref = clustered(1, 8), clustered(3, 8, seed=1)
    for labels, is_zero in (([1, 0], True), ([1, 0, 0], False)):
        references = {"ref_emb": ref[: len(labels)], "ref_labels": torch.tensor(labels)}
        ours, theirs = (
            getattr(module, name)()(x, torch.tensor([1]), **references) for module in (fused, peer)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
        assert (ours == 0) == is_zero


@losses
@pytest.mark.parametrize("which", ["embeddings", "labels", "both", "frozen"])
def test_references_that_share_a_tensor(name, which):
    """With the labels' tensor the peer leaves out the pairs of equal position; not with a copy."""
    labels, ref = labels_of(17, 4), clustered(17, 8, seed=1)
    copy = labels.clone()

    def loss_of(module):
        loss = getattr(module, name)(temperature=0.1)
        return {
            "embeddings": lambda x: loss(x, labels, ref_emb=x, ref_labels=copy),
            "labels": lambda x: loss(x, labels, ref_emb=ref.to(x.dtype), ref_labels=labels),
            "both": lambda x: loss(x, labels, ref_emb=x, ref_labels=labels),
            "frozen": lambda x: loss(x, labels, ref_emb=ref.to(x.dtype), ref_labels=copy),
        }[which]

    conform(loss_of, [clustered(17, 8)])


@losses
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_types_of_labels(name, dtype):
    labels = labels_of(19, 2).to(dtype)
    conform(lambda module: getattr(module, name)(), [clustered(19, 8), labels])


@losses
@pytest.mark.parametrize("cls", ["CosineSimilarity", "DotProductSimilarity"])
def test_similarities(name, cls):
    inputs = [0.3 * randn(19, 8), labels_of(19, 4)]
    conform(lambda m: getattr(m, name)(distance=getattr(distances, cls)()), inputs)
    if cls == "DotProductSimilarity":
        distance = distances.DotProductSimilarity(normalize_embeddings=False)
        conform(lambda m: getattr(m, name)(distance=distance), inputs)


@losses
def test_temperature_with_a_gradient(name):
    labels = labels_of(19, 5)

    def loss_of(module):
        loss = getattr(module, name)()

        def call(x, temperature):
            loss.temperature = temperature
            return loss(x, labels)

        return call

    conform(loss_of, [clustered(19, 8), torch.tensor(0.2, dtype=torch.float64)])


FOR_PAIRS = {
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "per anchor": reducers.PerAnchorReducer,
    "per anchor sum": lambda: reducers.PerAnchorReducer(reducers.SumReducer()),
    "multiple": lambda: reducers.MultipleReducers({"loss": reducers.SumReducer()}),
    "multiple default": lambda: reducers.MultipleReducers({"other": reducers.SumReducer()}),
}
FOR_ANCHORS = FOR_PAIRS | {
    "non-zero": reducers.AvgNonZeroReducer,
    "threshold": lambda: reducers.ThresholdReducer(low=1.0, high=2.5),
    "class weights": lambda: reducers.ClassWeightedReducer(torch.arange(40) / 8),
    "per anchor non-zero": lambda: reducers.PerAnchorReducer(reducers.AvgNonZeroReducer()),
}
# elsewhere the loss does not ask whether each anchor has one positive
ONE_EACH = FOR_ANCHORS if torch.get_default_device().type == "cpu" else FOR_PAIRS
CASES = [
    *(("NTXentLoss", key, labels_of(29, 6)) for key in FOR_PAIRS),
    *(("NTXentLoss", key, torch.arange(15).repeat(2)) for key in ONE_EACH),
    *(("SupConLoss", key, labels_of(29, 12)) for key in FOR_ANCHORS),
]


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize(("name", "key", "labels"), CASES)
def test_reducers(name, key, labels, regularized):
    def loss_of(module):
        options = {"reducer": FOR_ANCHORS[key](), "temperature": 0.2}
        if regularized:
            options |= {
                "embedding_regularizer": regularizers.LpRegularizer(),
                "embedding_reg_weight": 0.3,
            }
        return getattr(module, name)(**options)

    # the peer rounds thresholds in bfloat16
    exact = "threshold" not in key
    conform(loss_of, [clustered(len(labels), 8), labels], bfloat16=exact)


def test_losses_of_anchors():
    """DoNothingReducer returns them."""
    x, labels = clustered(11, 8), labels_of(11, 4)
    ours, theirs = (
        module.SupConLoss(reducer=reducers.DoNothingReducer())(x, labels)["loss"]
        for module in (fused, peer)
    )
    assert ours["reduction_type"] == theirs["reduction_type"]
    assert torch.equal(ours["indices"], theirs["indices"])
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-10, atol=1e-12)


@losses
@temperatures
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n", [1, 2, 13])
def test_self_supervised(name, temperature, symmetric, n):
    x = clustered(n, 8)

    def loss_of(module):
        loss = getattr(module, name)(temperature=temperature)
        return module.SelfSupervisedLoss(loss, symmetric=symmetric)

    conform(loss_of, [x, x + 0.3 * randn(n, 8, seed=1)])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("key", ["threshold", "per anchor", "non-zero"])
def test_self_supervised_pairs_with_any_reducer(symmetric, key):
    def loss_of(module):
        loss = module.NTXentLoss(reducer=FOR_ANCHORS[key](), temperature=0.2)
        return module.SelfSupervisedLoss(loss, symmetric=symmetric)

    x = clustered(13, 8)
    conform(loss_of, [x, x + 0.3 * randn(13, 8, seed=1)], bfloat16=key != "threshold")


@losses
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("sizes", "memory"), [([7], 40), ([7] * 4, 23), ([5, 3, 11], 11), ([6] * 4, 6)], ids=str
)
def test_cross_batch_memory(name, temperature, masked, sizes, memory):
    """The queue is partly filled, full, wraps within a batch, or is the batch."""
    mask = torch.arange(sizes[-1]) % 3 == 1 if masked else None

    def loss_of(module):
        def call(x, labels):
            loss = getattr(module, name)(temperature=temperature)
            queue = module.CrossBatchMemory(loss, 8, memory_size=memory)
            for step, n in enumerate(sizes[:-1]):
                queue(clustered(n, 8, seed=step).to(x.dtype), labels_of(n, 3, seed=step))
            value = queue(x, labels, enqueue_mask=mask)
            assert queue.embedding_memory.dtype == x.dtype
            return value

        return call

    conform(loss_of, [clustered(sizes[-1], 8, seed=50), labels_of(sizes[-1], 3, seed=50)])


@losses
def test_queue_moves_on_before_the_backward_pass(name):
    def loss_of(module):
        queue = module.CrossBatchMemory(getattr(module, name)(), 8, memory_size=9)
        return lambda a, b: queue(a, labels_of(6, 2)) + queue(b, labels_of(6, 2, seed=1))

    conform(loss_of, [clustered(6, 8), clustered(6, 8, seed=1)], bfloat16=False)


def graded(*similarities: float) -> torch.Tensor:
    """Pairs of unit vectors with these similarities, orthogonal to those of other pairs; the first
    vectors of all pairs, then the second ones."""
    cos = torch.tensor(similarities, dtype=torch.float64)
    eye = torch.eye(2 * len(cos), dtype=torch.float64)
    first, other = eye[: len(cos)], eye[len(cos) :]
    return torch.cat((first, cos[:, None] * first + (1 - cos**2).sqrt()[:, None] * other))


@losses
@pytest.mark.parametrize("symmetric", [True, False])
def test_losses_that_round_to_0(name, symmetric):
    """AvgNonZeroReducer leaves them out, here those that the peer does in float64. At temperature
    0.01 losses are e^-87, 7e-16 (which SupConLoss with logits of 62 drops), 2e-10 and 2.7."""
    x = graded(0.9, 0.9, 0.375, 0.375, 0.25, 0.25, 0.25, 0.0)
    inputs = [t.float() for t in x.chunk(2)]

    def result(module, dtype):
        loss = getattr(module, name)(temperature=0.01, reducer=reducers.AvgNonZeroReducer())
        return run(module.SelfSupervisedLoss(loss, symmetric=symmetric), inputs, dtype)

    exact, rounded = (result(peer, dtype) for dtype in (torch.float64, torch.float32))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for ours, wanted in zip(result(fused, dtype), exact, strict=True):
            assert (ours - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (rounded[0] - exact[0]).abs() > 0.1 * exact[0]


def test_ntxent_above_the_peers_limit():
    """Opposite positives at temperature 0.01 have a loss of 200, where the peer's ends at 87 and
    has no gradient."""
    x = clustered(1, 8).float()
    x = torch.cat((x, -x, x + 0.1 * randn(1, 8).float(), -x)).requires_grad_()
    labels = torch.tensor([0, 0, 1, 2])
    ours, theirs = (m.NTXentLoss(temperature=0.01)(x, labels) for m in (fused, peer))
    exact = peer.NTXentLoss(temperature=0.01)(x.double(), labels)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    assert theirs < 88 < 190 < ours


def test_per_anchor_of_more_references():
    x, ref = clustered(5, 8), clustered(13, 8, seed=1)
    labels, ref_labels = labels_of(5, 3), labels_of(13, 3, seed=1)
    references = {"ref_emb": ref, "ref_labels": ref_labels}
    options = {"reducer": reducers.PerAnchorReducer()}
    with pytest.raises(IndexError):
        peer.NTXentLoss(**options)(x, labels, **references)
    value = fused.NTXentLoss(**options)(x, labels, **references)
    pairs = peer.NTXentLoss(reducer=reducers.DoNothingReducer())(x, labels, **references)["loss"]
    wanted = sum(pairs["losses"][pairs["indices"][0] == a].mean() for a in range(5)) / 5
    torch.testing.assert_close(value, wanted, rtol=1e-10, atol=0)


@losses
def test_half_losses_are_float32(name):
    x, labels = clustered(7, 8).bfloat16(), labels_of(7, 2)
    assert getattr(fused, name)()(x, labels).dtype == torch.float32
    assert getattr(peer, name)()(x, labels).dtype == torch.bfloat16
