"""The demo: its parts, and one short run from end to end."""

import importlib

import numpy as np
import pytest
import torch
from sklearn.manifold import TSNE

import contrastive_kernels as ck
from contrastive_kernels import demo, reference
from contrastive_kernels.demo import evaluate, measure, processes, report, train
from contrastive_kernels.demo.data import IMAGES, Augmentation, ImageSet, Warp


@pytest.fixture(scope="module")
def images() -> dict[str, ImageSet]:
    return {name: make(seed=0) for name, make in IMAGES.items()}


@pytest.mark.parametrize("name", IMAGES)
def test_views_are_random_but_seeded(images, name):
    chosen = images[name]
    first, again, other = (
        chosen.view(chosen.train[:32], torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (32, 1, chosen.side, chosen.side)
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.05
    assert chosen.plain(chosen.test).shape == chosen.moved_test(0).shape
    assert (chosen.plain(chosen.test) - chosen.moved_test(0)).abs().mean() > 0.05


@pytest.mark.parametrize("name", IMAGES)
def test_no_test_image_is_trained_on(images, name):
    chosen = images[name]
    distance = torch.cdist(chosen.test.flatten(1), chosen.train.flatten(1))
    assert distance.min() > 1e-3
    assert len(chosen.train) == len(chosen.train_labels)
    assert len(chosen.test) == len(chosen.test_labels)
    assert set(chosen.test_labels) == set(chosen.train_labels)


def test_a_warp_that_does_nothing_gives_the_middle():
    pixels = torch.rand(5, 1, 12, 12)
    still = Augmentation(Warp(degrees=0, scale=0, shift=0), erase=0, noise=0)
    chosen = ImageSet("still", 8, pixels, None, pixels, None, still, still.warp)
    torch.testing.assert_close(chosen.view(pixels, torch.Generator()), chosen.plain(pixels))


@pytest.mark.parametrize("loss", train.METHODS)
def test_fused_and_dense_train_alike(images, loss):
    curves = [
        train.train(
            images["digits"], train.METHODS[loss], losses, steps=3, seed=1, on_step=lambda: None
        )[1]
        for losses in (ck, reference)
    ]
    assert len(curves[0]) == 3
    np.testing.assert_allclose(*curves, atol=1e-4)
    # The steps really moved the weights: no two losses are equal.
    assert len(set(curves[0])) == 3


def test_accuracy_of_separable_and_of_shuffled_labels():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    pixels = torch.from_numpy(np.eye(4)[labels]).float().repeat_interleave(4, 1)
    pixels = (pixels + 0.1 * torch.rand(400, 16)).view(400, 1, 4, 4)
    still = Warp(degrees=0, scale=0, shift=0)
    chosen = ImageSet("squares", 4, pixels, labels, pixels, labels, None, still)
    assert evaluate.evaluate(None, chosen, seed=0) == (1, 1, 1, 1)
    shuffled = chosen._replace(test_labels=rng.permutation(labels))
    assert max(evaluate.evaluate(None, shuffled, seed=0)) < 0.4


def test_peak_of_the_dense_loss_holds_the_matrix():
    matrix = 4 * 2048**2
    costs = measure.measure(measure.Case("nt_xent", images=1024, dim=16)).costs
    assert matrix < costs["dense"].peak < 20 * matrix
    if ck.backends()["cpu"].usable:
        assert costs["fused"].peak < matrix
    assert all(cost.seconds > 0 for cost in costs.values())


def test_many_negatives_match_a_plain_loop():
    result = measure.million(20_000)
    assert result.loss == pytest.approx(result.expected, rel=1e-5)


def test_a_failing_task_raises_here():
    with pytest.raises(ValueError, match="invalid literal"):
        processes.side_by_side(int, [("no number",), ("1",)], lambda done: None)


def test_demo_from_end_to_end(monkeypatch, capsys, tmp_path):
    run = importlib.import_module("contrastive_kernels.demo.run")
    some = {name: train.METHODS[name] for name in ("nt_xent", "eqco")}
    monkeypatch.setattr(run, "METHODS", some)
    # of as few rounds as it takes
    monkeypatch.setattr(report, "TSNE", lambda **options: TSNE(**options | {"max_iter": 250}))
    assert demo.main(["--quick", "--steps", "1", "--output", str(tmp_path / "new")]) == 0
    path = tmp_path / "new" / "demo.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    for text in ("raw pixels", "untrained encoder", *some):
        assert any(line.startswith(f"  {text} ") for line in lines)
    assert lines[-1].startswith("Shown in") and lines[-1].endswith(str(path))


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "sklearn" else object())
    assert demo.main([]) == 1
    captured = capsys.readouterr()
    assert captured.err.strip().endswith("pip install scikit-learn")
    assert captured.out == ""


def test_interrupt_ends_cleanly(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = importlib.import_module("contrastive_kernels.demo.run")

    def interrupted(*options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert demo.main([]) == 130
    assert capsys.readouterr().err.strip() == "stopped"


def test_steps_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0"])
    assert "must be an integer > 0, got 0" in capsys.readouterr().err


def test_output_must_be_a_folder(capsys, tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(SystemExit):
        demo.main(["--output", str(path)])
    assert "--output: must be a folder that can be written" in capsys.readouterr().err
