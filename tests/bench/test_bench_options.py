"""The benchmark command: its options, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from benchmarks import options
from benchmarks.cases.inputs import Groups, Sizes
from benchmarks.cases.table import CASES


def chosen(*arguments: str):
    return options.parse(list(arguments))[1]


def baseline_names(case) -> list[str]:
    return [baseline.name for baseline in case.baselines]


def test_without_options_it_is_the_whole_table():
    cases = chosen()
    assert [case.name for case in cases] == list(CASES)
    for case in cases:
        row = CASES[case.name]
        kept = tuple(each for each in row.baselines if not each.on_request)
        assert case == replace(row, baselines=kept) and case.bounded
    bounds = {case.name: [baseline.at_most for baseline in case.baselines] for case in cases}
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


def test_baselines_are_named_by_the_beginning_of_their_names():
    assert baseline_names(chosen("--loss", "sup_con", "--peer", "none")[0]) == []
    named = chosen("--loss", "sup_con", "--peer", "Pytorch_metric", "torch.compile")
    assert baseline_names(named[0]) == [
        "pytorch-metric-learning SupConLoss",
        "torch.compile of dense",
    ]
    every = baseline_names(chosen("--loss", "info_nce", "--peer", "all")[0])
    assert every == baseline_names(CASES["info_nce"]) and "PyKeOps LazyTensor" in every


def test_quick_is_the_large_group_with_two_baselines():
    cases = chosen("--quick")
    assert {case.group for case in cases} == {"large"} and len(cases) == 7
    for case in cases:
        assert 1024 <= case.sizes.n <= 2048 and case.sizes.m <= 8192 and not case.bounded
        assert "dense eager torch" in baseline_names(case) and len(case.baselines) <= 2
    assert chosen("--quick", "--loss", "dcl")[0].sizes == Sizes(256, 256)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--loss nothing", "--loss must be one of info_nce, "),
        ("--case nothing", "--case must be one of info_nce, "),
        (
            "--group nothing",
            "--group must be one of large, swap, small, whitening, search, late, scaling, got",
        ),
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
