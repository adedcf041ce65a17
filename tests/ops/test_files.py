"""Files of negatives: how they are read, and how they are written."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from oracles import DOUBLE, randn
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels.files import made_ahead

M, D = 23, 5
ROWS = randn(M, D, seed=3).cpu()


def file_of(path: Path, rows: Tensor = ROWS, **options) -> ck.FileNegatives:
    assert ck.write_negatives(path, [rows]) == len(rows)
    return ck.FileNegatives(path, **options)


def read(path: Path, **options) -> Tensor:
    return torch.cat([chunk.clone() for chunk in ck.FileNegatives(path, **options)])


def no_thread() -> bool:
    return not any("contrastive_kernels" in thread.name for thread in threading.enumerate())


def test_the_next_is_made_while_one_is_used():
    """One ahead and no more; steps that wait for one another would otherwise time out."""
    made = [threading.Event() for _ in range(6)]

    def make(step: int) -> int:
        made[step].set()
        return step

    for step in made_ahead(make, 5):
        if step < 4:
            assert made[step + 1].wait(20)
        assert not made[min(step + 2, 5)].is_set()
    assert no_thread()
    assert list(made_ahead(make, 0)) == [] and list(made_ahead(make, 1)) == [0]


def test_what_is_raised_ahead_comes_in_its_turn():
    def make(step: int) -> int:
        if step == 2:
            raise OSError("gone")
        return step

    seen = []
    with pytest.raises(OSError, match="gone"):
        seen.extend(made_ahead(make, 5))
    assert seen == [0, 1] and no_thread()


def test_a_pass_that_is_left_leaves_no_thread(tmp_path):
    source = file_of(tmp_path / "rows", chunk_rows=2)
    chunks = iter(source)
    next(chunks)
    chunks.close()
    assert no_thread()
    for chunk in source:
        assert chunk.shape == (2, D)
        break
    del chunk
    assert no_thread()
    query = randn(3, D, seed=1)
    wrong = torch.ones(3, 1, dtype=DOUBLE)
    with pytest.raises(ValueError):
        ck.info_nce(query, wrong, negatives=source)
    assert no_thread()


def test_chunks_that_are_kept_stay_as_they_are(tmp_path):
    source = file_of(tmp_path / "rows", chunk_rows=3)
    assert torch.equal(torch.cat(list(source)), ROWS)
    addresses = [chunk.data_ptr() for chunk in source]
    assert len(set(addresses)) <= 3  # of 8 chunks, none of which was kept
    views = [chunk[1:, 2:] for chunk in source]
    assert torch.equal(torch.cat(views), torch.cat([t[1:, 2:] for t in ROWS.split(3)]))


def test_progress(tmp_path):
    seen: list[tuple[int, int]] = []
    source = file_of(tmp_path / "rows", chunk_rows=9, progress=lambda *done: seen.append(done))
    query = randn(3, D, seed=1).requires_grad_()
    ck.info_nce(query, query.detach(), negatives=source).backward()
    assert seen[:4] == [(0, M), (9, M), (18, M), (M, M)]
    assert len(seen) in (4, 8)  # a backend may take a second pass
    seen.clear()
    assert [len(chunk) for chunk in source.part(4, 15)] == [9, 2]
    assert seen == [(0, 11), (9, 11), (11, 11)]

    def stop(done: int, rows: int) -> None:
        if done:
            raise KeyboardInterrupt

    source.progress = stop
    with pytest.raises(KeyboardInterrupt):
        list(source)
    assert no_thread()


def test_parts(tmp_path):
    source = file_of(tmp_path / "rows", chunk_rows=4)
    for start, stop in ((0, M), (3, 3), (5, 6), (7, 20)):
        part = source.part(start, stop)
        assert part.shape == (stop - start, D) and part.dtype == DOUBLE
        chunks = [chunk.clone() for chunk in part]
        assert torch.equal(torch.cat([ROWS[:0], *chunks]), ROWS[start:stop])
    with pytest.raises(ValueError, match="start and stop must be rows of 23, in order, got 3 and"):
        source.part(3, 24)


@pytest.mark.parametrize("how", ["shorter", "longer", "written"])
@pytest.mark.parametrize("when", ["before", "under way"])
def test_a_file_that_changed(how, when, tmp_path):
    path = tmp_path / "rows"
    source = file_of(path, chunk_rows=4)
    chunks = iter(source)
    if when == "under way":
        next(chunks)
    if how == "shorter":
        os.truncate(path, 40 * 20)
    elif how == "longer":
        ck.write_negatives(path, [ROWS[:1]], append=True)
    else:
        os.utime(path, ns=(0, 5))
    message = {
        "shorter": "is shorter than it was, of 800 bytes and not 920",
        "longer": "is longer than it was, of 960 bytes and not 920",
        "written": "has been written to",
    }[how]
    with pytest.raises(ValueError, match=f"rows {message}: make its FileNegatives anew"):
        list(chunks)
    assert no_thread()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE])
def test_what_is_written_is_read(dtype, tmp_path):
    path = tmp_path / "rows"
    rows = ROWS.to(dtype)
    strided = rows.T.contiguous().T[:4].requires_grad_()
    batches = [strided, rows[4:4], rows[4:10], rows[10:]]
    assert ck.write_negatives(path, batches) == M
    assert path.stat().st_size == M * D * dtype.itemsize
    source = ck.FileNegatives(path)
    assert (source.shape, source.dtype) == ((M, D), dtype)
    assert torch.equal(read(path), rows)
    assert ck.write_negatives(path, iter([ROWS[:2]]), append=True) == M + 2
    assert torch.equal(read(path), torch.cat((rows, ROWS[:2].to(dtype))))
    given = tmp_path / "given"
    ck.write_negatives(given, [ROWS], dtype=torch.float16)
    assert torch.equal(read(given, dim=D, dtype=torch.float16), ROWS.half())


def test_a_killed_writer_is_resumed(tmp_path):
    """The kernel kills it within a row, which then has 13 bytes."""
    path = tmp_path / "rows"
    row = D * DOUBLE.itemsize
    asked = []

    def batches(done: int):
        asked.append(done)
        for start in range(done, M, 4):
            yield ROWS[start : min(start + 4, M)]

    for limit in (2 * row + 13, 9 * row + 13):
        child = os.fork()
        if child == 0:
            try:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                ck.write_negatives(path, batches, append=True)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and path.stat().st_size == limit
    with pytest.raises(ValueError, match="whole rows of 40 bytes"):
        ck.FileNegatives(path)
    assert ck.write_negatives(path, batches, append=True) == M
    assert asked == [9]
    assert torch.equal(read(path), ROWS)
    assert ck.write_negatives(path, batches, append=True) == M  # nothing is left to do


def test_a_writer_keeps_others_out(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "rows"

    def batches():
        yield ROWS
        ck.write_negatives(path, [ROWS], append=True)

    with pytest.raises(RuntimeError, match="another process is writing .*rows"):
        ck.write_negatives(path, batches())
    assert torch.equal(read(path), ROWS)


def test_what_does_not_fit_a_file(tmp_path):
    path = tmp_path / "rows"
    for batches, error, message in (
        ([], ValueError, "batches must have at least one row, got none"),
        ([ROWS[:0]], ValueError, "at least one row"),
        ([ROWS[0]], ValueError, r"batches must have shape \(m, D\), got \(5,\)"),
        ([ROWS.long()], TypeError, "tensors of floating point numbers, got torch.int64"),
        ([[1.0]], TypeError, "got list"),
    ):
        with pytest.raises(error, match=message):
            ck.write_negatives(path, batches)
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="must be a file of rows alone, got .*npy"):
        ck.write_negatives(tmp_path / "rows.npy", [ROWS])
    with pytest.raises(TypeError, match="dtype must be float32, .* got torch.int8"):
        ck.write_negatives(path, [ROWS], dtype=torch.int8)
    ck.write_negatives(path, [ROWS])
    with pytest.raises(FileExistsError):
        ck.write_negatives(path, [ROWS])
    with pytest.raises(ValueError, match="rows as those of .*dim=5, .*float64, got dim=4"):
        ck.write_negatives(path, [ROWS[:, :4]], append=True)
    with pytest.raises(ValueError, match="dtype must be that of .*float64, got torch.float16"):
        ck.write_negatives(path, [ROWS], dtype=torch.float16, append=True)
    assert torch.equal(read(path), ROWS)


def test_a_file_of_another_dtype(tmp_path):
    path = tmp_path / "rows"
    ck.write_negatives(path, [ROWS.bfloat16()])
    with pytest.raises(ValueError, match="dtype must be that of .*bfloat16, got torch.float16"):
        ck.FileNegatives(path, D, torch.float16)
    with pytest.raises(ValueError, match="dim must be that of .*rows, 5, got 6"):
        ck.FileNegatives(path, 6)
    layout = tmp_path / "rows.json"
    for text in ("{", '{"dim": 5}', '{"dim": 5, "dtype": "int8"}', "3"):
        layout.write_text(text)
        with pytest.raises(
            ValueError, match='rows.json must be as {"dim": 128, "dtype": "bfloat16'
        ):
            ck.FileNegatives(path)
    layout.unlink()
    with pytest.raises(ValueError, match="has rows, and no .*rows.json says what they are"):
        ck.write_negatives(path, [ROWS], append=True)
    layout.write_text(json.dumps({"dim": D, "dtype": "bfloat16"}))
    assert ck.write_negatives(path, [ROWS], append=True) == 2 * M


def test_a_thread_reads_all_but_the_first_chunk(tmp_path):
    file_of(tmp_path / "rows")
    threads = []

    class Seen(ck.FileNegatives):
        def _check(self, file) -> None:
            threads.append(threading.current_thread().name)
            super()._check(file)

    assert torch.equal(torch.cat([t.clone() for t in Seen(tmp_path / "rows", chunk_rows=8)]), ROWS)
    here = threading.current_thread().name
    assert threads[:2] == [here, here] and threads[2:] == 2 * ["contrastive_kernels_0"]
