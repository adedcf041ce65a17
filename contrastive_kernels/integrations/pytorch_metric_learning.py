"""pytorch-metric-learning: NTXentLoss and SupConLoss, CrossBatchMemory and SelfSupervisedLoss
around them.

What is fused is `compute_loss`; regularizers, reducers and queues are the peer's own. The pairs
must be all that the labels make, of cosine or dot product similarities.

Where results differ from the peer's:
- Losses are float32 for half inputs.
- SupConLoss by default averages the anchors whose loss is above 0. A loss near 0 rounds to 0, in
  the peer's float32 many of them at low temperatures; here those that round to 0 in its float64.
- The peer's NTXentLoss ends at -log of the smallest normal number: 87 in float32.
- DoNothingReducer gets losses of 0, not the number 0, from SupConLoss when a batch has no
  positive or no negative pair.
- PerAnchorReducer takes more references than anchors, which raises in the peer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..types import known, statistics_dtype
from ._own import Own, one_entry
from ._pml_pairs import Candidates, LabelPairs
from .swap import Peer, Unfused

PEER = Peer("pytorch_metric_learning", "pytorch-metric-learning", ("2.6", "2.10"))
peer: Any = PEER.load("pytorch_metric_learning.losses")
distances: Any = PEER.load("pytorch_metric_learning.distances")
reducers: Any = PEER.load("pytorch_metric_learning.reducers")
per_anchor: Any = PEER.load("pytorch_metric_learning.reducers.per_anchor_reducer")
pairs_of: Any = PEER.load("pytorch_metric_learning.utils.loss_and_miner_utils")

generic: Any = PEER.load("pytorch_metric_learning.losses.generic_pair_loss").GenericPairLoss

LOSSES = (peer.NTXentLoss, peer.SupConLoss)
_DISTANCE = Own(
    distances.DotProductSimilarity,
    "forward", "compute_mat", "maybe_normalize", "normalize", "check_shapes", "set_default_stats",
    options={"is_inverted": (True,)},
    called=True,
)  # fmt: skip
_ZERO = (  # the peer's loss where there is no pair
    "zero_losses", "zero_loss", "sub_loss_names", "_sub_loss_names",
    "all_regularization_loss_names",
)  # fmt: skip
_PAIRS = ("convert_to_pairs", "get_all_pairs_indices", "get_matches_and_diffs")


def _loss(owner: type, method: str, *names: str, beside: Own) -> Own:
    """`method` is the one of the two ways of pairs that the loss has chosen."""
    return Own(
        owner, "_compute_loss", *_ZERO, *names,
        functions={"loss_method": [getattr(owner, method)]},
        parts={"distance": _DISTANCE},
        beside=[beside],
    )  # fmt: skip


NT_XENT = _loss(peer.NTXentLoss, "pair_based_loss", beside=Own(pairs_of, *_PAIRS))
_CHECKS = ("_assert_either_pos_or_neg",) if PEER.since("2.9") else ()
SUP_CON = _loss(
    peer.SupConLoss, "mat_based_loss", *_CHECKS, beside=Own(pairs_of, *_PAIRS, "logsumexp")
)


def _reduces(name: str, *names: str, **options: tuple) -> Own:
    names = (
        "forward", "unpack_loss_info", "reduce_the_loss", "get_reduction_func", "assert_sizes",
        "pos_pair_reduction", "element_reduction", *names,
    )  # fmt: skip
    return Own(getattr(reducers, name), *names, options=options, called=True)


_MEAN, _SUM = _reduces("MeanReducer"), _reduces("SumReducer")
_THRESHOLD = _reduces("ThresholdReducer", "element_reduction_helper", "set_stats")
_NON_ZERO = _reduces(
    "AvgNonZeroReducer", "element_reduction_helper", "set_stats", low=(0,), high=(None,)
)
_CLASSES = _reduces("ClassWeightedReducer", "element_reduction_helper")
_PER_ANCHOR = _reduces(
    "PerAnchorReducer", "tuple_reduction_helper", aggregation_func=(per_anchor.aggregation_func,)
)
_MULTIPLE = Own(reducers.MultipleReducers, "forward", called=True)
# These reduce the losses of anchors as they do those of pairs where each anchor has one positive.
_BY_ANCHOR = (_MEAN, _SUM, _THRESHOLD, _CLASSES, _PER_ANCHOR)


@PEER.fused(peer.NTXentLoss, "compute_loss", own=NT_XENT)
def _nt_xent(
    self: Any,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: tuple | LabelPairs | None,
    ref_emb: Tensor,
    ref_labels: Tensor | None,
) -> dict | Unfused:
    c = _candidates(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
    if isinstance(c, Unfused):
        return c
    if c.few:
        return self.zero_losses()
    reducer = _reducer(self)
    count = c.count_positives(c.labels)
    one_each = isinstance(indices_tuple, LabelPairs) and indices_tuple.one_each
    if not one_each and count.device.type == "cpu":  # elsewhere the question waits for the device
        one_each = bool((count == 1).all())
    if one_each and any(own.holds(reducer) for own in _BY_ANCHOR):
        return _by_anchor(reducer, c.sup_con_rows().loss)
    if _MEAN.holds(reducer):
        return _reduced(c.pair_losses().sum() / count.sum().clamp(min=1))
    if _SUM.holds(reducer):
        return _reduced(c.pair_losses().sum())
    if _PER_ANCHOR.holds(reducer):
        mean = _MEAN.holds(reducer.reducer)
        if mean or _SUM.holds(reducer.reducer):
            # the anchors of a reference have its label, and so one number of positives
            total = (c.pair_losses() / c.count_positives(c.ref_labels).clamp(min=1)).sum()
            return _reduced(total / len(count) if mean else total)
    return Unfused(f"{type(reducer).__name__} needs the loss of every pair")


@PEER.fused(peer.SupConLoss, "compute_loss", own=SUP_CON)
def _sup_con(
    self: Any,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: tuple | LabelPairs | None,
    ref_emb: Tensor,
    ref_labels: Tensor | None,
) -> dict | Unfused:
    c = _candidates(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
    if isinstance(c, Unfused):
        return c
    if c.few:
        return self.zero_losses()
    out = c.sup_con_rows()
    any_negative = (c.labels != c.labels[0]).any() | (c.ref_labels != c.labels[0]).any()
    rows = torch.where(any_negative, out.loss, 0.0)
    beside = None
    if c.own is not None:
        # the peer's logits are relative to the largest one, here the positive's or the anchor's own
        x = c.x.detach()
        own = x if c.y is None else c.y.detach()[c.own]
        beside = c.scale * c.row_dot(x, own) - out.positive
    return _by_anchor(_reducer(self), rows, beside)


# The losses that a wrapper may hand `LabelPairs` instead of what the peer hands them.
_IN_WRAPPERS = Own(
    generic,
    "forward",
    functions={"compute_loss": [generic.compute_loss, _nt_xent, _sup_con]},
    called=True,
)
_QUEUE = Own(
    peer.CrossBatchMemory,
    beside=[Own(pairs_of, *_PAIRS[1:], "remove_self_comparisons", "not_self_comparisons")],
)


@PEER.fused(peer.CrossBatchMemory, "create_indices_tuple", own=_QUEUE)
def _queue_pairs(
    self: Any,
    embeddings: Tensor,
    labels: Tensor,
    E_mem: Tensor,
    L_mem: Tensor,
    input_indices_tuple: tuple | None,
    do_remove_self_comparisons: bool,
) -> LabelPairs | Unfused:
    reason = _wrapped(self.loss)
    if reason is not None:
        return Unfused(reason)
    if self.miner or input_indices_tuple is not None:
        return Unfused("a miner or an indices_tuple chooses pairs")
    own: Tensor | None = None
    if do_remove_self_comparisons:
        if len(labels) == 1:
            return Unfused("a batch of one, whose pair with itself the peer keeps")
        own = self.curr_batch_idx

    def make() -> tuple:
        pairs = pairs_of.get_all_pairs_indices(labels, L_mem)
        if own is None:
            return pairs
        return pairs_of.remove_self_comparisons(pairs, own, self.memory_size)

    return LabelPairs(make, own=own)


@PEER.fused(peer.SelfSupervisedLoss, own=Own(peer.SelfSupervisedLoss))
def _self_supervised(self: Any, embeddings: Tensor, ref_emb: Tensor | None) -> Tensor | Unfused:
    reason = _wrapped(self.loss)
    if reason is not None:
        return Unfused(reason)
    labels = torch.arange(len(embeddings), device=embeddings.device)
    ref_labels = labels.clone()
    if self.symmetric:
        embeddings, ref_emb = torch.cat((embeddings, known(ref_emb))), None
        labels = ref_labels = labels.repeat(2)
    pairs = LabelPairs(lambda: pairs_of.get_all_pairs_indices(labels, ref_labels), one_each=True)
    return self.loss(embeddings, labels, pairs, ref_emb, ref_labels)


def _candidates(
    loss: Any,
    embeddings: Tensor,
    labels: Tensor | None,
    pairs: tuple | LabelPairs | None,
    ref_emb: Tensor,
    ref_labels: Tensor | None,
) -> Candidates | Unfused:
    distance = loss.distance
    if distance.power != 1 or (distance.normalize_embeddings and distance.p != 2):
        return Unfused("the similarity has a power, or a norm with p != 2")
    if distance.collect_stats or _reducer(loss).collect_stats:
        return Unfused("statistics are collected")
    if pairs is not None and not isinstance(pairs, LabelPairs):
        return Unfused("an indices_tuple is given, which may leave pairs out")
    if labels is None or ref_labels is None:
        return Unfused("not all embeddings have labels")
    if labels.is_floating_point() or ref_labels.is_floating_point():
        return Unfused("labels are not integers")
    reason = one_entry(temperature=loss.temperature)
    if reason is not None:
        return Unfused(reason)
    own = None if pairs is None else pairs.own
    same = ref_labels is labels
    labels = labels.long()
    ref_labels = labels if same else ref_labels.long()
    if same:  # the peer's sign that an anchor is its own reference
        own = torch.arange(len(labels), device=labels.device)
    y: Tensor | None = ref_emb
    if same and ref_emb is embeddings:
        y = None
    elif not ref_emb.requires_grad:  # a queue moves on, maybe before the backward pass
        y, ref_labels = ref_emb.clone(), ref_labels.clone()
    temperature = loss.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.to(statistics_dtype(embeddings))
    return Candidates(
        embeddings, labels, y, ref_labels, own, 1 / temperature,
        distance.normalize_embeddings,
    )  # fmt: skip


def _reducer(loss: Any) -> nn.Module:
    """The reducer that gets the loss, beside those of regularizers."""
    reducer = loss.reducer
    if _MULTIPLE.holds(reducer):
        known = reducer.reducers
        return known["loss"] if "loss" in known else reducer.default_reducer
    return reducer


def _by_anchor(reducer: nn.Module, rows: Tensor, beside: Tensor | None = None) -> dict:
    """Losses for the reducer, each 0 where the peer's is in float64: log(1 + e) of the negatives'
    share e, added to a logit of size `beside`."""
    seen = (1 + rows.detach().double()) - 1
    if beside is not None:
        beside = beside.detach().clamp(min=1).double()
        seen = (beside + seen) - beside
    rows = torch.where(seen > 0, rows, 0.0)
    if _NON_ZERO.holds(reducer):  # the same without waiting for the device
        return _reduced(rows.sum() / (rows > 0).sum().clamp(min=1))
    indices = torch.arange(len(rows), device=rows.device)
    return {"loss": {"losses": rows, "indices": indices, "reduction_type": "element"}}


def _wrapped(loss: Any) -> str | None:
    """Why a wrapper must hand `loss` what the peer's does, or None."""
    if not isinstance(loss, LOSSES):
        return f"the loss is {type(loss).__name__}"
    return _IN_WRAPPERS.replaced(loss, "loss.")


def _reduced(loss: Tensor) -> dict:
    return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}


class NTXentLoss(peer.NTXentLoss):
    """The peer's `NTXentLoss`, fused: every positive pair against the negatives of its anchor.

    Two sweeps, or one where every anchor has one positive.
    """

    compute_loss = _nt_xent


class SupConLoss(peer.SupConLoss):
    """The peer's `SupConLoss`, fused: the rows of `sup_con`, for references too."""

    compute_loss = _sup_con


class CrossBatchMemory(peer.CrossBatchMemory):
    """The peer's `CrossBatchMemory`, fused around the losses of this module or patched ones."""

    create_indices_tuple = _queue_pairs


class SelfSupervisedLoss(peer.SelfSupervisedLoss):
    """The peer's `SelfSupervisedLoss`, fused around the losses of this module or patched ones."""

    forward = _self_supervised
