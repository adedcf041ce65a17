"""The drop-in losses of `contrastive_kernels.integrations` against those they stand in for."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..baselines import dense, search
from ..baselines.baseline import Baseline, Loss
from ..baselines.loading import Lazy
from . import oracle
from .case import Case
from .inputs import (
    Inputs,
    Sizes,
    image_text,
    image_text_bias,
    labelled,
    of_sizes,
    pairs,
    queue,
    token_sets,
)
from .oracle import Tensors

# build(module with the classes): a loss of them, called with the tensors by name
Build = Callable[[ModuleType], Loss]


def swap(
    name: str,
    integration: str,
    module: str,
    distribution: str,
    build: Build,
    inputs: Inputs,
    sizes: Sizes,
    at_most: float | None,
    frozen: tuple[str, ...] = (),
) -> Case:
    """The same class out of an integration and out of the package's `module`.

    The oracle is the package's class in float64.
    """
    ours = Lazy(f"contrastive_kernels.integrations.{integration}", build)
    theirs = Lazy(module, build)
    baseline = Baseline(f"{integration}'s own", theirs.load, distribution, at_most=at_most)
    return Case(
        f"{integration}.{name}",
        "swap",
        ours,
        sizes,
        inputs,
        oracle.whole(theirs),
        {},
        (baseline,),
        frozen=frozen,
        memory=True,
    )


def lightly(name: str, at_most: float) -> Case:
    return swap(
        name, "lightly", "lightly.loss", "lightly",
        lambda module: getattr(module, name)(temperature=0.1),
        pairs("out0", "out1"), Sizes(4096, 4096), at_most,
    )  # fmt: skip


def open_clip(name: str, inputs: Inputs, at_most: float) -> Case:
    return swap(
        name, "open_clip", "open_clip.loss", "open_clip_torch",
        lambda module: getattr(module, name)(), inputs, Sizes(4096, 4096), at_most,
    )  # fmt: skip


def unit(inputs: Inputs) -> Inputs:
    """Features of length 1, for losses that do not normalise them."""

    def make(sizes: Sizes, generator: torch.Generator) -> Tensors:
        tensors = inputs.make(sizes, generator)
        return {n: F.normalize(t, dim=1) if t.dim() > 1 else t for n, t in tensors.items()}

    return inputs._replace(make=make)


def info_nce(module: ModuleType) -> Loss:
    loss = module.InfoNCE(temperature=0.1)

    def call(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
        return loss(query, key, negatives)

    return call


def sup_con(module: ModuleType) -> Loss:
    loss = module.SupConLoss(temperature=0.1)

    def call(features: Tensor, labels: Tensor) -> Tensor:
        return loss(features, labels)

    return call


@of_sizes("nd")
def pairs_of_labels(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """n features of m labels each."""
    tensors = pairs("first", "second")(sizes, generator)
    labels = torch.arange(sizes.n).repeat(2)
    return {"embeddings": torch.cat(list(tensors.values())), "labels": labels}


def nt_xent(module: ModuleType) -> Loss:
    return module.NTXentLoss(temperature=0.1)


def dense_nt_xent(embeddings: Tensor, labels: Tensor) -> Tensor:
    return dense.nt_xent(*embeddings.chunk(2), temperature=0.1)


def ranking(**options) -> Build:
    def build(module: ModuleType) -> Loss:
        loss = module.MultipleNegativesRankingLoss(None, **options)

        def call(anchor: Tensor, positive: Tensor) -> Tensor:
            return loss.compute_loss_from_embeddings([anchor, positive], None)

        return call

    return build


def nested(module: ModuleType) -> Loss:
    """MatryoshkaLoss around a model that takes embeddings for texts."""

    class Embeddings(nn.Module):
        def get_embedding_dimension(self) -> None: ...  # of any number of features

        get_sentence_embedding_dimension = get_embedding_dimension

        def forward(self, features: Tensors) -> Tensors:
            return {"sentence_embedding": features["text"]}

    model = Embeddings()
    ranking = module.MultipleNegativesRankingLoss(model)
    loss = module.MatryoshkaLoss(model, ranking, [768, 512, 256, 128, 64])
    return lambda anchor, positive: loss([{"text": anchor}, {"text": positive}], None)


def guided(module: ModuleType) -> Loss:
    """GISTEmbedLoss around models that take embeddings for texts."""
    tokenizers = importlib.import_module("tokenizers")
    fast = importlib.import_module("transformers").PreTrainedTokenizerFast
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0}))

    class Embeddings(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.max_seq_length = name, 8
            self.tokenizer = fast(tokenizer_object=words)

        def forward(self, features: Tensors) -> Tensors:
            return {"sentence_embedding": features[self.name]}

    loss = module.GISTEmbedLoss(Embeddings("model"), Embeddings("guide"))

    def call(
        anchor: Tensor, positive: Tensor, anchor_guide: Tensor, positive_guide: Tensor
    ) -> Tensor:
        columns = ((anchor, anchor_guide), (positive, positive_guide))
        return loss([{"model": own, "guide": guide} for own, guide in columns], None)

    return call


@of_sizes("nd")
def with_guide(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """Loosely related pairs (cosine 0.24), and what a guide makes of the same texts: every anchor
    comes twice, with a near and with a far positive; others are far from the limit, where rounding
    would decide."""

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, sizes.d, generator=generator)

    anchor = noise(sizes.n // 2).repeat(2, 1)
    anchor = anchor + 0.1 * noise(sizes.n)
    far = torch.arange(sizes.n)[:, None] < sizes.n // 2
    positive = anchor + torch.where(far, 1.7, 0.5) * noise(sizes.n)
    own = noise(sizes.n)
    return {
        "anchor": own,
        "positive": own + 4 * noise(sizes.n),
        "anchor_guide": anchor,
        "positive_guide": positive,
    }


@of_sizes("nmd")
def texts(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """Embeddings of n queries, each near to that of its answer, the same number of the corpus."""
    corpus = F.normalize(torch.randn(sizes.m, sizes.d, generator=generator), dim=1)
    noise = F.normalize(torch.randn(sizes.n, sizes.d, generator=generator), dim=1)
    return {"queries": F.normalize(corpus[: sizes.n] + noise, dim=1), "corpus": corpus}


MINED = 5  # of each query


def mining(module: ModuleType) -> Loss:
    """mine_hard_negatives with a model that has the embeddings of its texts: the scores of answers
    and of what is mined, the nearest first."""
    datasets = importlib.import_module("datasets")
    util = importlib.import_module("sentence_transformers.util")

    class Model:
        device = torch.device("cpu")
        similarity = staticmethod(util.cos_sim)
        similarity_pairwise = staticmethod(util.pairwise_cos_sim)

        def __init__(self, **embeddings: Tensor) -> None:
            self.embeddings = {name: t.numpy() for name, t in embeddings.items()}

        def encode_query(self, texts: list[str], **_) -> Tensor:
            return self.embeddings["queries"][[int(text[1:]) for text in texts]]

        def encode_document(self, texts: list[str], **_) -> Tensor:
            return self.embeddings["corpus"][[int(text[1:]) for text in texts]]

    def call(queries: Tensor, corpus: Tensor) -> Tensor:
        answers = [f"a{i}" for i in range(len(corpus))]
        given = {"query": [f"q{i}" for i in range(len(queries))], "answer": answers[: len(queries)]}
        found = module.mine_hard_negatives(
            datasets.Dataset.from_dict(given), Model(queries=queries, corpus=corpus),
            corpus=answers, relative_margin=0.05, num_negatives=MINED, output_format="n-tuple",
            output_scores=True, verbose=False,
        )  # fmt: skip
        return torch.tensor(found["scores"][:])

    return call


def mined(queries: Tensor, corpus: Tensor) -> Tensor:
    return search.exact(queries, corpus, k=1 + MINED)  # an answer is nearer than all others


def multi_vector(module: ModuleType) -> Loss:
    """The ranking loss of multi-vector encoders, around one that takes token embeddings."""

    class Tokens(nn.Module):
        def forward(self, features: Tensors, task: str | None = None) -> Tensors:
            return features

    loss = module.MultiVectorMultipleNegativesRankingLoss(Tokens())

    def call(queries: Tensor, documents: Tensor) -> Tensor:
        columns = [queries, *documents.unbind(1)]
        texts = [
            {"token_embeddings": t, "attention_mask": torch.ones(t.shape[:2], dtype=torch.long)}
            for t in columns
        ]
        return loss(texts)

    return call


RETRIEVAL = ("sentence_transformers", "sentence_transformers.sentence_transformer.losses",
             "sentence-transformers")  # fmt: skip
METRIC = ("pytorch_metric_learning", "pytorch_metric_learning.losses", "pytorch-metric-learning")
PAIRED = pairs("anchor", "positive")

CASES = (
    lightly("NTXentLoss", 1 / 3),
    lightly("DCLLoss", 1 / 3),
    open_clip("ClipLoss", unit(image_text), 1 / 4),
    open_clip("SigLipLoss", unit(image_text_bias), 1.0),
    swap("MultipleNegativesRankingLoss", *RETRIEVAL, ranking(), PAIRED, Sizes(4096, 4096), 1 / 3),
    swap(
        "MultipleNegativesRankingLoss, 4 directions", *RETRIEVAL,
        ranking(directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")),
        PAIRED, Sizes(4096, 4096), 1 / 3,
    ),
    swap(
        "MatryoshkaLoss", *RETRIEVAL, nested, PAIRED, Sizes(2048, 2048, 768), 0.35,
    ),
    swap(
        "GISTEmbedLoss", *RETRIEVAL, guided, with_guide, Sizes(1024, 1024), 1 / 50,
        frozen=("anchor_guide", "positive_guide"),
    ),
    replace(
        swap(
            "mine_hard_negatives", "sentence_transformers", "sentence_transformers.util",
            "sentence-transformers", mining, texts, Sizes(10_000, 100_000), 0.6,
        ),
        passes="forward",
        oracle=oracle.result(mined),
    ),
    swap(
        "MultiVectorMultipleNegativesRankingLoss", "sentence_transformers",
        "sentence_transformers.multi_vector_encoder.losses", "sentence-transformers",
        multi_vector, token_sets, Sizes(32, 64, k=2), 0.35,
    ),
    swap("SupConLoss", *METRIC, sup_con, labelled, Sizes(4096, 4096), 1 / 10),
    replace(
        swap("NTXentLoss", *METRIC, nt_xent, pairs_of_labels, Sizes(4096, 8192), None),
        oracle=oracle.whole(dense_nt_xent),
    ),
    swap(
        "InfoNCE", "info_nce", "info_nce", "info-nce-pytorch", info_nce, queue,
        Sizes(1024, 65536), 1.0, frozen=("negatives",),
    ),
)  # fmt: skip
