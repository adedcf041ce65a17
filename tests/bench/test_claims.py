"""The papers' claims: images, trainings, the rule of verdicts, resuming, and the page."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import randn

from benchmarks.claims import __main__ as command
from benchmarks.claims import cacr, data, draw, eqco, infomin, plan, probe, report, run, train, wmse
from benchmarks.claims.part import Study
from benchmarks.claims.verdict import (
    NOT,
    OPEN,
    PART,
    SEEN,
    Claim,
    Condition,
    interval,
    mean,
    minus,
)
from contrastive_kernels.demo.data import PATCH, PHOTOGRAPHS

TINY = {
    "eqco": {"counts": [4, 2048], "simo": [4], "seeds": 2, "steps": 2, "queue": 2048, "draws": 2},
    "cacr": {"steps": 2, "weights": 20, "negatives": [4, 8, 16]},
    "infomin": {"steps": 2, "batches": 1, "probe": [200, 100]},
    "wmse": {"views": 1024, "batches": [64, 256], "groups": [64, 128], "sample": 100},
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def settings(name: str) -> dict:
    return plan.PARTS[name].quick | TINY[name]


# The rule


def series(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_interval_is_students():
    got = interval([0.01, 0.03, 0.02, 0.04, 0.05])
    half = 2.7764451 * math.sqrt(0.00025 / 5)  # the 97.5 % point of t with 4 degrees of freedom
    assert got.mean == pytest.approx(0.03) and got.seeds == 5
    assert got.low == pytest.approx(0.03 - half) and got.high == pytest.approx(0.03 + half)
    assert interval([0.1]) is None


@pytest.mark.parametrize(
    ("differences", "bounds", "holds"),
    [
        (series(0.02, 0.03, 0.025), {}, True),
        (series(-0.02, 0.03, 0.025), {}, False),
        (series(-0.005, -0.004, -0.006), {}, False),
        (series(-0.005, -0.004, -0.006), {"least": -0.01}, True),
        (series(-0.02, 0.02, 0.0), {"least": -0.01}, False),
        (series(0.001, 0.0, -0.001), {"least": -0.01, "most": 0.01}, True),
        (series(0.021, 0.02, 0.022), {"least": -0.01, "most": 0.01}, False),
        (series(0.02), {}, None),
        ({}, {}, None),
    ],
)
def test_a_condition(differences, bounds, holds):
    assert Condition("x", differences, **bounds).holds() is holds


@pytest.mark.parametrize(
    ("signs", "verdict"), [("++", SEEN), ("+-", PART), ("--", NOT), ("+?", OPEN), ("", OPEN)]
)
def test_every_verdict_is_reached(signs, verdict):
    made = {"+": series(1, 2, 1.5), "-": series(-1, -2, -1.5), "?": {}}
    assert Claim("c", "p", [Condition(s, made[s]) for s in signs]).verdict() == verdict


def test_differences_are_paired_by_seed():
    assert minus({0: 3.0, 1: 5.0, 7: 1.0}, {1: 4.0, 0: 1.0, 9: 2.0}) == {0: 2.0, 1: 1.0}
    assert mean({0: 1.0, 1: 3.0}, {1: 5.0}) == {1: 4.0}


def test_the_best_option_is_that_of_the_highest_mean():
    study = Study(
        [{"rate": r, "seed": s, "x": x} for r, s, x in [(1, 0, 3), (1, 1, 0), (2, 0, 2), (2, 1, 2)]]
    )
    assert study.best("x", "rate", [1, 2]) == 2
    assert Study([]).best("x", "rate", [1, 2]) == 1


# Images


def test_long_tail():
    assert data.sizes(1100, 11, 1) == [100] * 11
    counts = data.sizes(1100, 11, 100)
    assert sum(counts) == 1100 and counts == sorted(counts, reverse=True)
    assert counts[0] / counts[-1] == pytest.approx(100, rel=0.15)
    assert counts[3] / counts[6] == pytest.approx(100**0.3, rel=0.1)
    images, labels = data.few(300, 100, seed=3)
    assert images.shape == (300, 1, PATCH, PATCH)
    found = labels.bincount(minlength=len(PHOTOGRAPHS)).sort(descending=True).values
    assert found.tolist() == data.sizes(300, 11, 100)
    assert not torch.equal(labels, data.few(300, 100, seed=4)[1])
    assert torch.equal(images, data.few(300, 100, seed=3)[0])


def test_positions_of_labels():
    left = data.crops("left")
    wanted = torch.arange(len(PHOTOGRAPHS)).repeat(50)
    assert torch.equal(left.labels[left.of(wanted, generator())], wanted)


def test_crops_are_the_windows_with_contrast():
    images = [torch.rand(30, 41), torch.rand(PATCH, 29)]
    images[0][:, :30] = 0.5  # 7 positions in a row that see nothing but grey
    crops = data.Crops(images)
    assert len(crops) == 7 * (18 - 7) + 6
    drawn, labels = crops.draw(200, generator())
    windows = [
        image.unfold(0, PATCH, 1).unfold(1, PATCH, 1).reshape(-1, PATCH, PATCH) for image in images
    ]
    assert set(labels.tolist()) == {0, 1}
    for crop, label in zip(drawn[:, 0], labels, strict=True):
        assert (crop == windows[label]).all((1, 2)).any()
    assert (drawn.std((1, 2, 3)) > 0.02).all()


def test_test_crops_are_balanced_and_from_the_other_side():
    scenes = data.scenes()
    assert set(torch.from_numpy(scenes.test_labels).bincount().tolist()) == {data.TEST}
    left, right = data.crops("left"), data.crops("right")
    assert not set(left.pixels[left.starts[:50]].tolist()) <= set(right.pixels[:50].tolist())


@pytest.mark.parametrize("shared", infomin.SHARED)
def test_views_share_these_factors_and_no_other(shared, monkeypatch):
    composed, drawn = data.Composed("left"), []
    original = data.Composed.images
    monkeypatch.setattr(
        data.Composed, "images", lambda self, scene: drawn.append(scene) or original(self, scene)
    )
    composed.views(shared, 64, 0.0, generator())
    for name in data.FACTORS:
        alike = (getattr(drawn[0], name) == getattr(drawn[1], name)).float().mean()
        assert alike == 1 if name in shared else alike < 0.5


def test_a_digit_is_where_its_place_says():
    composed = data.Composed("right")
    scene = composed.draw(30, generator())
    images = composed.images(scene)
    step = (PATCH - data.DIGIT) // (data.PLACES - 1)
    background = data.DIM * composed.crops.at(scene.background)
    for i, place in enumerate(scene.place.tolist()):
        y, x = place // data.PLACES * step, place % data.PLACES * step
        box = slice(y, y + data.DIGIT), slice(x, x + data.DIGIT)
        digit = composed.digits[scene.digit[i], 0]
        expected = background[i, 0].clone()
        expected[box] = expected[box] * (1 - digit) + digit
        torch.testing.assert_close(images[i, 0], expected)
    assert (composed.labels(scene)["digit"] == composed.classes[scene.digit].numpy()).all()


def test_strength_of_augmentation():
    own = data.scenes().augmentation
    assert data.strength(own, 1.0) == own
    none = data.scenes()._replace(augmentation=data.strength(own, 0.0))
    images = none.test[:4]
    torch.testing.assert_close(
        none.view(images, generator()), none.plain(images), atol=1e-5, rtol=0
    )
    assert data.strength(own, 8.0).warp.scale < 1


# Training and measuring


def test_warm_up_and_cosine():
    rates = [train.factor(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.01
    assert train.curve([1.0, 2.0]) == [1.0, 2.0] and len(train.curve([1.0] * 99)) == train.POINTS


@pytest.mark.parametrize("sgd", [True, False])
def test_fit_minimises(sgd):
    net = torch.nn.Linear(3, 1)
    net.weight.data.fill_(2.0)
    steps = []
    curve = train.fit(
        lambda: net.weight.square().sum(), net, steps=60, rate=0.05, sgd=sgd,
        after=lambda: steps.append(1),
    )  # fmt: skip
    assert curve[-1] < 0.2 * curve[0] and len(steps) == 60


def test_spectrum_and_rank():
    flat = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64, generator=generator()))[0]
    flat = flat - flat.mean(0)
    shares = probe.spectrum(torch.cat([flat, -flat]))
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert probe.effective_rank([0.125] * 8) == pytest.approx(8)
    line = torch.arange(5.0)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    assert probe.effective_rank(probe.spectrum(line)) == pytest.approx(1, abs=1e-6)
    assert probe.effective_rank(probe.spectrum(torch.ones(4, 3))) == pytest.approx(1)


def test_plain_mse_stops_the_gradient_at_one_view_and_counts_all_pairs():
    views = torch.randn(3, 7, 5, dtype=torch.float64, generator=generator(), requires_grad=True)
    loss = wmse.loss_of("MSE", views, 0, generator())
    unit = views / views.norm(dim=2, keepdim=True)
    cosines = [(unit[u] * unit[v]).sum(1).mean() for u, v in ((0, 1), (0, 2), (1, 2))]
    expected = 2 - 2 * sum(cosines) / 3
    torch.testing.assert_close(loss, expected)
    # each view is still once and moves once: half of the gradient without a stop
    got, whole = (torch.autograd.grad(x, views)[0] for x in (loss, expected))
    torch.testing.assert_close(got, whole / 2)


def test_a_step_of_w_mse_without_an_inverse_shrinks_the_covariance():
    views = torch.randn(2, 64, 8, generator=generator())
    views[:, :, 7] = views[:, :, 6]  # features that depend on each other
    with pytest.raises(ValueError, match="positive definite"):
        wmse.ck.w_mse(views, group_size=64)
    assert wmse.loss_of("W-MSE", views, 64, generator()).isfinite()


def test_losses_of_pairs_are_averaged():
    views = torch.randn(3, 9, 6, dtype=torch.float64, generator=generator())
    for name in cacr.RIVALS:
        one = cacr.of_pair(name, 0.5)
        expected = (one(*views[:2]) + one(*views[::2]) + one(*views[1:])) / 3
        torch.testing.assert_close(cacr.of_views(name, views, 0.5), expected)
    with pytest.raises(ValueError, match="name must be one of InfoNCE, debiased, HCL, got NCE"):
        cacr.of_pair("NCE", 0.5)


def test_weights_are_multiples_of_equal_ones():
    views = torch.randn(5, 12, 6, generator=generator())
    found = cacr.weights(views, torch.arange(12) % 3, t_neg=2.0)
    assert len(found["negative_weight"]) == len(found["negative_same"]) == 4 * 11
    pull = torch.tensor(found["positive_weight"]).view(12, 4)
    push = torch.tensor(found["negative_weight"]).view(4, 11)
    torch.testing.assert_close(pull.sum(1), torch.full((12,), 4.0), atol=0.01, rtol=0)
    torch.testing.assert_close(push.sum(1), torch.full((4,), 11.0), atol=0.02, rtol=0)
    near = torch.tensor(found["positive_distance"]).view(12, 4)
    assert (near.argsort(1) == pull.argsort(1)).all()


def small_tasks(name: str) -> list[dict]:
    """One training of each kind, and of each loss."""
    chosen: dict[tuple, dict] = {}
    for task in plan.PARTS[name].tasks(settings(name)):
        key = (task["kind"], task.get("loss"), task.get("choice"), str(task.get("shared", [0])[:1]))
        chosen.setdefault(key, task)
    return list(chosen.values())


@pytest.fixture
def quick_accuracy(monkeypatch):
    """Probes that are not fit; one test fits them."""
    for module in (eqco, cacr, infomin, wmse):
        monkeypatch.setattr(module, "accuracy", lambda net: {"neighbours": 0.5, "probe": 0.4})


@pytest.mark.parametrize("name", plan.PARTS)
def test_each_part_trains(name, quick_accuracy):
    own, part = settings(name), plan.PARTS[name]
    chosen = part.choose(own, Study([]))
    for task in small_tasks(name):
        record = run.timed(name, task, own, chosen)
        json.dumps(record)
        assert part.seconds(task, own) > 0 and record["seconds"] >= 0
        if task["kind"] == "gradient":
            assert {p["loss"] for p in record["pulls"]} == {"InfoNCE", "EqCo"}
            assert all(p["length"] > 0 and 0 <= p["noise"] <= 1.01 for p in record["pulls"])
        elif task["kind"] != "weights" and task.get("shared", [0]):
            assert all(math.isfinite(x) for x in record["curve"])


def test_accuracy_of_an_encoder():
    found = probe.accuracy(train.network(0)[0])
    assert set(found) == {"neighbours", "probe"} and all(0.1 < x < 0.7 for x in found.values())


def test_length_and_noise_of_a_gradient():
    query, positive = (F.normalize(x, dim=1) for x in randn(2, 7, 5))
    draws, tau, alpha = list(randn(4, 9, 5, seed=1)), eqco.TEMPERATURE, 512.0
    got = probe.pull(lambda q, rows: eqco.loss_of("EqCo", q, positive, rows, alpha), query, draws)
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
    length = (square * (1 - noise)).sqrt().item()
    assert got.length == pytest.approx(length, rel=1e-10)
    assert got.noise == pytest.approx(noise.item(), rel=1e-10)


def test_eqco_is_info_nce_at_alpha():
    query, key = torch.randn(2, 5, 8, generator=generator())
    rows = torch.randn(300, 8, generator=generator())
    first, second = (eqco.loss_of(name, query, key, rows, 300.0) for name in eqco.LOSSES)
    assert torch.equal(first, second)


def test_negatives_are_drawn_for_all_queries_or_for_each(quick_accuracy, monkeypatch):
    own, seen = settings("eqco"), []
    monkeypatch.setattr(eqco, "loss_of", lambda name, q, k, rows, a: seen.append(rows) or q.sum(1))
    draw = eqco.Run(0, 2048)
    for apart in (False, True):
        draw.fit("EqCo", 4, 1, 0.1, own, apart=apart)
    shared, each = seen
    assert shared.shape == (4, train.DIM) and each.shape == (eqco.BATCH, 4, train.DIM)
    assert len(each.flatten(0, 1).unique(dim=0)) > 3 * eqco.BATCH


def test_simo_has_no_queue_and_keys_follow(quick_accuracy):
    own = settings("eqco")
    simo = eqco.Run(0, 0)
    assert simo.queue is None
    before = simo.keys_net[0][0].weight.clone()
    simo.fit("SiMo", 4, 2, 0.1, own)
    key, query = simo.keys_net[0][0].weight, simo.net[0][0].weight
    assert 0 < (key - before).norm() < (query - before).norm()


# The run, the plan and the page


def records(name: str, value=lambda task: 0.5) -> dict:
    """A made-up result of a part, complete."""
    own = plan.PARTS[name].full
    made = []
    for task in plan.PARTS[name].tasks(own):
        score = value(task) + 0.001 * (task["seed"] % 5)
        record = task | {"seconds": 60.0}
        record |= dict.fromkeys(("neighbours", "probe", "digit", "place", "background"), score)
        record |= {"rank_embeddings": 20.0, "rank_features": 9.0, "spectrum_embeddings": [0.9, 0.1]}
        if task["kind"] == "gradient":
            record["pulls"] = [
                {"loss": x, "negatives": k, "length": 2.0 if x == "EqCo" else 1 + k / 65536,
                 "noise": 0.1}
                for k in own["counts"] for x in ("InfoNCE", "EqCo")
            ]  # fmt: skip
        if task["kind"] == "weights":
            record["weights"] = cacr.weights(
                torch.randn(5, 12, 6, generator=generator()), torch.arange(12) % 3, 2.0
            )
        made.append(record)
    environment = {"device": "a CPU", "versions": {"torch": "2"}, "commit": "abc"}
    return {
        "part": name, "command": "c", "date": "d", "environment": environment, "settings": own,
        "chosen": {"rate": 0.1}, "records": made,
    }  # fmt: skip


def test_a_run_resumes_and_keeps_each_training(tmp_path, monkeypatch, capsys):
    own, path = settings("wmse") | {"seeds": 1}, tmp_path / "wmse.json"
    seen = []

    def measured(name, task, *rest):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(task)
        return {"neighbours": 0.5, "probe": 0.4}

    monkeypatch.setattr(run, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        run.run("wmse", own, path, "c")
    assert len(json.loads(path.read_text())["records"]) == 3
    monkeypatch.setattr(run, "measure", lambda name, task, *rest: seen.append(task) or {})
    result = run.run("wmse", own, path, "c")
    tasks = plan.PARTS["wmse"].tasks(own)
    assert len(seen) == len(tasks) == len({json.dumps(t, sort_keys=True) for t in seen})
    assert [r["loss"] for r in result["records"]] == [t["loss"] for t in tasks]
    assert "3 of " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="was made with other settings"):
        run.run("wmse", own | {"seeds": 2}, path, "c")


def test_what_is_tuned_is_what_the_others_are_trained_with(monkeypatch):
    def measured(name, task, own, chosen):
        best = task["kind"] == "tuning" and task["rate"] == own["rates"][1]
        return {"neighbours": 0.5 + 0.1 * best, "used": chosen.get("MSE")}

    monkeypatch.setattr(run, "measure", measured)
    own = plan.PARTS["wmse"].full | {"seeds": 1}
    result = run.run("wmse", own, None, "c")
    used = {r["used"] for r in result["records"] if r["kind"] == "training"}
    assert used == {own["rates"][1]}


def test_the_plan_fits_two_hours_of_two_cores(capsys):
    assert command.main(["--plan"]) == 0
    out = capsys.readouterr().out
    assert "within the 180" in out and all(name in out for name in plan.PARTS)
    assert "BEYOND" in plan.lines(["eqco", "wmse"] * 3)[-1]


def few_negatives_hurt(task: dict) -> float:
    return 0.4 if task.get("loss") == "InfoNCE" and task.get("negatives", 65536) < 1000 else 0.5


def test_verdicts_and_page_of_made_up_results(tmp_path):
    found = {"eqco": records("eqco", few_negatives_hurt)} | {
        name: records(name) for name in ("cacr", "infomin", "wmse")
    }
    verdicts = [c.verdict() for c in report.judged(found)["eqco"]]
    assert verdicts == [SEEN, SEEN, SEEN, SEEN, PART, SEEN]
    assert [c.verdict() for c in report.judged(found)["wmse"]] == [PART, NOT, SEEN, PART, SEEN]
    assert {c.verdict() for c in report.judged(found)["cacr"]} == {NOT}
    page = report.text(found)
    assert "Few negatives: `eqco`, which with them is as good" in page
    advice = page.partition("## The claims")[0].splitlines()
    assert sum(line.startswith("- ") for line in advice) == 10
    assert "| 65,536 | InfoNCE |" in page.replace("InfoNCE | 65,536", "65,536 | InfoNCE")
    assert "K = 65,536 less 4 (> 0): +10.0 [+10.0, +10.0]" in page
    assert "**not seen**" in page and "not run." in page and "nan" not in page
    for name, result in found.items():
        files = draw.picture(name, Study(result["records"]), result["settings"], tmp_path)
        assert files[1].read_bytes().startswith(b"\x89PNG")


def test_a_page_without_results_gives_no_advice():
    page = report.text({})
    assert "The answers are not there" in page and "0 seen, 0 in part, 0 not seen" in page
    assert "ms" in page and all(x not in page for x in ("Few negatives:", "**seen**"))


def test_the_page_agrees_with_the_results(monkeypatch, tmp_path, capsys):
    assert report.update(check=True) == 0
    page = tmp_path / "claims.md"
    page.write_text(report.PAGE.read_text().replace("| verdict |", "| opinion |"))
    monkeypatch.setattr(report, "PAGE", page)
    assert command.main(["--check"]) == 1
    assert report.COMMAND in capsys.readouterr().out
    assert command.main(["--report"]) == 0 and command.main(["--check"]) == 0


def test_quick_is_small():
    for name, part in plan.PARTS.items():
        assert set(part.quick) == set(part.full)
        assert len(part.tasks(part.quick)) < len(part.tasks(part.full))
        assert Path(report.FOLDER / f"{name}.json").suffix == ".json"
