"""Files of negatives on three ranks beside one process with the same negatives in one tensor."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory

import gloo
import pytest
import rank_files
import torch.distributed as dist
from oracles import BACKENDS

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no gloo",
)
ENGINES = tuple(name for name in ("cpu", "reference") if name in BACKENDS)


@cache
def results() -> list[dict]:
    with TemporaryDirectory() as folder:
        return gloo.run(3, rank_files.everything, folder, ENGINES)


@pytest.mark.parametrize("name", rank_files.LOSSES)
def test_losses_are_those_of_one_process(name):
    for report in results():
        found = {k: e for k, e in report["losses"].items() if k.startswith(f"{name}, ")}
        assert len(found) >= 2 * len(ENGINES)
        for which, errors in found.items():
            assert len(errors) >= 5
            for field, error in errors.items():
                assert error <= 1e-10, (which, field)


@pytest.mark.parametrize("kind", ["lists", "few", "parts"])
def test_parts_of_other_kinds(kind):
    for report in results():
        for name in ("info_nce", "cacr"):
            assert max(report["losses"][f"{name}, {kind}"].values()) <= 1e-10


def test_gradients_of_half_precision_are_rounded_once():
    assert max(report["half"] for report in results()) <= 2**-8


def test_each_rank_reads_its_part():
    found = [report["reading"] for report in results()]
    assert [each["rows"] for each in found] == [1333, 1334, 1334]
    for each in found:
        own = each["rows"] * each["passes"] * rank_files.D * 8
        assert own <= each["bytes"] < own + 4096  # /proc itself, and what gloo reads


MESSAGES = {
    "longer": r"ValueError: .*longer.1 is longer than it was, of 600 bytes and not 440: make its",
    "shorter": r"ValueError: .*shorter.1 is shorter than it was, of 400 bytes and not 440",
    "under way": r"ValueError: .*under way.1 has been written to: make its FileNegatives anew",
    "gone": "FileNotFoundError: .*gone.1",
    "raised": "OSError: the disk is gone",
    "source": "ValueError: negatives must have the 11 rows of their shape, got 10",
}
DIFFERENCES = {
    "rows": "number of negatives must be the same .* got 11 on rank 0, 9 on rank 1, 11 on rank 2",
    "dtype": "(raised TypeError: )?query and negatives must both be float64 or neither",
    "kind": "number of negatives must be .* got 11 on rank 0, absent on rank 1, 11 on rank 2",
}


@pytest.mark.parametrize("name", [*MESSAGES, *DIFFERENCES])
def test_an_error_of_one_rank_is_raised_on_all(name):
    import re

    for rank, report in enumerate(results()):
        seen, seconds = report["errors"][name]
        expected = MESSAGES.get(name, DIFFERENCES.get(name))
        assert re.search(expected, seen), (rank, seen)
        if name in MESSAGES and rank != 1:
            assert seen.startswith("ValueError: rank 1 of group raised "), (rank, seen)
        assert seconds < 10
        assert report["errors"]["after all"][0] == "no error"
