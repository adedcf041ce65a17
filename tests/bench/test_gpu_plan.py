"""What `make gpu` would do on a machine with a GPU, as far as one without can show."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import run as bench
from benchmarks.gpu import alone, families, plan, runner, smoke
from benchmarks.gpu.__main__ import main, table
from benchmarks.gpu.cases import CASES
from benchmarks.harness.paths import ROOT

STEPS = ["build", "smoke", "benchmarks", "memcheck", "initcheck", "racecheck", "tune", "tests"]


@pytest.fixture
def steps(monkeypatch, tmp_path):
    monkeypatch.setattr(plan.shutil, "which", lambda name: f"/bin/{name}")
    return plan.steps(tmp_path)


@pytest.fixture(scope="module")
def counts():
    """What the steps compile, counted in a process that has no interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.count"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_plan_keeps_its_limits(steps, counts):
    assert [step.name for step in steps] == STEPS
    assert sum(step.seconds for step in steps) <= plan.TOTAL_SECONDS == 540
    times = plan.expected(steps, counts)
    assert all(times[step.name][1] <= step.seconds for step in steps[:-1])
    assert times["smoke"][1] <= plan.SMOKE_SECONDS == 90
    assert times["tests"][1] >= 100, "no time for tests"
    assert bench.GPU_SECONDS + plan.GRACE_SECONDS <= steps[2].seconds
    assert smoke.PROCESS_SECONDS + runner.grace(plan.SMOKE_SECONDS) <= plan.SMOKE_SECONDS


def test_every_kernel_that_is_shown_is_counted(counts):
    assert len(counts["smoke"]) == len(smoke.NAMES) * len(smoke.DIMS)
    assert min(counts["smoke"].values()) > 40
    sources = "".join(
        path.read_text() for path in (ROOT / "contrastive_kernels/triton").glob("*.py")
    )
    kernels = set(re.findall(r"^@\w+\.jit.*\ndef (\w+_kernel)\(", sources, re.MULTILINE))
    assert kernels == set(counts["names"]) and len(kernels) > 15
    assert set(counts["cases"]) == set(CASES) and counts["cases"]["info_nce"] > 5
    assert counts["tune"] > 0


def test_every_step_leaves_a_result(steps, tmp_path):
    assert len({step.result for step in steps}) == len(steps)
    for step in steps:
        written = step.result == f"{step.name}.log" or str(tmp_path / step.result) in step.command
        assert written, step.name


def test_every_test_is_run_or_left_out():
    """A new folder of tests has to be put on one of the lists, and no name on them is wrong."""
    listed = (*plan.TESTS, *plan.LEFT_OUT)
    assert all((ROOT / path).exists() for path in listed)
    for path in ROOT.glob("tests/*/test_*.py"):
        name = path.relative_to(ROOT).as_posix()
        assert any(name == one or name.startswith(f"{one}/") for one in listed), name


def test_slow_tests_come_last(steps, request):
    command = steps[-1].command
    assert command[-len(plan.TESTS) :] == list(plan.TESTS)
    (conftest,) = [p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "SLOWEST")]
    assert all(list(ROOT.glob(f"tests/*/{name}.py")) for name in conftest.order("cuda"))
    assert min(conftest.order("cuda").values()) > 0 > max(conftest.order("cpu").values())
    assert all(f"--ignore={path}" in command for path in plan.LEFT_OUT if path != "tests/bench")
    assert "--tb=short" in command and "-rf" in command


def test_sanitizers_see_what_they_can_judge(steps, monkeypatch, tmp_path):
    commands = {step.name: step.command for step in steps}
    assert commands["racecheck"][-2:] == ["--family", "whitening"]
    assert "--family" not in commands["memcheck"] and "--here" in commands["initcheck"]
    assert all(steps[k].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for k in (3, 4, 5))
    monkeypatch.setattr(plan.shutil, "which", lambda name: None)
    assert not {"memcheck", "initcheck", "racecheck"} & {s.name for s in plan.steps(tmp_path)}


def test_the_dry_run_prints_the_plan(steps, counts, monkeypatch, capsys):
    gpu = sys.modules[main.__module__]
    monkeypatch.setattr(gpu, "counted", lambda: counts)
    monkeypatch.setattr(gpu, "number_of_tests", lambda step: "1234")
    assert main(["--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == table(steps, "1234")
    assert "of 540" in table(steps, "1234") and "tests: 1234" in table(steps, "1234")


def stub(name, code, seconds=20.0, **environment):
    command = [sys.executable, "-c", code]
    return plan.Step(name, command, seconds, f"{name}.log", environment)


def test_every_step_runs_and_failures_are_named(tmp_path, capfd):
    chosen = [
        stub("build", "print('built'); raise SystemExit(3)"),
        stub("tests", "import os; print('on', os.environ['CK_TEST_DEVICE'])", CK_TEST_DEVICE="x"),
        stub("last", "print('still here')"),
    ]
    assert runner.run_all(chosen, tmp_path) == {"build": "exit status 3"}
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert logs["tests"] == "on x\n" and logs["last"] == "still here\n"
    assert "still here" in capfd.readouterr().out
    known = json.loads((tmp_path / "steps.json").read_text())
    assert [(one["name"], one["failed"]) for one in known] == [
        ("build", "exit status 3"), ("tests", None), ("last", None)
    ]  # fmt: skip


WAITS = """
import time
print('begun', flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print('what is known', flush=True)
    {then}
"""


@pytest.mark.parametrize("then", ["raise SystemExit(1)", "time.sleep(60)"])
def test_a_step_is_asked_to_stop_and_then_ended(tmp_path, then):
    start = time.monotonic()
    failure = runner.run(stub("slow", WAITS.format(then=then)), 3.0, tmp_path)
    assert failure == "stopped after 2.0 s"
    assert (tmp_path / "slow.log").read_text() == "begun\nwhat is known\n"
    assert (time.monotonic() - start > 2.9) == ("sleep" in then)


def test_pytest_that_is_stopped_shows_its_tracebacks(tmp_path):
    text = "import time\ndef test_a():\n    wrong = 3\n    assert wrong == 4\n"
    (tmp_path / "test_it.py").write_text(text + "def test_b():\n    time.sleep(60)\n")
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-rf", "-p", "no:cacheprovider"]
    step = plan.Step("tests", [*command, str(tmp_path)], 15.0, "tests.log")
    assert runner.run(step, 15.0, tmp_path) == "stopped after 10.0 s"
    log = (tmp_path / "tests.log").read_text()
    assert "assert wrong == 4" in log and "FAILED" in log


def test_no_step_takes_the_time_of_a_later_one(tmp_path):
    chosen = [stub("first", "print(1)"), stub("last", "print(1)", 30.0)]
    assert runner.run_all(chosen, tmp_path, total=30.0) == {"first": runner.NO_TIME}


ANSWERS = """
import json, os, sys, time
order = json.loads(sys.stdin.readline())
if order["name"] == "info_nce":
    os.abort()
if order["name"] == "nt_xent":
    time.sleep(60)
open(order["out"], "w").write(json.dumps({"name": order["name"], **order["options"]}))
"""


def test_a_fault_costs_one_case():
    one = alone.Alone([sys.executable, "-c", ANSWERS])
    try:
        broken = one.measure(CASES["info_nce"], 30.0, gemm=1.0)
        assert broken["failed"] == "its process ended with status -6" and broken["sizes"]
        assert one.measure(CASES["nt_xent"], 0.5, gemm=1.0)["failed"] == "stopped after 0 s"
        good = one.measure(CASES["siglip_loss"], 30.0, gemm=2.0)
        assert good == {"name": "siglip_loss", "gemm": 2.0}
    finally:
        one.close()
    assert one.ready.poll() is not None
    assert alone.COMMAND[1:] == ["-m", "benchmarks.gpu.alone"]


def test_every_case_of_the_table_is_measured_alone(tmp_path, monkeypatch):
    """First all of them; then, in the time that is left, those beside what compiles once more."""
    asked = []

    class Alone:
        def measure(self, case, seconds, *, may_compile, **options):
            asked.append((case.name, may_compile))
            assert 0 < seconds <= bench.GPU_CASE_SECONDS
            again = {"failed": "stopped"} if case.name == "nt_xent" and may_compile else {}
            return case.record() | {"compiled": may_compile} | again

        def close(self):
            asked.append(("closed", True))

    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    environment = {"device": "x", "capability": "y", "driver": "z", "commit": "c", "backend": "b"}
    monkeypatch.setattr(bench, "describe_gpu", lambda: environment)
    monkeypatch.setattr(bench.gpu_instruments, "gemm_flops", lambda device: 1e12)
    monkeypatch.setattr(bench.gpu_alone, "Alone", Alone)
    monkeypatch.setattr(bench, "_end", lambda options, result, path: 0)
    path = tmp_path / "benchmarks.json"
    assert bench.main(["--device", "cuda", "--json", str(path)]) == 0
    assert asked[: len(CASES)] == [(name, False) for name in CASES]
    assert ("nt_xent", True) in asked and ("whiten_64", True) not in asked
    assert asked[-1] == ("closed", True)
    records = {one["name"]: one for one in json.loads(path.read_text())["cases"]}
    assert list(records) == list(CASES)
    assert records["info_nce"]["compiled"] and not records["nt_xent"]["compiled"]


def test_a_process_that_is_not_needed_ends():
    done = subprocess.run(alone.COMMAND, cwd=ROOT, input="", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu runs it")
def test_families_against_float64(monkeypatch):
    """All of them, interpreted, with few rows."""
    for name, size in (("ROWS", 21), ("KEYS", 70), ("TOKENS", (5, 9))):
        monkeypatch.setattr(families, name, size)
    for dtype, dim in ((torch.bfloat16, 272), (torch.float32, 16)):
        names = smoke.chosen(list(smoke.FAMILIES), dtype, dim)
        made = list(smoke.here(names, dtype, dim, "cpu"))
        assert [one["family"] for one in made] == names
        assert not [one for one in made if "failed" in one]
    assert "lse" in smoke.line(made[0]) and "whitening" in names


def test_a_family_that_is_wrong_or_breaks_off_is_named(monkeypatch):
    def wrong(given):
        x = given.features("x", 3)
        return given.differentiated({"square": x * x * (1.0 if given.exact else 1.1)})

    def broken(given):
        raise RuntimeError("illegal memory access\nand more")

    monkeypatch.setattr(smoke, "FAMILIES", {"wrong": wrong, "broken": broken, "after": wrong})
    made = list(smoke.here(["wrong", "broken", "after"], torch.float32, 4, "cpu"))
    assert made[0]["failed"] == "beyond 1e-04: square, dx"
    assert made[1]["failed"] == "RuntimeError: illegal memory access" and len(made) == 2


def test_another_process_does_the_rest(monkeypatch):
    """After one that dies, one that breaks off, and one that is silent."""
    answers = iter([
        (-6, [{"family": "rows"}]),
        (1, [{"family": "two_way", "failed": "x", "ended": True}]),
        (0, [{"family": "itself"}]),
    ])  # fmt: skip
    asked = []

    def run(command, **options):
        asked.append(command[command.index("--family") + 1 :])
        status, rows = next(answers)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        return subprocess.CompletedProcess(command, status, text)

    monkeypatch.setattr(smoke.subprocess, "run", run)
    made = list(smoke.alone(["rows", "columns", "two_way", "itself"], "float16", 64, "cuda"))
    assert [one["family"] for one in made] == ["rows", "columns", "two_way", "itself"]
    assert made[1]["failed"] == "the process ended with status -6"
    assert asked == [["rows", "columns", "two_way", "itself"], ["two_way", "itself"], ["itself"]]


def test_the_smoke_set_needs_kernels(monkeypatch, capsys):
    monkeypatch.setattr(smoke, "unusable_reason", lambda name, device: "there is no GPU here")
    assert smoke.main(["--out", os.devnull]) == 2
    assert "no GPU" in capsys.readouterr().err
