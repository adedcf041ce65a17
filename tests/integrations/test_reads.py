"""Every attribute, method and function that a package's loss reads is one that the fused form
reads too, or has to be the package's own (`Own`); or it is named here, with the reason."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from matrix import PACKAGES
from reading import Reads, attributes_of, named
from torch import nn

from contrastive_kernels.integrations import PEERS
from contrastive_kernels.integrations._own import Own

# The fused form calls these as the package does: what they read in turn is theirs.
CLOSED = (
    "batch_to_device", "embed_columns", "get_image_features", "get_text_features", "guide",
    "loss", "miner", "model", "text_model", "tokenizer", "vision_model",
)  # fmt: skip
KEPT = "of what the bank keeps, by its own forward, which the fused form calls too"
CACHE = "the cache of get_ground_truth"
CHOSEN = "only where pairs are chosen, which runs unfused"
STATS = "statistics, without which alone it runs fused"
EXACT = "of rounding, which the integration's module describes"
MOVES = "moves tensors between devices or types"
CALLED = "read by the package's own form, which the fused one calls"
MINI = "mini-batches, which the fused form does not need"
OLDER = "only in versions before the pinned one"
UTILS = "pytorch_metric_learning.utils."  # left out below
HARMLESS = {
    "lightly": {
        "memory_bank._dequeue_and_enqueue": KEPT,
        "memory_bank.bank_ptr": KEPT,
        "lightly.models.utils:concat_all_gather": KEPT,
        "memory_bank._init_memory_bank": OLDER,
        "num_pairs": "that of num_samples",
        "_dequeue_and_enqueue": KEPT,
        "bank_ptr": KEPT,
        "feature_dim_first": KEPT,
        "gather_distributed": KEPT,
        "lightly.utils.dist:world_size": KEPT,
    },
    "open_clip": {
        "labels": CACHE,
        "prev_num_logits": CACHE,
        "use_horovod": "read with a default, for SigLipLoss has none",
        "dist_impl": "the ways in which texts travel, with the same result",
    },
    "pytorch_metric_learning": {
        "__class__": "read for the names of its bases",
        "distance.get_norm": STATS,
        "distance.reset_stats": STATS,
        "common_functions:reset_stats": STATS,
        "common_functions:labels_or_indices_tuple_required": "an error's",
        "common_functions:neg_inf": EXACT,
        "common_functions:small_val": EXACT,
        "common_functions:to_device": MOVES,
        "common_functions:to_dtype": MOVES,
        "common_functions:torch_arange_from_size": "the rows' numbers",
        "common_functions:concatenate_indices_tuples": CHOSEN,
        "loss_and_miner_utils:convert_to_pairs": CHOSEN,
        "loss_and_miner_utils:convert_to_triplets": CHOSEN,
        "loss_and_miner_utils:get_all_triplets_indices": CHOSEN,
        "loss_and_miner_utils:get_all_triplets_indices_loop_method": CHOSEN,
        "loss_and_miner_utils:get_all_triplets_indices_vectorized_method": CHOSEN,
        "loss_and_miner_utils:get_random_triplet_indices": CHOSEN,
    },
    "sentence_transformers": {
        "mini_batch_size": MINI,
        "show_progress_bar": MINI,
        "uses_gradient_cache": "whether calculate_loss is a CachedLossDecorator",
        "cached_losses": OLDER,
        "sentence_transformers.util.distributed:is_dist_initialized": "whether there is a group",
        "sentence_transformers.util.environment:check_package_availability": CALLED,
        "sentence_transformers.util.hard_negatives:is_datasets_available": CALLED,
    },
}


def sample(owner: Any) -> Any:
    """An instance of a class; None for a module."""
    name = getattr(owner, "__name__", "")
    if not isinstance(owner, type):
        return None
    if name in ("CrossBatchMemory", "SelfSupervisedLoss"):
        loss = importlib.import_module("pytorch_metric_learning.losses").SupConLoss()
        return owner(loss, 4) if name == "CrossBatchMemory" else owner(loss)
    if name == "NNMemoryBankModule":
        return owner((4, 3))
    if "Ranking" in name:
        return owner(nn.Sequential(nn.Identity()))
    if name in ("Whitening2d", "WMSELoss"):
        # before 1.6 it is looked for as a module, and not found
        importlib.import_module("lightly.loss.wmse_loss")._SOLVE_TRIANGULAR_AVAILABLE = True
        return owner(3)
    if name == "MatryoshkaLoss":
        loss = owner.__new__(owner)
        nn.Module.__init__(loss)
        return loss
    if name == "CachedLossDecorator":
        return owner(len, (), ())
    if "GISTEmbed" not in name and not name.endswith("Model"):
        return owner()
    thing = owner.__new__(owner)  # no model is at hand: what the constructor makes of parts
    nn.Module.__init__(thing)
    thing.similarity_fct, thing.cross_entropy_loss = nn.CosineSimilarity(), nn.CrossEntropyLoss()
    return thing


def uncovered(swap: Any, own: Any) -> set[str]:
    """What the peer's function reads and neither `own` names nor the fused form reads."""
    ours, names = attributes_of(swap.function), named(own)
    return {
        name for name in Reads(swap.original, sample(swap.owner), CLOSED).names - names
        if ":" in name or not set(name.split(".")) <= ours
    }  # fmt: skip


def is_pinned(peer: str) -> bool:
    """Whether the package is installed in the version of requirements-peers.txt."""
    if peer not in PACKAGES:
        return False
    name = PACKAGES[peer].distribution
    pins = (Path(__file__).parents[2] / "requirements-peers.txt").read_text().split()
    return f"{name}=={importlib.metadata.version(name)}" in pins


def swaps_of(peer: str) -> list[Any]:
    pytest.importorskip(peer)
    return importlib.import_module(f"contrastive_kernels.integrations.{peer}").PEER.swaps


def _read_by_us(peer: str) -> list[Any]:
    """Those whose fused form does not run the package's own with other scores."""
    return [s for s in swaps_of(peer) if not getattr(s.function, "runs_theirs", False)]


@pytest.mark.parametrize("peer", PEERS)
def test_all_that_a_package_reads_is_covered(peer):
    harmless, met = HARMLESS.get(peer, {}), set()
    for swap in _read_by_us(peer):
        names = {name.removeprefix(UTILS) for name in uncovered(swap, swap.own)}
        assert names <= set(harmless), swap.label
        met |= names
    if is_pinned(peer):
        assert met == {name for name, reason in harmless.items() if reason != OLDER}


@pytest.mark.parametrize("peer", PEERS)
def test_all_that_must_be_the_packages_own_is_read_by_it(peer):
    for swap in _read_by_us(peer):
        reads = Reads(swap.original, sample(swap.owner), CLOSED).names
        assert named(swap.own) <= reads, swap.label


def test_what_is_not_covered_is_found():
    swaps = {swap.label: swap for swap in swaps_of("lightly")}
    empty = Own(nn.Module)
    found = uncovered(swaps["DCLLoss.forward"], empty)
    assert {"_loss", "lightly.utils.dist:gather"} <= found and "temperature" not in found
    found = uncovered(swaps["NTXentLoss.forward"], empty)
    assert {"cross_entropy.weight", "memory_bank.feature_dim_first"} <= found


class Part(nn.Module):
    width = 3

    def forward(self):
        return self.width

    def other(self):
        return self.depth


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.model, self.count = Part(), Part(), 0
        self.held = self.kept

    def helper(self):
        return self.count + self.part.other()

    def kept(self):
        return self.secret

    @staticmethod
    def plain(x):
        return x.dtype


class Loss(Base):
    def helper(self):
        self.seen = 1
        return super().helper()

    def forward(self):
        return self.helper() + self.part() + self.model() + self.held() + self.plain(self.x)


def test_reading():
    wanted = "helper part part.forward part.width part.other part.depth model count held secret"
    assert Reads(Loss.forward, Loss(), ("model",)).names == {*wanted.split(), "plain", "x"}
