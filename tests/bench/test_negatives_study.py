"""The study of the number of negatives: its crops, its gradients, a short run, and its page."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import DOUBLE, randn

from benchmarks.claims.data import Crops
from benchmarks.negatives import report, training
from benchmarks.negatives import run as study
from benchmarks.negatives.training import Scenes
from contrastive_kernels.demo.data import PATCH


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return training.scenes()


@pytest.fixture(scope="module")
def start(scenes) -> training.CropRun:
    return training.filled(scenes, seed=0, queue=training.FILL)


def test_crops_are_the_windows_with_contrast():
    images = [torch.rand(30, 41), torch.rand(PATCH, 29)]
    images[0][:, :30] = 0.5  # 7 positions in a row that see nothing but grey
    crops = Crops(images)
    assert len(crops) == 7 * (18 - 7) + 6
    drawn, labels = crops.draw(200, torch.Generator().manual_seed(0))
    windows = [
        image.unfold(0, PATCH, 1).unfold(1, PATCH, 1).reshape(-1, PATCH, PATCH) for image in images
    ]
    assert set(labels.tolist()) == {0, 1}
    for crop, label in zip(drawn[:, 0], labels, strict=True):
        assert (crop == windows[label]).all((1, 2)).any()
    assert (drawn.std((1, 2, 3)) > 0.02).all()


def test_all_trainings_of_a_seed_begin_alike(start):
    runs = [training.begun(start, name, 8) for name in ("InfoNCE", "CACR")]
    assert torch.equal(runs[0].draw(), runs[1].draw())
    runs[0].network[0][0].weight.data.zero_()
    runs[0].queue.enqueue(torch.ones(1, training.DIM))
    assert not torch.equal(runs[0].network[0][0].weight, runs[1].network[0][0].weight)
    assert torch.equal(runs[1].queue.negatives, start.queue.negatives)


def test_the_queue_is_full_of_keys_and_gives_each_once(start):
    assert start.queue.filled == training.FILL
    rows = start.negatives(training.FILL)
    assert len(rows.unique(dim=0)) == len(start.queue.negatives.unique(dim=0))
    assert start.negatives(5).shape == (5, training.DIM)


def test_one_step_fills_the_queue_and_moves_the_key_encoder(start):
    run = training.begun(start, "CACR", 16)
    before = run.queue.negatives.clone()
    curve = training.fit(run, 2, lambda: None)
    changed = (run.queue.negatives != before).any(1).sum()
    assert changed == 2 * training.FRESH and len(curve) == 2
    key, query = run.key_network[0][0].weight, run.network[0][0].weight
    old = start.network[0][0].weight
    assert 0 < (key - old).norm() < (query - old).norm()


def test_eqco_is_info_nce_at_alpha(start):
    query, key = torch.randn(2, 5, 8)
    negatives_rows = torch.randn(int(training.ALPHA), 8)
    values = [
        training.loss_of(name, query, key[None], negatives_rows) for name in ("InfoNCE", "EqCo")
    ]
    assert torch.equal(*values)


def test_unknown_loss():
    with pytest.raises(ValueError, match="name must be one of InfoNCE, EqCo, CACR, got NCE"):
        training.loss_of("NCE", *[torch.ones(1, 1)] * 3)


def test_length_and_noise_of_a_gradient():
    query, positive = (F.normalize(x, dim=1) for x in randn(2, 7, 5))
    draws = list(randn(4, 9, 5, seed=1))
    got = training.pull("EqCo", query, positive[None], draws)
    tau, alpha = training.TEMPERATURE, training.ALPHA
    gradients = []
    for keys in draws:
        unit = F.normalize(keys, dim=1)
        weight = (query @ unit.T / tau).exp() * alpha / len(keys)
        total = weight.sum(1, keepdim=True) + ((query * positive).sum(1) / tau).exp()[:, None]
        gradient = (weight @ unit - weight.sum(1, keepdim=True) * positive) / total / tau
        # the part along the query moves no unit vector
        gradients.append(gradient - (gradient * query).sum(1, keepdim=True) * query)
    stacked = torch.stack(gradients)
    square = stacked.square().sum(2).mean()
    deviation = stacked - stacked.mean(0)
    noise = deviation.square().sum(2).sum(0).mean() / (len(draws) - 1) / square
    assert query.dtype == DOUBLE
    length = (square * (1 - noise)).sqrt().item()
    assert got.length == pytest.approx(length, rel=1e-10)
    assert got.noise == pytest.approx(noise.item(), rel=1e-10)


def quick_run(patch: pytest.MonkeyPatch, scenes: Scenes, path: Path, *more: str) -> int:
    patch.setattr(study, "scenes", lambda: scenes)
    patch.setattr(sys, "argv", ["negatives", "--quick", "--json", str(path), *more])
    threads = torch.get_num_threads()
    try:
        return study.main()
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick(scenes, tmp_path_factory) -> dict:
    """The result of a quick run."""
    path = tmp_path_factory.mktemp("study") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        assert quick_run(patch, scenes, path) == 0
    return json.loads(path.read_text())


def test_a_quick_run_trains_every_loss_with_every_number(quick):
    pairs = [(r["loss"], r["negatives"]) for r in quick["trainings"]]
    assert pairs == [(loss, k) for k in (4, 64) for loss in ("InfoNCE", "EqCo", "CACR")]
    for kind in ("trainings", "gradients", "costs"):
        assert len(quick[kind]) == 6
    assert {r["name"] for r in quick["baselines"]} == {"raw pixels", "untrained", "supervised"}
    assert all(0.1 < r["neighbours"] < 1 for r in quick["trainings"])
    assert all(r["step_ms"] > 0 and r["last_loss"] > 0 for r in quick["trainings"])


def test_plot_and_tables_of_any_result(quick, tmp_path):
    files = report.draw(report.Study(quick), tmp_path / "new" / "plot")
    assert [path.suffix for path in files] == [".svg", ".png"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    text = report.section(quick)
    score = next(r["probe"] for r in quick["baselines"] if r["name"] == "raw pixels")
    assert report.MISSING not in text
    assert "| raw pixels |" in text and f"{100 * score:.1f} ± 0.0" in text


def test_gains_are_paired_by_seed():
    def record(count: int, seed: int, value: float) -> dict:
        return {"loss": "EqCo", "negatives": count, "seed": seed, "probe": value}

    trainings = [record(4, 0, 0.1), record(16, 0, 0.3), record(4, 1, 0.5), record(16, 1, 0.9)]
    study = report.Study({"settings": {}, "trainings": trainings})
    assert study.gains("EqCo", 4, "probe") == pytest.approx([0.2, 0.4])
    assert report.shares([0.2, 0.4], "+") == "+30.0 ± 14.1"


def test_interrupt_keeps_what_was_trained(scenes, monkeypatch, capsys, tmp_path):
    def interrupted(scenes, seed, queue):
        raise KeyboardInterrupt

    path = tmp_path / "result.json"
    monkeypatch.setattr(study, "filled", interrupted)
    assert quick_run(monkeypatch, scenes, path) == 130
    assert capsys.readouterr().err.strip().startswith("stopped")
    result = json.loads(path.read_text())
    assert len(result["costs"]) == 6 and result["trainings"] == []


def test_one_part_is_measured_again(quick, scenes, monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(quick | {"costs": []}))
    assert quick_run(monkeypatch, scenes, path, "--only", "costs") == 0
    result = json.loads(path.read_text())
    assert len(result["costs"]) == 6 and result["trainings"] == quick["trainings"]
    assert "--only costs" in report.section(result)
    with pytest.raises(SystemExit, match="--only needs the result of a whole run"):
        quick_run(monkeypatch, scenes, tmp_path / "absent.json", "--only", "costs")


def test_a_result_that_was_stopped_has_gaps(quick, tmp_path):
    cut = quick | {"gradients": [], "trainings": quick["trainings"][:4]}
    assert re.search(r"\| 64 \| [\d.]+ ± 0\.0 \| – \| – \|", report.section(cut))
    assert report.draw(report.Study(cut), tmp_path / "plot")


def test_the_page_agrees_with_the_results(monkeypatch, capsys, tmp_path):
    assert report.results() and report.update(check=True) == 0
    changed = tmp_path / "negatives.md"
    page = report.PAGE.read_text()
    changed.write_text(page.replace(" ± ", " - ", 3))
    monkeypatch.setattr(report, "PAGE", changed)
    assert report.update(check=True) == 1
    assert "python -m benchmarks.negatives --report" in capsys.readouterr().out
    assert report.update(check=False) == 0
    assert changed.read_text() == page
