"""bench --base: builds of other commits, workers, and the table of two builds."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import options, run
from benchmarks.base import builds, compare
from benchmarks.cases.inputs import Sizes
from benchmarks.cases.table import CASES

# A package whose info_nce is right and whose nt_xent is not; it has no sup_con.
OTHER = """
from types import SimpleNamespace
import torch.nn.functional as F

__version__ = "0.0.1"

def backends():
    return dict.fromkeys(("cpu", "triton"), SimpleNamespace(reason="made up"))

def info_nce(query, key, *, temperature):
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
    return logits.logsumexp(1).mean() - logits.diagonal().mean()

def nt_xent(z1, z2, *, temperature):
    return info_nce(z1, z2, temperature=temperature)
"""
SETUP = """
import pathlib, sys
print("one\\n" * 40 + "the last line")
with open("log", "a") as log:
    log.write("built ")
sys.exit({status})
"""
git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


def package(folder: Path, text: str) -> Path:
    """A folder with a package of this text."""
    made = folder / "contrastive_kernels"
    made.mkdir(parents=True)
    (made / "__init__.py").write_text(text)
    return folder


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git checkout: `good` builds, `bad` does not."""

    def run_git(*arguments: str) -> None:
        names = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *names, *arguments], cwd=root, check=True, capture_output=True)

    root = package(tmp_path / "checkout", "")
    run_git("init")
    for tag, status in (("good", 0), ("bad", 3)):
        (root / "setup.py").write_text(SETUP.format(status=status))
        run_git("add", ".")
        run_git("commit", "-m", tag)
        run_git("tag", tag)
    monkeypatch.setattr(builds, "ROOT", root)
    monkeypatch.setattr(builds, "FOLDER", root / "build" / "base")
    return root


@git
def test_a_commit_is_built_once(checkout, monkeypatch, capsys):
    build = builds.find("good")
    folder = build.package.parent
    assert folder.parent == checkout / "build" / "base" and folder.name == build.name
    assert (build.package / "__init__.py").exists()
    assert "building" in capsys.readouterr().out
    assert builds.find("good") == build and capsys.readouterr().out == ""
    assert (folder / "log").read_text() == "built "
    monkeypatch.setattr(torch, "__version__", "another")
    assert builds.find("good") == build
    assert (folder / "log").read_text() == "built built "
    shutil.rmtree(folder)
    assert builds.find(build.name) == build
    assert (folder / "log").read_text() == "built "


@git
def test_a_build_that_fails_shows_its_last_lines(checkout):
    for _ in range(2):
        with pytest.raises(builds.Unusable, match="setup.py build_ext") as failed:
            builds.find("bad")
        assert str(failed.value).endswith("one\none\nthe last line")
        assert str(failed.value).splitlines().count("one") == builds.LAST_LINES - 1


@git
def test_what_is_no_commit(checkout, tmp_path, monkeypatch):
    with pytest.raises(builds.Unusable, match="worse is neither a commit nor a folder with con"):
        builds.find("worse")
    monkeypatch.setattr(builds, "ROOT", tmp_path)
    with pytest.raises(builds.Unusable, match="good is no folder .*git checkout has commits"):
        builds.find("good")


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = package(tmp_path / "other", "")
    assert builds.find(str(folder)) == (str(folder), folder / "contrastive_kernels")


def test_the_base_takes_the_place_of_the_baselines(capsys):
    _, cases = options.parse(["--base", "main", "--case", "info_nce", "dcl_small"])
    assert [(case.name, case.baselines) for case in cases] == [("info_nce", ()), ("dcl_small", ())]
    with pytest.raises(SystemExit):
        options.parse(["--base", "main", "--peer", "dense"])
    assert "--peer does not go with it" in capsys.readouterr().err
    parsed, _ = options.parse(["--base", "main"])
    assert run._path(parsed, {"device": "Imaginary CPU"}) is None
    assert "--base main" in run.command_line(parsed)


def test_two_builds_in_turn(short, tmp_path, capfd):
    other, path = package(tmp_path / "other", OTHER), tmp_path / "x.json"
    names = ["info_nce", "nt_xent", "sup_con", "-N", "256", "-D", "16"]
    arguments = ["--base", str(other), "--case", *names, "--threads", "1", "--json", str(path)]
    assert run.main(arguments) == 0
    result = json.loads(path.read_text())
    assert result["base"] == {"commit": str(other), "version": "0.0.1"}
    first, *rest = result["cases"]
    (theirs,) = first["peers"]
    times = [entry["milliseconds"] for entry in (first["ours"], theirs)]
    assert all(time["p20"] <= time["median"] <= time["p80"] for time in times)
    assert theirs["ratio"] == times[0]["median"] / times[1]["median"]
    reasons = [record["peers"][0]["reason"] for record in rest]
    assert reasons[0].startswith("absent: differs from float64: value")
    assert reasons[1] == "absent: NotImplementedError: this build has no sup_con"
    assert all(record["ours"]["milliseconds"]["median"] > 0 for record in rest)
    out = capfd.readouterr().out
    assert f"base: {other}, contrastive_kernels 0.0.1\n" in out
    assert "warning: base is the dense reference: made up" in out
    assert compare.HEAD + "\ninfo_nce  N=256" in out


def test_a_package_that_cannot_be_loaded(short, tmp_path, capfd):
    other = package(tmp_path / "other", "raise ImportError('of another torch')")
    assert run.main(["--base", str(other), "--case", "dcl_small", "--threads", "1"]) == 2
    err = capfd.readouterr().err
    assert "ImportError: of another torch" in err
    assert err.endswith(f"--base: the process of {other} ended with status 1\n")
    assert run.main(["--base", str(tmp_path / "none"), "--case", "dcl_small"]) == 2
    assert "--base: " in capfd.readouterr().err


class Fake:
    """A worker that has always the same answer."""

    def __init__(self, name: str, reason: str | None):
        self.build, self.reason = builds.Build(name, Path(name)), reason

    def begin(self, record: dict) -> str | None:
        return self.reason

    def sample(self, repeats: int) -> float:
        return 0.25 if self.build.name == "b" else 0.5


@pytest.mark.parametrize(
    ("ours", "base", "end"),
    [
        (None, None, "500 ms [500 .. 500]        250 ms [250 .. 250]      2.000"),
        ("wrong", None, "  FAILED: wrong"),
        (None, "no such loss", "500 ms [500 .. 500]  absent: no such loss"),
    ],
)
def test_a_row_of_the_table(ours, base, end):
    case = CASES["info_nce_small"].resized(Sizes(8, 8))
    effort = compare.Effort(0.0, 3)
    record = compare.measure(case, Fake("a", ours), Fake("b", base), effort)
    row = compare.row(record)
    assert row.startswith("info_nce_small  N=8 M=8 ") and row.endswith(end)
