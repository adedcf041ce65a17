"""The benchmark command: its options, what it refuses, and what it leaves when it is cut short."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    check,
    console,
    cpu_measure,
    dense,
    headroom,
    measure,
    memory,
    options,
    peers,
    plot,
    run,
)
from benchmarks.case import Rival
from benchmarks.cases import CASES
from benchmarks.contenders import contenders
from benchmarks.inputs import Groups, Sizes

ROOT = Path(__file__).resolve().parent.parent
GEMM = 1e11
CASE = CASES["info_nce_small"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """One thread, few rounds, and a made-up rate of matrix products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(cpu_measure, "FULL", cpu_measure.Effort(0.0, 5))
    monkeypatch.setattr(run, "gemm_flops", lambda dtype: GEMM)
    yield
    torch.set_num_threads(threads)


def bench(*arguments: str) -> int:
    return run.main([*arguments, "--threads", "1"])


def chosen(*arguments: str):
    return options.parse(list(arguments))[1]


def rival_names(case) -> list[str]:
    return [rival.peer.name for rival in case.rivals]


# --- options


def test_without_options_it_is_the_whole_table():
    cases = chosen()
    assert [case.name for case in cases] == list(CASES)
    for case in cases:
        row = CASES[case.name]
        kept = tuple(rival for rival in row.rivals if not rival.on_request)
        assert case == replace(row, rivals=kept) and case.bounded
    bounds = {case.name: [rival.at_most for rival in case.rivals] for case in cases}
    assert bounds["info_nce"] == [0.28, 0.70, 0.70] and bounds["nt_xent"] == [0.20, 0.12]
    assert CASES["info_nce"].sizes == Sizes(8192, 8192) and CASES["cacr"].sizes.m == 65536
    measured = {case.name for case in cases if case.memory}
    assert {"info_nce", "sup_con", "info_nce_frozen_1000000", "lightly.DCLLoss"} <= measured
    assert not any(name.endswith("_small") for name in measured)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ("info_nce", "info_nce"),
        ("clip_loss", "clip_loss"),
        ("hcl", "hcl_small"),
        ("w_mse", "w_mse"),
        ("whiten", "whiten_64"),
    ],
)
def test_the_case_of_a_function(loss, name):
    assert [case.name for case in chosen("--loss", loss)] == [name]


def test_sizes_make_every_combination_without_bounds():
    cases = chosen("--loss", "info_nce", "-N", "32", "64", "-D", "8", "16")
    assert [case.sizes for case in cases] == [Sizes(n, n, d) for n in (32, 64) for d in (8, 16)]
    assert not any(case.bounded for case in cases) and all(case.memory for case in cases)


def test_columns_follow_the_rows_where_they_are_in_the_batch():
    assert chosen("--loss", "nt_xent", "-N", "40")[0].sizes == Sizes(40, 80)
    frozen = chosen("--case", "info_nce_frozen", "-N", "40")[0].sizes
    assert (frozen.n, frozen.m) == (40, 65536)
    assert chosen("--case", "info_nce_frozen", "-M", "40")[0].sizes == Sizes(1024, 40)
    assert chosen("--loss", "whiten", "-N", "3", "-M", "90")[0].sizes == Groups(3, 90, 64)
    w_mse = chosen("--loss", "w_mse", "-N", "512")[0].sizes
    assert (w_mse.n, w_mse.m) == (512, 256)


def test_dtype_pass_and_backend():
    two = chosen("--loss", "info_nce", "--dtype", "float32", "float64", "--pass", "forward")
    assert [case.dtype for case in two] == [torch.float32, torch.float64]
    assert all(case.passes == "forward" and not case.bounded for case in two)
    assert all(case.bfloat16_at_most is None for case in two)
    (case,) = chosen("--loss", "info_nce", "--backend", "reference")
    assert case.backend == "reference" and not case.bounded
    assert case.under_test.keywords == {"backend": "reference"}


def test_peers_are_named_by_the_beginning_of_their_names():
    assert rival_names(chosen("--loss", "sup_con", "--peer", "none")[0]) == []
    named = chosen("--loss", "sup_con", "--peer", "Pytorch_metric", "torch.compile")
    assert rival_names(named[0]) == ["pytorch-metric-learning SupConLoss", "torch.compile of dense"]
    every = rival_names(chosen("--loss", "info_nce", "--peer", "all")[0])
    assert every == rival_names(CASES["info_nce"]) and "PyKeOps LazyTensor" in every


def test_quick_is_the_large_group_with_two_peers():
    cases = chosen("--quick")
    assert {case.group for case in cases} == {"large"} and len(cases) == 7
    for case in cases:
        assert 1024 <= case.sizes.n <= 2048 and case.sizes.m <= 8192 and not case.bounded
        assert "dense eager torch" in rival_names(case) and len(case.rivals) <= 2
    assert chosen("--quick", "--loss", "dcl")[0].sizes == Sizes(256, 256)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--loss nothing", "--loss must be one of info_nce, "),
        ("--case nothing", "--case must be one of info_nce, "),
        ("--group nothing", "--group must be one of large, swap, small, whitening, scaling, got"),
        ("--loss dcl --peer lightly", "--peer must be the beginning of one of none, all, dense"),
        ("--loss info_nce -M 8", "-M does not go with info_nce, which takes -N -D"),
        ("--loss info_nce -K 8", "-K does not go with info_nce, which takes -N -D"),
        ("--loss w_mse -M 8", "-M does not go with w_mse, which takes -N -D -K"),
        ("-N 0", "argument -N: must be an integer > 0, got 0"),
        ("-N 1.5", "argument -N: must be an integer > 0, got 1.5"),
        ("--dtype half", "invalid choice: 'half'"),
        ("--backend cuda", "--backend cuda is not usable here: "),
        ("--case lightly.DCLLoss --backend cpu", "--backend: lightly.DCLLoss stands in for"),
        ("--colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_what_cannot_be_gets_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        chosen(*arguments.split())
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_what_is_not_here_gets_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(options.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        chosen("--device", "cuda")
    assert "--device cuda needs a GPU" in capsys.readouterr().err
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        chosen("--plot", "picture")
    wanted = "--plot needs matplotlib: pip install 'contrastive_kernels[bench]'"
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_results_go_into_files(flag, tmp_path, capsys):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(SystemExit):
            chosen(flag, str(path))
        assert f"{flag} must be a file that can be written" in capsys.readouterr().err


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


# --- cases


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.group != "swap"])
def test_every_row_is_right_at_tiny_sizes(name):
    row = CASES[name]
    case = row.resized(row.sizes.tiny())
    tensors = case.tensors()
    step = case.step(case.under_test, tensors)
    assert check.reason(step, case.truth(tensors), check.TOLERANCE[case.dtype]) is None


@pytest.mark.parametrize("passes", ["forward", "backward", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["nt_xent", "info_nce_frozen", "cacr_small"])
def test_passes_and_dtypes_are_right(name, dtype, passes):
    row = CASES[name]
    case = replace(row.resized(row.sizes.tiny()), dtype=dtype, passes=passes)
    tensors = case.tensors()
    truth = case.truth(tensors)
    assert bool(truth.gradients) == (passes != "forward")
    step = case.step(case.under_test, tensors)
    for _ in range(2):
        assert check.reason(step, truth, check.TOLERANCE[dtype]) is None


def test_the_backward_pass_is_timed_alone():
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.05)
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.expand(4)

    case = replace(CASE, passes="backward", options={})
    tensors = {"x": torch.rand(4).requires_grad_()}
    step = case.step(lambda x: Slow.apply(x), tensors)
    both = replace(case, passes="both").step(step.loss, tensors)
    timings = measure.interleave({"one": step, "both": both}, 0.0, print)
    assert timings["one"].median < 25 < 50 <= timings["both"].median
    assert torch.equal(step.gradients()["x"], torch.ones(4))


@pytest.mark.parametrize("dtype", measure.DTYPES.values())
def test_the_rate_of_matrix_products(dtype, monkeypatch):
    monkeypatch.setattr(measure, "GEMM_SHAPES", ((64, 64, 64),))
    assert measure.gemm_flops(dtype) > 0


def test_operations_of_the_passes_add_up():
    for name in ("info_nce", "nt_xent", "whiten_64", "w_mse"):
        row = CASES[name]
        parts = [replace(row, passes=p).operations() for p in ("forward", "backward", "both")]
        assert parts[0] + parts[1] == pytest.approx(parts[2]) and parts[0] > 0
    assert CASES["info_nce"].operations() == 8 * 8192**2 * 128
    assert CASES["info_nce_forward_1000000"].operations() == 2 * 1024 * 1_000_000 * 128


# --- a run


def test_a_sweep_with_memory_and_pictures(tmp_path, capsys):
    path = tmp_path / "new" / "result.json"
    arguments = ["--loss", "info_nce", "-N", "256", "1024", "--peer", "dense"]
    assert bench(*arguments, "--json", str(path), "--plot", str(tmp_path / "sweep.png")) == 0
    result = json.loads(path.read_text())
    assert [record["sizes"]["n"] for record in result["cases"]] == [256, 1024]
    for record in result["cases"]:
        n, ours = record["sizes"]["n"], record["ours"]
        (peer,) = record["peers"]
        median = ours["milliseconds"]["median"]
        assert ours["gflops"] == pytest.approx(8 * n * n * 128 / median / 1e6)
        assert ours["gemm_fraction"] == pytest.approx(1e9 * ours["gflops"] / GEMM)
        assert peer["ratio"] == pytest.approx(median / peer["milliseconds"]["median"])
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
    record = cpu_measure.measure(broken, {}, 1)
    assert record["failed"] == "ZeroDivisionError: division by zero"


@pytest.mark.skipif(headroom.free_bytes() is None, reason="nobody says what memory is free")
def test_a_peer_that_asks_for_too_much_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(headroom, "free_bytes", lambda: 2**30)

    def greedy(query, key, *, temperature):
        return torch.empty(2**31, dtype=torch.uint8)  # there is room for it without the limit

    def absent():
        raise peers.missing("imaginary")

    rivals = (
        Rival(peers.Peer("greedy", lambda: greedy), 0.5),
        Rival(peers.Peer("absent", absent), 0.5),
        *CASE.rivals,
    )
    monkeypatch.setitem(CASES, CASE.name, replace(CASE, rivals=rivals))
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
    assert done >= 1 and f"stopped: {done} of 22 cases are measured" in out
    assert "info_nce_small  N=256" in out and f"wrote {path.name}" in out


# --- memory


@pytest.mark.skipif(memory.unsupported() is not None, reason="no peak memory here")
def test_memory_of_a_pass_and_of_what_cannot_run():
    case = replace(CASE.resized(Sizes(1024, 1024)), passes="forward")
    forward = memory.measure(case, "dense eager torch", 1)["mb"]
    assert forward > 4 * 1024**2 / 1e6
    nothing = replace(case, sizes=Sizes(0, 0))
    assert "reason" in memory.measure(nothing, "ours", 1)


# --- output


def record_of(name: str, sizes: Sizes, **entries) -> dict:
    return replace(CASE, name=name).resized(sizes).record() | entries


def timed(median: float, **entries) -> dict:
    times = {"median": median, "p20": median, "p80": median, "samples": 5}
    return {"milliseconds": times} | entries


def made_up_records() -> list[dict]:
    peer = timed(8.0, name="dense eager torch", at_most=0.2, ratio=0.25)
    absent = {"name": "other", "at_most": None, "reason": "not installed: pip install other"}
    ours = timed(2.0, gflops=50.0, gemm_fraction=0.5)
    memory = {"ours": {"mb": 3.0}, "dense eager torch": {"mb": 70.0}}
    entries = {"ours": ours, "peers": [peer, absent], "memory": memory}
    return [record_of("a", Sizes(8, 8), **entries), record_of("b", Sizes(8, 8), failed="why")]


def test_the_rows_of_a_case():
    good, failed = made_up_records()
    title, ours, dense_row, other = console.rows(good, 64)
    assert title == "a  N=8 M=8 D=128 K=1  float32"
    assert ours.split()[1:3] == ["2.00", "ms"] and "3.0 MB" in ours and "50%" in ours
    assert ours.endswith("at most 64 MB: met")
    assert "0.250" in dense_row and dense_row.endswith("at most 0.20: NOT MET")
    assert other.split(maxsplit=1) == ["other", "not installed: pip install other"]
    assert console.rows(failed, None) == [title.replace("a", "b", 1), "  FAILED: why"]
    assert console.summary([good, failed]) == (
        "Ours took 0.25 of the time of dense eager torch, and at most 3 MB beyond inputs and "
        "gradients where it took 70."
    )
    assert console.summary([failed]) is None


def test_contenders_of_a_gpu_record():
    record = record_of("a", Sizes(8, 8), ours=timed(2.0, tflops=0.3, memory_mb=5.0), peers=[])
    (ours,) = contenders(record)
    assert (ours.memory_mb, ours.rate) == (5.0, 3e11)


def test_pictures_of_cases_without_a_sweep(tmp_path):
    result = {"environment": {"device": "Imaginary"}, "cases": made_up_records()}
    files = plot.draw(result, tmp_path / "dots")
    assert [file.name for file in files] == ["dots.svg", "dots.png"]
    text = files[0].read_text()
    assert "dense eager torch" in text and "a  N=8" in text and "b  N=8" not in text
    assert "peak memory" in text
    del result["cases"][0]["memory"]
    assert "peak memory" not in plot.draw(result, tmp_path / "dots")[0].read_text()


def test_a_sweep_of_two_sizes_has_a_panel_for_each_of_the_second():
    base = made_up_records()[0]
    records = [base | {"sizes": vars(Sizes(n, 2 * n, d))} for d in (4, 5) for n in (8, 16)]
    assert plot._swept(records) == "n"
    assert [text for text, _ in plot._panels(records, "n")] == [
        "a, float32\nD=4 K=1",
        "a, float32\nD=5 K=1",
    ]
    assert plot._swept([base]) is None


class Terminal:
    def __init__(self, is_one: bool):
        self.is_one, self.text = is_one, ""

    def isatty(self) -> bool:
        return self.is_one

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("is_one", [True, False])
def test_progress_is_one_line_on_a_terminal_and_a_log_elsewhere(is_one, monkeypatch):
    stream = Terminal(is_one)
    monkeypatch.setattr(sys, "stderr", stream)
    progress = console.Progress("case")
    progress("first")
    progress.passing("round 1")
    progress.close()
    assert stream.text.count("\n") == (0 if is_one else 1)
    assert ("round 1" in stream.text) == is_one
    assert stream.text.endswith("\r\033[K") == is_one


# --- installed


def test_the_packages_are_all_named():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(ROOT).parts)
             for p in (ROOT / "contrastive_kernels").rglob("__init__.py")}  # fmt: skip
    assert set(settings["packages"]) == found | {"contrastive_kernels.benchmarks"}
    assert settings["package-dir"] == {"contrastive_kernels.benchmarks": "benchmarks"}


def test_no_module_of_the_benchmarks_imports_them_by_name():
    for path in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "benchmarks" for name in names), path.name


def test_the_command_of_an_installed_package(tmp_path):
    package = tmp_path / "contrastive_kernels"
    no_caches = shutil.ignore_patterns("__pycache__", "*.so", "results")
    shutil.copytree(ROOT / "contrastive_kernels", package, ignore=no_caches)
    shutil.copytree(ROOT / "benchmarks", package / "benchmarks", ignore=no_caches)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "contrastive_kernels", "bench", "--list", "--loss", "dcl"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dcl_small ")


def test_the_table_under_pytest_benchmark(tmp_path):
    path = tmp_path / "x.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks"]
    command += ["--sizes", "tiny", "-k", "whiten_64 and (ours or batched)"]
    # pytest-benchmark measures nothing in a worker of pytest-xdist
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "--benchmark-json", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours, batched = sorted(
        json.loads(path.read_text())["benchmarks"], key=lambda one: "batched" in one["name"]
    )
    assert ours["extra_info"]["sizes"] == {"n": 8, "m": 128, "d": 64, "k": 1}
    assert ours["extra_info"]["flops"] == CASES["whiten_64"].flops(Groups(8, 128, 64))
    ratio = ours["stats"]["median"] / batched["stats"]["median"]
    assert batched["extra_info"]["ratio"] == pytest.approx(ratio)
