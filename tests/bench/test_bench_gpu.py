"""The GPU benchmarks as far as a CPU can check them; with CK_TEST_DEVICE=cuda also on a GPU."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import report, run
from benchmarks.baselines import chunked, dense, gpu_kernels, whitening
from benchmarks.cases import oracle
from benchmarks.cases.case import Case
from benchmarks.cases.inputs import Groups, Sizes, groups, image_text, image_text_bias, pairs, queue
from benchmarks.cases.step import Step
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu.cases import CASES, MILLION, SAMPLED_ROWS, memory_limit_mb
from benchmarks.gpu.instruments import gemm_flops
from benchmarks.harness import pages
from benchmarks.harness.check import TOLERANCE, error
from benchmarks.harness.paths import RESULTS
from benchmarks.harness.timing import Timing

DEVICE = os.environ.get("CK_TEST_DEVICE", "cpu")
TAU = {"temperature": 0.1}
VIEWS = pairs("z1", "z2")
PAIRS = pairs("query", "key")
# two computations of one loss in float64
EXACT = (1e-12, 1e-11)


@pytest.fixture(autouse=True)
def one_thread_of_a_cpu():
    """Tiny sizes: more threads only wait for each other, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.device("cpu"):
        yield
    torch.set_num_threads(threads)


def step_of(loss, inputs, options, sizes, frozen=()):
    tensors = inputs(sizes, torch.Generator().manual_seed(0))
    for name, t in tensors.items():
        tensors[name] = t.double().requires_grad_(name not in frozen)
    return Step(loss, tensors, options)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_inputs_and_oracle_of_a_case(case):
    sizes = Sizes(16, 16 * max(1, case.sizes.m // case.sizes.n // 64), case.sizes.d, case.sizes.k)
    if case.group == "whitening":
        sizes = case.sizes.tiny()
    tensors = case.resized(sizes).tensors()
    truth = case.truth(tensors)
    wanted = {name for name, t in tensors.items() if t.requires_grad}
    assert set(truth.gradients) <= wanted
    assert (set(truth.gradients) == wanted) == (truth.rows is None)
    assert case.operations() > 0


def test_bounds_of_the_table():
    assert CASES["info_nce"].sizes == Sizes(65536, 65536, 128)
    assert len(CASES) == 17
    halves = {name for name, case in CASES.items() if case.dtype == torch.bfloat16}
    assert halves == {name for name in CASES if not name.startswith("whiten")}
    bounds = {name: case.at_most_ms for name, case in CASES.items() if case.group == "large"}
    assert bounds == {
        "info_nce": 9.0,
        "clip_loss_512": 30.0,
        "clip_loss_768": 42.0,
        "siglip_loss": 36.0,
        "nt_xent": 6.0,
        "info_nce_frozen": 1.1,
        "info_nce_million": None,
    }
    assert memory_limit_mb(Sizes(1, 1, 256)) == 64 and memory_limit_mb(Sizes(1, 1, 257)) == 600
    assert CASES["info_nce_million"].sizes.n == MILLION
    small = [case for case in CASES.values() if case.group == "small"]
    assert [(c.baselines[0].at_most, c.graph_at_most) for c in small] == [(1.0, 0.5)] * 6


def test_bounds_of_whitening():
    cases = [case for case in CASES.values() if case.group == "whitening"]
    assert {case.name: (case.sizes, case.graph_at_most_ms) for case in cases} == {
        "whiten_64_forward": (Groups(512, 128, 64), 0.040),
        "whiten_64": (Groups(512, 128, 64), None),
        "whiten_128_forward": (Groups(64, 256, 128), 0.050),
        "whiten_128": (Groups(64, 256, 128), None),
    }
    assert [[baseline.at_most for baseline in case.baselines] for case in cases] == [
        [0.1, 0.01]
    ] * 4
    assert [case.backward for case in cases] == [False, True] * 2
    assert Groups(512, 128, 64).tiny() == Groups(8, 128, 64)


def test_a_result_that_is_a_tensor_is_compared_whole():
    x = groups(Groups(3, 20, 5), torch.Generator().manual_seed(0))
    truth = oracle.result(whitening.whiten_batched)(x, {})
    right = Step(whitening.whiten_loop, x, {}, backward=False)
    assert error(right, truth, TOLERANCE[torch.float32]) is None

    def last_entry_off(x):
        z = whitening.whiten_batched(x)
        z[-1, -1, -1] += 0.01
        return z

    wrong = Step(last_entry_off, x, {}, backward=False)
    assert error(wrong, truth, TOLERANCE[torch.float32]).startswith("result off by ")


@pytest.mark.parametrize(
    "name",
    ["nt_xent", "info_nce_million", "sup_con_small", "whiten_64_forward", "whiten_128"],
)
def test_a_case_is_measured(name):
    case = CASES[name]
    tiny = case.resized(case.sizes.tiny())
    record = gpu_measure.measure(tiny, DEVICE, 1e12, budget=0.1, may_compile=False)
    assert "failed" not in record
    on_gpu = DEVICE == "cuda"
    assert (record["ours"]["memory_mb"] is not None) == on_gpu
    assert record["dtype"] == str(case.dtype)[6:] and record["backward"] == case.backward
    wanted = 2 if case.graph_at_most else 1 if case.graph_at_most_ms else 0
    assert len(record["graphs"]) == (wanted if on_gpu else 0)
    assert all("ratio" in graph for graph in record["graphs"])
    assert record["ours"]["milliseconds"]["median"] > 0 and record["ours"]["tflops"] > 0
    json.dumps(record)
    for theirs in record["peers"]:
        assert ("ratio" in theirs) != ("reason" in theirs)
    by_name = {theirs["name"]: theirs for theirs in record["peers"]}
    if case.group == "whitening":
        assert all("ratio" in theirs for theirs in by_name.values()) and len(by_name) == 2
    elif by_name:
        assert "ratio" in by_name["dense eager torch"]
        assert by_name["torch.compile of dense"]["reason"] == "left out: no time to compile"


def test_a_graph_is_held_to_a_bound_in_milliseconds(monkeypatch, capsys):
    case, tensors = CASES["whiten_64_forward"], Case.tensors
    monkeypatch.setattr(Case, "tensors", lambda self, device: tensors(self, DEVICE))
    monkeypatch.setattr(gpu_measure, "GraphStep", lambda step: step)
    few = replace(case, sizes=case.sizes.tiny())
    truth = few.truth(few.tensors(DEVICE))
    (record,), steps = gpu_measure._graphs(few, truth, print)
    assert record["at_most_ms"] == 0.04 and list(steps) == [record["name"]]
    gpu_measure._add_timing(record, {record["name"]: Timing(0.05, 0.05, 0.05, 3)})
    assert "at most 0.04 ms: NOT MET" in capsys.readouterr().out
    (record,), _ = gpu_measure._graphs(replace(few, bounded=False), truth, print)
    assert record["at_most_ms"] is None
    both = CASES["info_nce_small"]
    few = replace(both, sizes=both.sizes.tiny())
    records, steps = gpu_measure._graphs(few, few.truth(few.tensors(DEVICE)), print)
    assert [record["at_most"] for record in records] == [0.5, None] and len(steps) == 2


def test_a_case_that_is_wrong_or_late_has_no_number():
    case = CASES["info_nce_small"]
    case = case.resized(case.sizes.tiny())
    truth = case.truth(case.tensors())
    hotter = replace(case, options={"temperature": 0.05}, oracle=lambda *_: truth)
    wrong = gpu_measure.measure(hotter, "cpu", 1e12)
    assert wrong["failed"].startswith("differs from float64: value") and "ours" not in wrong
    broken = replace(case, options={"colour": 1}, oracle=lambda *_: truth)
    assert "TypeError" in gpu_measure.measure(broken, "cpu", 1e12)["failed"]
    late = gpu_measure.measure(case, "cpu", 1e12, may_begin=False)
    assert late["failed"] == "left out: the run took too long"


def test_gemm_rate():
    assert gemm_flops(DEVICE, 64) > 0


CHUNKED = {
    "info_nce": (chunked.info_nce, dense.info_nce, PAIRS, TAU, Sizes(11, 11, 5), ()),
    "frozen": (chunked.info_nce, dense.info_nce, queue, TAU, Sizes(11, 17, 5), ("negatives",)),
    "clip_loss": (chunked.clip_loss, dense.clip_loss, image_text, {}, Sizes(11, 11, 5), ()),
    "siglip": (chunked.siglip_loss, dense.siglip_loss, image_text_bias, {}, Sizes(11, 11, 5), ()),
    "nt_xent": (chunked.nt_xent, dense.nt_xent, VIEWS, TAU, Sizes(11, 22, 5), ()),
}
ATTENTION = {
    "info_nce": (gpu_kernels.attention_info_nce, *CHUNKED["info_nce"][1:]),
    "frozen": (gpu_kernels.attention_info_nce, *CHUNKED["frozen"][1:]),
    "nt_xent": (gpu_kernels.attention_nt_xent, *CHUNKED["nt_xent"][1:]),
}


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_equal_dense(name, monkeypatch):
    loss, baseline, inputs, options, sizes, frozen = CHUNKED[name]
    monkeypatch.setattr(chunked, "ROWS", 4)  # three blocks, the last of another size
    step = step_of(loss, inputs, options, sizes, frozen)
    truth = oracle.whole(baseline)(step.tensors, options)
    assert error(step, truth, EXACT) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_equals_dense(name):
    loss_of, baseline, inputs, options, sizes, frozen = ATTENTION[name]
    step = step_of(loss_of(flex_attention), inputs, options, sizes, frozen)
    truth = oracle.whole(baseline)(step.tensors, options, backward=False)
    # on a CPU attention has no backward pass, and it keeps its log-sum-exp in float32
    assert error(replace(step, backward=False), truth, (1e-6, 0.0)) is None


def test_siglip_by_rows_equals_dense(monkeypatch):
    monkeypatch.setattr(oracle, "BLOCK", 44)
    step = step_of(dense.siglip_loss, image_text_bias, {}, Sizes(11, 11, 5))
    truth = oracle.by_rows(oracle.siglip_loss)(step.tensors, {})
    assert error(step, truth, EXACT) is None


def test_sampled_rows_are_those_of_the_gradient(monkeypatch):
    monkeypatch.setattr(oracle, "BLOCK", 44)
    step = step_of(dense.info_nce, PAIRS, TAU, Sizes(11, 11, 5))
    truth = oracle.sampled_query(7)(step.tensors, TAU)
    assert len(set(truth.rows.tolist())) == 7 < SAMPLED_ROWS
    assert error(step, truth, EXACT) is None
    off = Step(partial(dense.info_nce, temperature=0.2), step.tensors, {})
    assert "gradient of query" in error(off, truth, EXACT)


def timing(milliseconds):
    return {"median": milliseconds, "p20": milliseconds, "p80": milliseconds, "samples": 5}


def made_up_result():
    sizes = {"n": 65536, "m": 65536, "d": 128, "k": 1}
    ours = {"milliseconds": timing(8.5), "tflops": 517.2, "gemm_fraction": 0.65}
    ours |= {"at_most_ms": 9.0, "memory_mb": 70.0, "memory_at_most_mb": 64}
    dense_record = {"name": "dense", "at_most": None, "ratio": 0.1, "memory_mb": 26000.0}
    dense_record |= {"milliseconds": timing(85.0)}
    absent = {"name": "flex", "at_most": None, "reason": "out of memory"}
    graph = {"name": "ours, CUDA graph", "at_most": 0.5, "ratio": 0.7}
    graph |= {"milliseconds": timing(0.07)}
    large = {"name": "info_nce", "group": "large", "sizes": sizes, "ours": ours}
    small = {"name": "cacr_small", "group": "small", "sizes": sizes | {"k": 4}, "ours": ours}
    broken = {"name": "nt_xent", "group": "large", "sizes": sizes, "failed": "out of memory"}
    whiten = {"name": "whiten_64_forward", "group": "whitening", "ours": ours}
    whiten |= {"sizes": {"n": 512, "m": 128, "d": 64, "k": 1}}
    timed_graph = graph | {"at_most": None, "at_most_ms": 0.04}
    environment = {"device": "Imaginary GPU", "capability": "sm_90", "driver": "1.2"}
    environment |= {"backend": "triton", "versions": {"torch": "2.11.0"}, "commit": "abc"}
    return {
        "command": "python -m contrastive_kernels bench --device cuda",
        "date": "2026-01-01",
        "device_type": "cuda",
        "environment": environment,
        "gemm_tflops": 790.0,
        "cases": [
            large | {"peers": [dense_record, absent], "graphs": []},
            broken,
            small | {"peers": [dense_record], "graphs": [graph]},
            whiten | {"peers": [dense_record], "graphs": [timed_graph]},
        ],
    }


def test_the_tables_of_a_result():
    text = "\n".join(gpu_report.section(made_up_result()))
    row = "| `info_nce` N=65,536 M=65,536 D=128 "
    assert row + "| 8.5 ms (≤ 9 ms) | 8.5 – 8.5 | 517 | 65% | **70 MB (≤ 64 MB)** |" in text
    assert row + "| dense | 8.5 ms | 85 ms | 0.10 | 26000 MB |" in text
    assert row + "| flex | 8.5 ms | out of memory |  |  |" in text
    assert "| FAILED: out of memory |" in text
    assert "| ours, CUDA graph | 0.07 ms | **0.70 (≤ 0.50)** |" in text
    row = "| `whiten_64_forward` N=512 n=128 D=64 "
    assert row + "| ours, CUDA graph | **0.07 ms (≤ 0.04 ms)** | 0.70 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| `info_nce`")}
    assert widths == {7}


def test_a_result_gets_markers_of_its_own(tmp_path, monkeypatch):
    page, (begin, end) = report.MEASURED.read_text(), pages.markers(report.GPU_NAME)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*.json"):
        if json.loads(path.read_text()).get("device_type", "cpu") != "cpu":
            path.unlink()
    without, _, rest = page.partition(begin)
    if not rest:
        assert report.updated(page) == page
    (tmp_path / "imaginary-gpu.json").write_text(json.dumps(made_up_result()))
    new = report.updated(page)
    assert new.count(begin) == new.count(end) == 1
    assert "### Imaginary GPU" in new.partition(begin)[2]
    assert "Imaginary GPU" not in new.partition(begin)[0]
    assert report.updated(new) == new


def test_a_run_is_written_case_by_case(tmp_path, monkeypatch, capsys):
    made_up = made_up_result()
    records = iter(made_up["cases"])
    path = tmp_path / "gpu.json"
    kept = []

    def measure(case, device, gemm, **options):
        kept.append(len(json.loads(path.read_text())["cases"]) if path.exists() else 0)
        return next(records)

    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "describe_gpu", lambda: made_up["environment"])
    monkeypatch.setattr(run.gpu_instruments, "gemm_flops", lambda device: 7.9e14)
    monkeypatch.setattr(run.gpu_measure, "measure", measure)
    names = ["info_nce", "nt_xent", "cacr_small", "whiten_64_forward"]
    assert run.main(["--device", "cuda", "--json", str(path), "--case", *names]) == 1
    assert kept == [0, 1, 2, 3]
    result = json.loads(path.read_text())
    assert result["cases"] == made_up["cases"] and result["device_type"] == "cuda"
    printed = capsys.readouterr().out
    assert "| ours, CUDA graph |" in printed and printed.endswith("FAILED: nt_xent\n")
