"""The Triton kernels compiled for GPUs that need not be there: no spills, tensor cores in use.

`compiles.py` is a program of its own, without Triton's interpreter, and prints a line of JSON for
each kernel; the tests judge what it printed.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import compiles
import pytest
import torch
import triton
from compiles import HOPPER, code_from_json, from_json, tiles
from fresh import run_python

from benchmarks.gpu import resources
from contrastive_kernels.__main__ import main
from contrastive_kernels.triton import configs, tune
from contrastive_kernels.triton.compile import Compiled
from contrastive_kernels.triton.configs import SHARED_KIB, TILES, Tile, row
from contrastive_kernels.triton.machine_code import Code
from contrastive_kernels.triton.tune import Entry, Trial

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05"}
# For an sm_90 at D = 128: the most instructions of single lanes for a pair, and the least n of the
# products. benchmarks/gpu/gates.py has them for more.
GATES = {"stats": (9.0, 64), "attend": (12.0, 128), "two_way": (12.5, 64), "gradient": (12.0, 128)}
# The most bytes that a thread may spill, where another tile is expected to be slower.
SPILLS = {
    "sm_90 rows and columns with mean backward D=768": 200,
    "sm_90 hopper float16 D=128": 8,
    "sm_90 hopper both float16 D=256": 32,
    "sm_90 rows and columns keep by a library": 16,
}


@pytest.fixture(scope="session")
def printed() -> list[list]:
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, compiles.__file__],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(map(json.loads, done.stdout.splitlines()))


@pytest.fixture(scope="session")
def compiled(printed) -> list[tuple[str, int, Compiled]]:
    return [(row[0], row[1], from_json(row[2])) for row in printed if len(row) == 3]


@pytest.fixture(scope="session")
def machine(printed) -> dict[str, tuple[float, Code, str]]:
    """By schedule."""
    return {
        name: (cost, code_from_json(facts), ir)
        for name, cost, facts, ir in (row for row in printed if len(row) == 4)
    }


def judged(wrong: Iterator[str]) -> None:
    lines = list(wrong)
    assert not lines, "\n" + "\n".join(lines)


def test_every_kernel_compiles(compiled):
    assert len(compiled) > 110
    judged(f"{label}: {one.kernel}: {one.error}" for label, _, one in compiled if one.error)


def test_what_is_kept_of_kernels_is_what_the_compiler_makes(compiled, machine):
    """Of those of today; and no kernel is missing, or kept for nothing."""
    version, kept, codes = compiles.recorded()
    if version != triton.__version__:
        pytest.skip(f"kept of Triton {version}")
    made = {one.key: one for _, _, one in compiled}
    assert kept.keys() == made.keys(), "kernels have changed: make compiled"
    judged(f"{one}, not {kept[key]}" for key, one in made.items() if one != kept[key])
    hopper = {one.key: label.removeprefix("sm_90 ") for label, _, one in compiled
              if label.startswith("sm_90 hopper")}  # fmt: skip
    assert codes == {key: machine[label][1] for key, label in hopper.items()}


def test_a_launch_that_does_not_bind_is_listed():
    text = """
import os
os.environ.pop("TRITON_INTERPRET", None)
from contrastive_kernels.triton import engine, gradient
from contrastive_kernels.triton.compile import compiling
with compiling(90) as made:
    engine.launch(gradient.finish_kernel, (1,), nothing=3)
print(made[0].kernel, made[0].error)
"""
    assert run_python(text).startswith("finish_kernel TypeError")


def test_no_kernel_spills(compiled):
    judged(
        f"{label}: {one.kernel} spills {one.spilled} bytes"
        for label, _, one in compiled
        if one.spilled > SPILLS.get(label, 0)
    )


def test_resources_are_within_the_limits(compiled):
    judged(
        f"{label}: {one.kernel} takes {one.registers} registers, {one.shared} bytes of shared "
        f"memory, {one.tensor} columns of tensor memory"
        for label, architecture, one in compiled
        if one.registers > 255 or one.shared > SHARED_KIB[architecture] * 1024 or one.tensor > 512
    )


def test_the_folds_are_inlined(compiled):
    judged(f"{label}: {one.kernel} has calls" for label, _, one in compiled if one.calls)


def test_tensor_cores_are_used(compiled):
    swept = [found for found in compiled if found[2].kernel in resources.KERNELS.values()
             and "by a library" not in found[0]]  # fmt: skip
    assert not [
        one.instruction for label, _, one in compiled if "library" in label if one.instruction
    ]
    judged(
        f"{label}: {one.kernel} multiplies by {one.instruction or 'no tensor core'}"
        for label, architecture, one in swept
        if one.instruction != INSTRUCTION[architecture] and "double" not in label
    )


def test_the_machine_code_of_the_sweeps_passes_the_gates(machine):
    for name, (most, columns) in GATES.items():
        cost, facts, _ = machine[name]
        assert cost <= most, f"{name}: {cost:.1f} instructions a pair"
        assert facts.columns >= columns, (name, facts)
        assert facts.wide >= 16, (name, facts)  # features
        assert facts.buffers >= TILES[90]["half"][name][128].stages, (name, facts)


def test_vectors_of_any_length_are_read_16_bytes_at_a_time(machine):
    assert machine["ragged"][1][1:] == machine["attend"][1][1:]


def test_the_sums_of_two_way_are_guarded(machine):
    """A thread reads, adds to and writes sums of the other side that other threads read as well:
    the sums go through shared memory before they are written, and all threads meet before the next
    own tile comes to them."""
    lines = machine["two_way"][2].splitlines()
    (read,) = (k for k, line in enumerate(lines) if re.search(r"= tt\.load %pointers\w*, %", line))
    write = next(k for k in range(read, len(lines)) if "tt.store" in lines[k])
    between = "\n".join(lines[read:write])
    assert re.search(r"tt\.reduce.*axis = 1", between)
    moved = re.search(r"convert_layout.*ttg\.slice<.*-> tensor<64xf32, #blocked", between)
    assert moved, between
    ends = [k for k, line in enumerate(lines) if re.match(r"\s*(ttg|gpu)\.barrier", line)]
    assert ends and min(ends) > write and "tt.store" in lines[min(ends) - 1]


def test_the_engine_for_hopper(compiled, machine):
    """Both products of a warpgroup are of 64 own vectors, and as wide as a tile or a vector."""
    kernels = {kernel for kernel, _, _ in HOPPER.values()}
    made = {label: one for label, _, one in compiled if one.kernel in kernels}
    labels = [f"sm_90 {name} D={dim}" for name, (_, _, dims) in HOPPER.items() for dim in dims]
    assert list(made) == labels
    for label, one in made.items():
        assert one.instruction == "wgmma"
        tile, issued = Tile(*one.tile), machine[label.removeprefix("sm_90 ")][1].loop
        assert issued.products == (tile.block_k + tile.block_n) // 16
    for name, dim in itertools.product(("hopper", "hopper keys"), (64, 128)):
        issued, pairs = machine[f"{name} D={dim}"][1].loop, 64 * 128
        assert machine[f"{name} D={dim}"][1].columns == 128
        assert 128 * issued.all <= 7.5 * pairs and 128 * issued.special == pairs


@pytest.mark.parametrize(
    ("capability", "row"),
    [((8, 0), 80), ((8, 6), 86), ((8, 7), 80), ((8, 9), 86), ((9, 0), 90), ((10, 0), 100),
     ((10, 3), 100), ((12, 0), 86), ((15, 1), 100)],
)  # fmt: skip
def test_the_nearest_architecture_is_taken(capability, row):
    assert configs.row_of(*capability) == row


def test_a_gpu_that_is_too_old_is_named():
    with pytest.raises(RuntimeError, match=r"compute capability 8.0 or newer, this one has 7.5"):
        configs.row_of(7, 5)


@pytest.mark.parametrize(
    ("dim", "found"), [(3, (64, 16)), (64, (64, 64)), (65, (128, 128)), (256, (256, 256))]
)
def test_a_tile_holds_the_vectors(monkeypatch, dim, found):
    width, block_k = found
    monkeypatch.setattr(configs, "INTERPRETED", False)
    monkeypatch.setattr(configs, "properties", lambda device: configs.Properties(90, 132))
    expected = TILES[90]["half"]["attend"][width]._replace(block_k=block_k)
    assert configs.tile("attend", dim, "half", resources.META) == expected
    assert configs.tile("stats", 257, "half", resources.META) == TILES[90]["half"]["stats"][0]


def test_blocks_fit_what_is_packed():
    for _, entry, tile in tiles():
        for block in (tile.block_m, tile.block_n):
            assert 256 % block == 0
        if entry.schedule == "two_way":
            assert tile.block_n % tile.block_m == 0
        if entry.schedule in ("attend", "gradient"):
            assert tile.block_k == entry.width  # gradients are kept whole


def test_the_table_of_resources_has_these_tiles():
    text = resources.DOC.read_text().partition("<!-- resources:begin -->")[2]
    text = text.partition("<!-- resources:end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    documented = [cells[:7] for cells in rows if cells and cells[0].startswith("sm_")]
    expected = [resources.first_columns(*found) for found in resources.configurations()]
    assert documented == expected


ENTRY = Entry("attend", 128, "half")
OTHERS = [Tile(64, 32, 128, 4, 2), Tile(128, 32, 128, 8, 3), Tile(64, 32, 128, 8, 3)]


def test_candidates():
    for architecture, entry, _ in tiles():
        found = tune.candidates(entry, architecture)
        assert 5 < len(found) < 100 and len(found) == len(set(found))
        if entry.schedule == "two_way":
            assert all(tile.block_n % tile.block_m == 0 for tile in found)
    every = tune.entries(list(tune.SCHEDULES), [64, 128, 256, 1000], list(tune.DTYPES))
    assert len(every) == sum(1 for architecture, _, _ in tiles() if architecture == 90)
    assert tune.entries(["attend"], [100], ["half"]) == [ENTRY]
    assert tune.entries(["coefficient"], [100], ["half"]) == []


def test_trials_are_timed_compared_and_undone():
    before = TILES[90]["half"]["attend"][128]
    good, wrong, failing = OTHERS

    def run():
        now = TILES[90]["half"]["attend"][128]
        if now == failing:
            raise RuntimeError("out of resources\nand more")
        return torch.ones(3) * (2 if now == wrong else 1), torch.ones(0)

    times = iter([2.0, 1.0])
    found = list(tune.trials(ENTRY, 90, run, lambda function: next(times), [before, *OTHERS]))
    assert [trial.milliseconds for trial in found] == [2.0, 1.0, None, None]
    assert "wrong by 1.0e+00" in found[2].failed
    assert found[3].failed == "RuntimeError: out of resources"
    assert tune.best(found) == found[1] and tune.best(found[2:]) is None
    assert TILES[90]["half"]["attend"][128] == before


def test_the_tile_of_the_table_comes_first(monkeypatch):
    monkeypatch.setattr(tune, "workload", lambda *arguments: lambda: (torch.ones(2),))
    found = tune.tune([ENTRY], torch.device("cpu"), 90, lambda run: 1.0)[ENTRY]
    now = TILES[90]["half"]["attend"][128]
    assert found[0] == Trial(now, 1.0)
    assert {trial.tile for trial in found} == {now, *tune.candidates(ENTRY, 90)}


def test_what_is_printed_can_be_pasted():
    for kinds in TILES.values():
        for schedules in kinds.values():
            for rows in schedules.values():
                assert eval(tune.literal(rows), {"row": row}) == rows
    now = TILES[90]["half"]["attend"][128]
    found = {ENTRY: [Trial(now, 2.0), Trial(OTHERS[0], 1.0)]}
    lines = tune.report(found, 90)
    assert lines[1].split()[:5] == ["attend", "D=128", "half", "2.000", "1.000"]
    assert lines[1].endswith(str(tuple(OTHERS[0])))
    assert lines[-1].startswith('90 half: "attend": row((') and "(64, 32, 4, 2)" in lines[-1]
    assert "nothing ran: no" in tune.report({ENTRY: [Trial(now, failed="no")]}, 90)[1]
    trial = json.loads(tune.record(found, 90))["trials"][1]
    assert trial["schedule"] == "attend" and trial["tile"]["block_n"] == 32


def test_tuning_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--dim", "0"], ["--dtype", "int8"], ["--schedule", "x"],
                                   ["--schedule", "attend", "--dim", "512"]])  # fmt: skip
def test_wrong_options_of_tune(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["tune", *wrong])
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err
