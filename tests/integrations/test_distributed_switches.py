"""The switches of other packages for several processes, on gloo: as the peers have them, and what
the gradients are beside those of one process."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import gloo
import pytest
import switch_cases
import torch
import torch.distributed as dist

# they are imported by the processes that are started, and need not be here
MISSING = [p for p in switch_cases.PACKAGES if importlib.util.find_spec(p) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"without {', '.join(MISSING)}"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
    ),
]

WORLDS = (2, 3)
LOCAL_DISTILLATION = "distillation with local_loss over several processes"
WITHOUT_SWITCHES = {
    "lightly.KoLeoLoss.forward",
    "lightly.NNMemoryBankModule.forward",
    "lightly.Whitening2d.forward",
    "lightly.WMSELoss.forward",
    "sentence_transformers.CachedLossDecorator.__call__",
    "sentence_transformers.CachedMultiVectorMultipleNegativesRankingLoss.forward",
    "sentence_transformers.MatryoshkaLoss.forward",
    "sentence_transformers.MultiVectorDistillKLDivLoss.forward",
    "sentence_transformers.MultiVectorMarginMSELoss.forward",
    "sentence_transformers.MultiVectorMultipleNegativesRankingLoss.forward",
    "sentence_transformers.mine_hard_negatives",
}
CASES = switch_cases.cases()
TOLERANCE = 1e-10


@cache
def reports(world: int) -> list[dict]:
    """One start of the processes serves all tests."""
    return gloo.run(world, switch_cases.everything, before=switch_cases.modules)


def assert_equal(got: dict, wanted: dict) -> None:
    """Each tensor of `got` is that of `wanted`."""
    for name, value in got.items():
        error = (value - wanted[name]).abs().max()
        assert error <= TOLERANCE * (1 + wanted[name].abs().max()), (name, value, wanted[name])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_peers_on_every_rank(world, name):
    for report in reports(world):
        results = report["cases"][name]["results"]
        assert_equal(results["ours"], results["peer"])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.package == "open_clip"]
)
def test_exact_is_one_process_whatever_the_switches_say(world, name):
    for report in reports(world):
        case = report["cases"][name]
        assert_equal(case["averaged"]["exact"], case["one process"])


@pytest.mark.parametrize("world", WORLDS)
def test_all_but_distillation_with_local_loss_ran_fused(world):
    for report in reports(world):
        unfused = {label: s.fallback for label, s in report["status"].items() if s.fallback}
        assert unfused == {"open_clip.DistillClipLoss.forward": {LOCAL_DISTILLATION: 2}}
        assert {label for label, s in report["status"].items() if not s.fused} == WITHOUT_SWITCHES


@pytest.mark.parametrize("world", WORLDS)
def test_a_patch_with_exact_gradients(world):
    for report in reports(world):
        assert_equal(**report["patched"])


@pytest.mark.parametrize("world", WORLDS)
def test_exact_gradients_of_uneven_batches(world):
    for report in reports(world):
        assert len(report["uneven"]) == 9
        for both in report["uneven"].values():
            assert_equal(**both)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", switch_cases.OWN_ROWS)
def test_uneven_ranks_count_alike_where_they_report_their_own_rows(world, name):
    for report in reports(world):
        assert_equal(report["own rows"][name]["got"], report["own rows"][name]["wanted"])
    assert reports(world)[1]["own rows"][name]["value"] == 0.0  # a rank without rows


# rows of the table in docs/integrations.md, and the cases that each stands for
TABLE = {
    "open_clip `ClipLoss`: `local_loss=False, gather_with_grad=False`, the defaults": [
        "ClipLoss local_loss=False, gather_with_grad=False"
    ],
    "`local_loss=False, gather_with_grad=True`": [
        "ClipLoss local_loss=False, gather_with_grad=True"
    ],
    "`local_loss=True, gather_with_grad=True`": ["ClipLoss local_loss=True, gather_with_grad=True"],
    "`local_loss=True, gather_with_grad=False`": [
        "ClipLoss local_loss=True, gather_with_grad=False"
    ],
    "open_clip `SigLipLoss`: every `dist_impl`": [n for n in CASES if n.startswith("SigLipLoss")],
    "lightly: `gather_distributed=True`": ["NTXentLoss", "DCLLoss", "DCLLoss, weights"],
    "sentence-transformers, ranking: `gather_across_devices=True`": [
        "Ranking", "Ranking, all directions", "Symmetric ranking", "Cached ranking",
    ],
    "`GISTEmbedLoss`: `gather_across_devices=True`": ["GIST"],
    "`GISTEmbedLoss(contrast_anchors=False)` likewise": ["GIST, documents"],
}  # fmt: skip


def ratio(got: torch.Tensor, wanted: torch.Tensor) -> str:
    """|got| / |wanted|, and their cosine where it is not 1."""
    if not wanted.any():
        return "–"
    text = f"{got.norm() / wanted.norm():.2f}"
    cosine = (got * wanted).sum() / (got.norm() * wanted.norm())
    return text if cosine > 0.9999 else f"{text}, cosine {cosine:.2f}"


def cells(name: str) -> list[str]:
    """The value that is reported; gradients over those of one process, encoder and scale, of the
    peer and exact."""
    found = [[report["cases"][name] for report in reports(world)] for world in WORLDS]
    wanted = [ranks[0]["one process"] for ranks in found]
    same = [
        torch.allclose(case["results"]["ours"]["value"], one["value"])
        for ranks, one in zip(found, wanted, strict=True)
        for case in ranks
    ]
    row = ["all rows" if all(same) else "own rows"]
    for key in ("ours", "exact"):
        for what in ("encoder", "scale"):
            both = [
                ratio(ranks[0]["averaged"][key][what], one[what])
                if key in ranks[0]["averaged"]
                else "–"
                for ranks, one in zip(found, wanted, strict=True)
            ]
            row.append(" / ".join(dict.fromkeys(both)))
    return row


def test_table_of_ratios(capsys):
    """The gradients after DDP's mean, on 2 and on 3 ranks where they differ."""
    docs = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    lines = []
    for title, names in TABLE.items():
        rows = [cells(name) for name in names]
        assert all(row == rows[0] for row in rows), title
        lines.append(f"| {' | '.join((title, *rows[0]))} |")
    with capsys.disabled():
        print("", *lines, sep="\n")
    for line in lines:
        assert line in docs, line
