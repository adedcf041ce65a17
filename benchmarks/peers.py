"""Losses of other packages behind the signatures of `contrastive_kernels`; all are optional, and a
peer that cannot run says why."""

import importlib
import importlib.metadata
import importlib.util
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[..., Tensor]


class PeerUnavailable(Exception):
    """Why a peer cannot run here."""


@dataclass(frozen=True)
class Peer:
    """A rival: its name in the tables and how to get its loss.

    Attributes:
        load: returns the loss, called with the tensors and options of the case; raises
            PeerUnavailable with the reason.
        distribution: the installed package that its version is read from.
        compiles: whether its first call takes many seconds.
    """

    name: str
    load: Callable[[], Loss]
    distribution: str = "torch"
    compiles: bool = False

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


class Lazy:
    """A loss that is imported when it is first called, or by `load`.

    Raises:
        PeerUnavailable: then, if it cannot be imported.
    """

    def __init__(self, module: str, build: Callable[[types.ModuleType], Loss]) -> None:
        self._module, self._build = module, build
        self._loss: Loss | None = None

    def load(self) -> "Lazy":
        if self._loss is None:
            declare_torchvision()
            try:
                self._loss = self._build(importlib.import_module(self._module))
            except ImportError as error:
                raise PeerUnavailable(str(error)) from error
        return self

    def __call__(self, **tensors: Tensor) -> Tensor:
        return self.load()._loss(**tensors)


def dense(loss: Loss) -> Peer:
    """The dense eager baseline."""
    return Peer("dense eager torch", lambda: loss)


def compiled(loss: Loss) -> Peer:
    """torch.compile of the dense baseline."""
    return Peer("torch.compile of dense", lambda: torch.compile(loss, dynamic=False), compiles=True)


def chunked(loss: Loss) -> Peer:
    """A loss of chunked.py."""
    return Peer("chunks, checkpointed", lambda: loss)


def published(loss: Loss) -> Peer:
    """The procedure as public code writes it."""
    return Peer("loop over the groups, as published", lambda: loss)


def batched(loss: Loss) -> Peer:
    """The same in as few calls as torch offers."""
    return Peer("batched eager torch", lambda: loss)


def missing(distribution: str) -> PeerUnavailable:
    return PeerUnavailable(f"not installed: pip install {distribution}")


# Operators stay declared only as long as their library is referred to.
_declared: list[torch.library.Library] = []


def declare_torchvision() -> None:
    """Lets a torchvision be imported whose compiled operators this build of torch cannot load, as a
    CPU build of torch beside torchvision's release: its Python part wants them declared."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


def load_class(distribution: str, module: str, name: str) -> type:
    """`name` out of `module`.

    Raises:
        PeerUnavailable: the package is not installed, or cannot be imported.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise missing(distribution)
    declare_torchvision()
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise PeerUnavailable(f"{distribution} {module} cannot be imported: {error}") from error


def _linear_cross_entropy(**chunking: int) -> Callable[[], Loss]:
    def load() -> Loss:
        options = getattr(nn, "LinearCrossEntropyOptions", None)
        if options is None or not hasattr(F, "linear_cross_entropy"):
            raise PeerUnavailable("torch >= 2.13 is needed for chunked F.linear_cross_entropy")

        def info_nce(query: Tensor, key: Tensor, *, temperature: float) -> Tensor:
            query, key = F.normalize(query, dim=1) / temperature, F.normalize(key, dim=1)
            target = torch.arange(len(query), device=query.device)
            return F.linear_cross_entropy(query, key, target, options=options(**chunking))

        return info_nce

    return load


def _open_clip_loss() -> Callable[[Tensor, Tensor, float | Tensor], Tensor]:
    clip = load_class("open_clip_torch", "open_clip.loss", "ClipLoss")()
    return lambda a, b, scale: clip(F.normalize(a, dim=1), F.normalize(b, dim=1), scale)


def _open_clip() -> Loss:
    clip = _open_clip_loss()

    def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        return clip(image_features, text_features, logit_scale)

    return clip_loss


def _open_clip_symmetric() -> Loss:
    clip = _open_clip_loss()

    def info_nce(query: Tensor, key: Tensor, *, temperature: float, symmetric: bool) -> Tensor:
        if not symmetric:
            raise ValueError("symmetric must be True: ClipLoss has both directions, got False")
        return clip(query, key, 1 / temperature)

    return info_nce


def _lightly() -> Loss:
    loss_class = load_class("lightly", "lightly.loss", "NTXentLoss")

    def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
        return loss_class(temperature=temperature)(z1, z2)

    return nt_xent


def _pytorch_metric_learning() -> Loss:
    loss_class = load_class(
        "pytorch-metric-learning", "pytorch_metric_learning.losses", "SupConLoss"
    )

    def sup_con(features: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
        return loss_class(temperature=temperature)(features, labels)

    return sup_con


def _info_nce_pytorch() -> Loss:
    loss_class = load_class("info-nce-pytorch", "info_nce", "InfoNCE")

    def info_nce(
        query: Tensor, key: Tensor, *, negatives: Tensor | None = None, temperature: float
    ) -> Tensor:
        return loss_class(temperature=temperature)(query, key, negatives)

    return info_nce


def _sentence_transformers() -> Loss:
    loss_class = load_class(
        "sentence-transformers",
        "sentence_transformers.sentence_transformer.losses",
        "MultipleNegativesRankingLoss",
    )

    def info_nce(query: Tensor, key: Tensor, *, temperature: float) -> Tensor:
        loss = loss_class(None, scale=1 / temperature)
        return loss.compute_loss_from_embeddings([query, key], None)

    return info_nce


LINEAR_CROSS_ENTROPY = Peer("F.linear_cross_entropy, automatic chunks", _linear_cross_entropy())
LINEAR_CROSS_ENTROPY_512 = Peer(
    "F.linear_cross_entropy, chunks of 512 rows", _linear_cross_entropy(batch_chunk_size=512)
)
OPEN_CLIP = Peer("open_clip ClipLoss", _open_clip, "open_clip_torch")
OPEN_CLIP_SYMMETRIC = Peer("open_clip ClipLoss", _open_clip_symmetric, "open_clip_torch")
LIGHTLY = Peer("lightly NTXentLoss", _lightly, "lightly")
PYTORCH_METRIC_LEARNING = Peer(
    "pytorch-metric-learning SupConLoss", _pytorch_metric_learning, "pytorch-metric-learning"
)
INFO_NCE_PYTORCH = Peer("info-nce-pytorch InfoNCE", _info_nce_pytorch, "info-nce-pytorch")
SENTENCE_TRANSFORMERS = Peer(
    "sentence-transformers MultipleNegativesRankingLoss",
    _sentence_transformers,
    "sentence-transformers",
)
