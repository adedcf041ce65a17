"""A run of the benchmark command: its results, and what it leaves when it is cut short."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import options, run
from benchmarks.baselines import dense
from benchmarks.baselines.baseline import Baseline
from benchmarks.baselines.loading import missing
from benchmarks.cases.inputs import Sizes
from benchmarks.cases.table import CASES
from benchmarks.harness import measure, memory, memory_limit
from benchmarks.harness.paths import ROOT

pytestmark = pytest.mark.usefixtures("short")
CASE = CASES["info_nce_small"]


def bench(*arguments: str) -> int:
    return run.main([*arguments, "--threads", "1"])


def test_the_command_repeats_the_run():
    words = "--loss clip_loss -N 8 16 --dtype float64 --pass backward --no-memory --threads 3"
    parsed, _ = options.parse([*words.split(), "--json", "kept.json", "--peer", "dense"])
    command = run.command_line(parsed)
    assert command.startswith("python -m contrastive_kernels bench --loss clip_loss ")
    assert "kept.json" not in command
    again, _ = options.parse(command.split()[4:])
    assert vars(again) == vars(parsed) | {"json": None}


def test_only_the_whole_table_has_a_file(tmp_path):
    environment = {"device": "Imaginary CPU", "threads": 2}
    for arguments in ("--quick", "--loss dcl", "-N 8", "--peer none", "--dtype float64"):
        parsed, _ = options.parse(arguments.split())
        assert run._path(parsed, environment) is None
    parsed, _ = options.parse([])
    assert run._path(parsed, environment).name == "imaginary-cpu-2-threads.json"
    parsed, _ = options.parse(["--quick", "--json", str(tmp_path / "x.json")])
    assert run._path(parsed, environment) == tmp_path / "x.json"


def test_the_list(capsys):
    assert bench("--list", "--loss", "nt_xent", "whiten") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:4] == ["nt_xent", "large", "N=8192", "M=16384"]
    assert "lightly NTXentLoss" in first and second.startswith("whiten_64 ")


def test_a_sweep_with_memory_and_pictures(short, tmp_path, capsys):
    path = tmp_path / "new" / "result.json"
    arguments = ["--loss", "info_nce", "-N", "256", "1024", "--peer", "dense"]
    assert bench(*arguments, "--json", str(path), "--plot", str(tmp_path / "sweep.png")) == 0
    result = json.loads(path.read_text())
    assert [record["sizes"]["n"] for record in result["cases"]] == [256, 1024]
    for record in result["cases"]:
        n, ours = record["sizes"]["n"], record["ours"]
        (theirs,) = record["peers"]
        median = ours["milliseconds"]["median"]
        assert ours["gflops"] == pytest.approx(8 * n * n * 128 / median / 1e6)
        assert ours["gemm_fraction"] == pytest.approx(1e9 * ours["gflops"] / short)
        assert theirs["ratio"] == pytest.approx(median / theirs["milliseconds"]["median"])
    if memory.unsupported() is None:
        large = result["cases"][1]["memory"]
        assert large["dense eager torch"]["mb"] > 4 * 1024**2 / 1e6
        assert large["ours"]["mb"] < large["dense eager torch"]["mb"] or (
            result["environment"]["backend"] == "reference"
        )
    for suffix in (".svg", ".png"):
        assert (tmp_path / f"sweep{suffix}").stat().st_size > 5000
    out = capsys.readouterr().out
    assert "info_nce  N=1024 M=1024 D=128 K=1  float32\n  ours " in out
    assert "of the time of dense eager torch" in out and "drew sweep.svg, sweep.png" in out


def test_a_wrong_loss_has_no_number(tmp_path, monkeypatch, capsys):
    def doubled(query, key, *, temperature):
        return 2 * dense.info_nce(query, key, temperature=temperature)

    monkeypatch.setitem(CASES, "wrong", replace(CASE, name="wrong", loss=doubled))
    path = tmp_path / "x.json"
    assert bench("--case", "wrong", "dcl_small", "--json", str(path)) == 1
    wrong, right = json.loads(path.read_text())["cases"]
    assert wrong["failed"].startswith("differs from float64: value")
    assert "ours" not in wrong and "ratio" in right["peers"][0]
    out = capsys.readouterr().out
    assert "  FAILED: differs from float64: value" in out and out.endswith("FAILED: wrong\n")


def test_whatever_fails_is_the_failure_of_its_case(monkeypatch):
    broken = replace(CASE, inputs=lambda sizes, generator: 1 / 0)
    record = measure.measure(broken, {}, 1)
    assert record["failed"] == "ZeroDivisionError: division by zero"


@pytest.mark.skipif(memory_limit.free_bytes() is None, reason="nobody says what memory is free")
def test_a_baseline_that_asks_for_too_much_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory_limit, "free_bytes", lambda: 2**30)

    def greedy(query, key, *, temperature):
        return torch.empty(2**31, dtype=torch.uint8)  # there is room for it without the limit

    def absent():
        raise missing("imaginary")

    baselines = (
        Baseline("greedy", lambda: greedy, at_most=0.5),
        Baseline("absent", absent, at_most=0.5),
        *CASE.baselines,
    )
    monkeypatch.setitem(CASES, CASE.name, replace(CASE, baselines=baselines))
    path = tmp_path / "x.json"
    assert bench("--case", CASE.name, "--json", str(path)) == 0
    record = json.loads(path.read_text())["cases"][0]
    first, second, third, *_ = record["peers"]
    assert "ratio" not in first and "tried to allocate 2147483648 bytes" in first["reason"]
    assert second["reason"] == "not installed: pip install imaginary" and "ratio" in third
    out = capsys.readouterr().out.splitlines()
    assert any(row.split() == "greedy OOM: asked for 2.1 GB".split() for row in out)
    torch.empty(2**31, dtype=torch.uint8)  # the limit is gone


def test_an_interrupt_leaves_what_is_done(tmp_path):
    path = tmp_path / "x.json"
    code = "import sys; from benchmarks import run; run.gemm_flops = lambda dtype: 1e11; "
    code += "sys.exit(run.main(sys.argv[1:]))"
    arguments = ["--group", "small", "scaling", "--peer", "none", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--json", str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    done = len(json.loads(path.read_text())["cases"])
    count = sum(case.group in ("small", "scaling") for case in CASES.values())
    assert done >= 1 and f"stopped: {done} of {count} cases are measured" in out
    assert "info_nce_small  N=256" in out and f"wrote {path.name}" in out


@pytest.mark.skipif(memory.unsupported() is not None, reason="no peak memory here")
def test_memory_of_a_pass_and_of_what_cannot_run():
    case = replace(CASE.resized(Sizes(1024, 1024)), passes="forward")
    forward = memory.measure(case, "dense eager torch", 1)["mb"]
    assert forward > 4 * 1024**2 / 1e6
    nothing = replace(case, sizes=Sizes(0, 0))
    assert "reason" in memory.measure(nothing, "ours", 1)
