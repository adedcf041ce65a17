"""sentence-transformers' mine_hard_negatives with its search fused, against its own."""

from __future__ import annotations

import random

import pytest
import torch
from oracles import randn

pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
from sentence_transformers import util  # noqa: E402

from contrastive_kernels import patch_status, patched  # noqa: E402
from contrastive_kernels.integrations import _mining  # noqa: E402
from contrastive_kernels.integrations import sentence_transformers as fused  # noqa: E402

N, CORPUS, DIM = 30, 80, 8
PAIRS = {"query": [f"q{i // 2}" for i in range(N)], "answer": [f"a{i}" for i in range(N)]}
TEXTS = [f"a{i}" for i in range(CORPUS)]


class Model:
    """Embeddings of texts by their numbers, near to those of their queries."""

    device = torch.device("cpu")

    def __init__(self, similarity=util.cos_sim, pairwise=util.pairwise_cos_sim) -> None:
        self.similarity, self.similarity_pairwise = similarity, pairwise
        queries = randn(N // 2, DIM, dtype=torch.float32)
        answers = randn(CORPUS, DIM, seed=1, dtype=torch.float32)
        answers[:N] = 0.7 * answers[:N] + queries.repeat_interleave(2, 0)
        self.embeddings = {f"q{i}": v for i, v in enumerate(queries)}
        self.embeddings |= {f"a{i}": v for i, v in enumerate(answers)}

    def encode(self, texts, *, normalize_embeddings=False, convert_to_numpy=True, **_):
        rows = torch.stack([self.embeddings[text] for text in texts])
        rows = torch.nn.functional.normalize(rows) if normalize_embeddings else rows
        return rows.numpy() if convert_to_numpy else rows

    encode_document = encode_query = encode


def mined(model=None, **options):
    random.seed(0)
    out = util.mine_hard_negatives(
        datasets.Dataset.from_dict(PAIRS), model or Model(), corpus=TEXTS, verbose=False, **options
    )
    return out.to_dict()


def status():
    return patch_status()["sentence_transformers"]["mine_hard_negatives"]


OPTIONS = {
    "defaults": {},
    "margins": {"relative_margin": 0.05, "absolute_margin": 0.01, "output_format": "n-tuple"},
    "scores": {"max_score": 0.8, "min_score": 0.0, "num_negatives": 4, "range_min": 2},
    "drawn": {"sampling_strategy": "random", "range_max": 20, "range_min": 3},
    "positives too": {"include_positives": True, "output_format": "labeled-list"},
    "small batches": {"faiss_batch_size": 4, "output_format": "labeled-pair"},
    "more than the corpus": {"range_max": 200, "num_negatives": 70, "max_score": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dot", [False, True], ids=["cos_sim", "dot_score"])
def test_the_same_data_set(dot, options):
    functions = (util.dot_score, util.pairwise_dot_score) if dot else ()
    wanted = mined(Model(*functions), **options)
    scored = mined(Model(*functions), **options, output_scores=True)
    before = status().fused
    with patched("sentence_transformers", "mine_hard_negatives"):
        found = mined(Model(*functions), **options)
        found_scored = mined(Model(*functions), **options, output_scores=True)
    assert status().fused == before + 2
    assert found == wanted and len(next(iter(found.values()))) > 0
    for name, column in scored.items():
        if name not in ("score", "scores"):
            assert found_scored[name] == column
            continue
        flat = [torch.tensor(c, dtype=torch.float64).flatten() if name == "score" else
                torch.cat([torch.tensor(row, dtype=torch.float64) for row in c])
                for c in (found_scored[name], column)]  # fmt: skip
        torch.testing.assert_close(*flat, rtol=1e-5, atol=1e-6)


def test_every_name_of_the_package_is_patched(recwarn):
    import sentence_transformers

    home = util.hard_negatives
    places = (sentence_transformers, util, home)
    before = {place.mine_hard_negatives for place in places}
    with patched("sentence_transformers", "mine_hard_negatives"):
        assert {place.mine_hard_negatives for place in places} == {fused.mine_hard_negatives}
        assert status().unreached == ()
    assert before == {place.mine_hard_negatives for place in places}
    assert len(before) == 1 and not recwarn


def test_no_matrix_is_made(monkeypatch):
    def fail(*_):
        raise AssertionError("the whole matrix")

    monkeypatch.setattr(_mining.Similarities, "_whole", fail)
    assert fused.mine_hard_negatives(
        datasets.Dataset.from_dict(PAIRS), Model(), corpus=TEXTS, verbose=False
    )


def test_what_else_is_done_with_similarities():
    """Other versions may look at them in another way."""
    queries, corpus = randn(3, 4, dtype=torch.float32), randn(9, 4, seed=1, dtype=torch.float32)
    lazy = _mining.Scoring(Model(), True).similarity(queries, corpus)
    whole = util.cos_sim(queries, corpus)
    assert lazy.shape == whole.shape and torch.equal(lazy.to("cpu").argmax(1), whole.argmax(1))
    assert torch.equal(torch.add(lazy, other=lazy), 2 * whole)
    for options in ({"k": 2, "dim": 1}, {"k": 2, "dim": 0}, {"k": 2, "dim": 1, "largest": False}):
        found, wanted = torch.topk(lazy, **options), torch.topk(whole, **options)
        assert torch.equal(found.indices, wanted.indices)
        torch.testing.assert_close(found.values, wanted.values)


@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_another_similarity_runs_unfused():
    model = Model(lambda a, b: -torch.cdist(torch.as_tensor(a), torch.as_tensor(b)))
    wanted = mined(model)
    with patched("sentence_transformers", "mine_hard_negatives"):
        assert mined(model) == wanted
    reason = "the model's similarity is neither cos_sim nor dot_score"
    assert status().fallback[reason] == 1
