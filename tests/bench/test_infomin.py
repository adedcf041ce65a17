"""InfoMin's experiment: photographs without leaks, the colour model, its sign flip, the page."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import DOUBLE, randn

from benchmarks.infomin import photographs, report, run, view_training
from benchmarks.infomin.colour_flow import ColourFlow, flip_sign, views
from benchmarks.infomin.parts import Settings, direction
from benchmarks.infomin.photographs import PATCH, Photographs, below


@pytest.fixture(scope="module")
def grey() -> Photographs:
    return Photographs("grey")


def scrambled(*, volume_preserving: bool) -> ColourFlow:
    """A colour model in float64 that is far from the identity."""
    flow = ColourFlow(volume_preserving=volume_preserving).double()
    for index, parameter in enumerate(flow.parameters()):
        parameter.data = 0.7 * randn(*parameter.shape, seed=index)
    return flow


def covered(positions: torch.Tensor, distance: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Which pixels (P, H, W) the patches at the positions, and those below them, show."""
    corners = torch.zeros(shape)
    corners[torch.cat([positions, below(positions, distance)]).unbind(1)] = 1
    margin = PATCH - 1
    rows = F.max_pool2d(F.pad(corners, (0, 0, margin, 0)), (PATCH, 1), 1)
    return F.max_pool2d(F.pad(rows, (margin, 0, 0, 0)), (1, PATCH), 1) > 0


def test_covered():
    shown = covered(torch.tensor([[1, 2, 3]]), 5, (2, 50, 60))
    expected = torch.zeros_like(shown)
    expected[1, 2 : 7 + PATCH, 3 : 3 + PATCH] = True
    assert torch.equal(shown, expected)


@pytest.mark.parametrize("distance", [0, 7, 192])
def test_no_pixel_is_in_both_splits(grey, distance):
    shape = grey.pixels.shape[:3]
    train, test = (
        covered(grey.pairs(split, distance), distance, shape) for split in ("train", "test")
    )
    assert not (train & test).any()
    assert train.float().mean() > 0.25 and test.float().mean() > 0.1


def test_labelled_patches_lie_in_one_region_and_their_band(grey):
    for split in ("train", "test"):
        grid = grey.grid(split)
        photograph, y, x = grid.positions.numpy().T
        row = photographs.HEIGHT // photographs.ROWS
        first, last = y // row, (y + PATCH - 1) // row
        np.testing.assert_array_equal(first, last)
        np.testing.assert_array_equal(grid.region, photograph * photographs.ROWS + first)
        np.testing.assert_array_equal(grid.photograph, photograph)
        trains = x % photographs.PERIOD < photographs.TRAINING
        assert trains.all() if split == "train" else not trains.any()
    assert set(grey.grid("test").region) <= set(grey.grid("train").region)


def test_patches_are_those_of_the_photograph(grey):
    positions = grey.grid("test").positions[[0, -1]]
    for patch, (photograph, y, x) in zip(grey.patches(positions), positions, strict=True):
        pixels = grey.pixels[photograph, y : y + PATCH, x : x + PATCH, 0]
        torch.testing.assert_close(patch[0], pixels - pixels.mean())
        assert pixels.std() > 0


def test_patches_beyond_a_narrow_photograph_are_left_out(grey):
    wide = photographs._load(photographs.NAMES[0]).shape[1]
    assert wide < grey.pixels.shape[2]
    positions = torch.cat([grey.pairs("train"), grey.pairs("test")])
    assert positions[positions[:, 0] == 0, 2].max() <= wide - PATCH


def test_bad_photograph_options(grey):
    with pytest.raises(ValueError, match="space must be one of rgb, .*, got 'cmyk'"):
        Photographs("cmyk")
    with pytest.raises(ValueError, match='split must be "train" or "test", got \'all\''):
        grey.pairs("all")
    with pytest.raises(ValueError, match=r"distance must be in \[0, 352\], got 353"):
        grey.pairs("train", 353)


@pytest.mark.parametrize("angle", range(8))
def test_direction_of_a_grating(angle):
    down, across = torch.meshgrid(torch.arange(PATCH), torch.arange(PATCH), indexing="ij")
    theta = math.pi * angle / 8
    phase = 0.5 * (across * math.cos(theta) + down * math.sin(theta))
    assert direction(phase.sin()[None, None]).tolist() == [angle]
    assert direction(randn(1, 1, PATCH, PATCH)).tolist() == [-1]


@pytest.mark.parametrize("volume_preserving", [False, True])
def test_the_colour_model_is_inverted(volume_preserving):
    flow, pixels = scrambled(volume_preserving=volume_preserving), randn(3, 3, 5, 7)
    mapped, _ = flow(pixels)
    assert (mapped - pixels).abs().mean() > 0.1
    torch.testing.assert_close(flow.inverse(mapped), pixels, rtol=0, atol=1e-10)


@pytest.mark.parametrize("volume_preserving", [False, True])
def test_log_det_is_that_of_the_jacobian(volume_preserving):
    flow, pixels = scrambled(volume_preserving=volume_preserving), randn(2, 3, 1, 2)
    _, log_det = flow(pixels)
    for n, w in np.ndindex(2, 2):
        pixel = pixels[n, :, 0, w]
        jacobian = torch.autograd.functional.jacobian(
            lambda p: flow(p.view(1, 3, 1, 1))[0].flatten(), pixel
        )
        torch.testing.assert_close(log_det[n, 0, w], torch.linalg.slogdet(jacobian).logabsdet)
    assert (log_det == 0).all() == volume_preserving


def test_a_new_colour_model_is_the_identity():
    pixels = randn(2, 3, 4, 4, dtype=torch.float32)
    mapped, log_det = ColourFlow(volume_preserving=False)(pixels)
    assert torch.equal(mapped, pixels) and (log_det == 0).all()
    with pytest.raises(ValueError, match=r"pixels must have shape \(N, 3, H, W\), got \(2, 2, 4"):
        ColourFlow(volume_preserving=True)(pixels[:, :2])


def gradients(loss, *modules) -> list[list[torch.Tensor]]:
    """The gradient of a loss to the parameters of each module."""
    parts = [list(module.parameters()) for module in modules]
    flat = iter(torch.autograd.grad(loss, sum(parts, [])))
    return [[next(flat) for _ in part] for part in parts]


def test_the_sign_flip_is_minus_to_the_colours_and_plus_to_the_encoders():
    torch.manual_seed(0)
    flow = scrambled(volume_preserving=False)
    encoders = view_training.Encoders(
        *(view_training.encoder(channels).double() for channels in (1, 2))
    )
    both, pixels = torch.nn.ModuleList(encoders), randn(6, 3, 16, 16)
    plain = gradients(encoders.loss(*views(flow(pixels)[0])), flow, both)
    flipped = gradients(view_training.view_loss(flow, encoders, pixels), flow, both)
    assert all(g.abs().max() > 0 for g in plain[0])
    for g, expected in zip(flipped[0], plain[0], strict=True):
        assert torch.equal(g, -expected)
    for g, expected in zip(flipped[1], plain[1], strict=True):
        assert torch.equal(g, expected)


def test_labels_pull_the_colours_with_their_own_sign():
    torch.manual_seed(0)
    flow = scrambled(volume_preserving=True)
    encoders = view_training.Encoders(
        *(view_training.encoder(channels).double() for channels in (1, 2))
    )
    classifiers = torch.nn.ModuleList(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * 256, 4))
        for channels in (1, 2)
    ).double()
    pixels, more, labels = randn(6, 3, 16, 16), randn(5, 3, 16, 16, seed=1), torch.arange(5) % 4

    def cross_entropy() -> torch.Tensor:
        logits = [c(v) for c, v in zip(classifiers, views(flow(more)[0]), strict=True)]
        return sum(F.cross_entropy(each, labels) for each in logits)

    whole = view_training.view_loss(flow, encoders, pixels, classifiers, (more, labels))
    alone = view_training.view_loss(flow, encoders, pixels)
    parts = gradients(alone, flow)[0], gradients(cross_entropy(), flow)[0]
    for got, flipped, labelled in zip(gradients(whole, flow)[0], *parts, strict=True):
        torch.testing.assert_close(got, flipped + labelled)


def test_flip_sign_keeps_the_value():
    x = randn(4, dtype=DOUBLE).requires_grad_()
    assert torch.equal(flip_sign(x), x)


def test_a_probe_leaves_unlabelled_patches_out():
    labels = np.arange(40) % 4
    features = np.eye(4)[labels]
    hidden = np.where(np.arange(40) < 8, -1, labels)
    assert view_training.probe(features, features, hidden, labels) == 1
    wrong = np.where(hidden < 0, -1, (labels + 1) % 4)
    assert view_training.probe(features, features, labels, wrong) == 0


def test_quick_run_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "QUICK", run.QUICK._replace(distances=(8, 32)))
    arguments = ["--quick", "--part", "distance", "--output", str(tmp_path)]
    assert run.main(arguments) == 0
    result = json.loads((tmp_path / "distance.json").read_text())
    records = result["records"]
    assert [record["views"] for record in records] == ["untrained", "8", "32"]
    assert all(0 < record["region"] < 1 for record in records)
    assert records[1]["bound"] < math.log(128)
    assert result["command"].endswith("--quick --part distance --output " + str(tmp_path))
    assert set(result["environment"]["versions"]) >= {"torch", "scikit-image"}
    assert len(capsys.readouterr().out.splitlines()) == 3
    table = report.section(result)
    assert sum(line.startswith(("| 8 ", "| 32 ")) for line in table) == 2


def test_learned_views_are_frozen_and_seeded(grey):
    def learned(seed: int):
        return view_training.learn_views(
            lambda generator: torch.randn(8, 3, 16, 16, generator=generator),
            volume_preserving=False, draw_labelled=None, classes=4, steps=3, seed=seed,
        )  # fmt: skip

    first, again, other = learned(0), learned(0), learned(1)
    pixels = torch.randn(2, 3, 4, 4)
    assert torch.equal(first(pixels)[0], again(pixels)[0])
    assert not torch.equal(first(pixels)[0], other(pixels)[0])
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert not torch.equal(first(pixels)[0], pixels)


def test_interrupt_keeps_finished_seeds(tmp_path, monkeypatch, capsys):
    def stopping(settings: Settings, seed: int):
        yield {"views": "8", "bound": 1.0, "region": 0.5}
        if seed == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "PARTS", {"distance": stopping, "colour": stopping})
    monkeypatch.setattr(run, "QUICK", Settings(seeds=4))
    assert run.main(["--quick", "--output", str(tmp_path)]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["distance.json"]
    result = json.loads((tmp_path / "distance.json").read_text())
    assert [record["seed"] for record in result["records"]] == [0, 1]
    assert result["settings"]["seeds"] == 2
    assert "seeds that were finished are kept" in capsys.readouterr().err


def test_the_page_agrees_with_the_results(monkeypatch, tmp_path, capsys):
    assert run.main(["--check"]) == 0
    page = tmp_path / "infomin.md"
    page.write_text(report.PAGE.read_text().replace("| 32 |", "| 33 |"))
    monkeypatch.setattr(report, "PAGE", page)
    assert run.main(["--check"]) == 1
    assert "disagrees with the results" in capsys.readouterr().out
    assert report.update(check=False) == 0
    assert run.main(["--check"]) == 0


def test_plots_are_drawn_again(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    assert run.main(["--plot"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"infomin_{part}.{kind}" for part in run.PARTS for kind in ("svg", "png")}
