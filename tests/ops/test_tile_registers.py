"""The tile registers of AMX, which torch's own kernels use in the same threads: what each side
computes has the bits that it has alone, and they are given back."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import BACKENDS, randn, value_and_gradients
from torch import Tensor

import contrastive_kernels as ck
from tests import compiled

if "cpu" not in BACKENDS:
    pytest.skip("the cpu backend is not built here", allow_module_level=True)

from contrastive_kernels import _cpu

pytestmark = pytest.mark.skipif(_cpu.bfloat16() != "amx", reason="no AMX here")

HALF = torch.bfloat16
LOSSES = {
    "info_nce": (ck.info_nce, 300, 64),
    "clip_loss": (lambda x, y: ck.clip_loss(x, y, 20.0), 257, 130),
    "nt_xent": (ck.nt_xent, 130, 96),
    "siglip_loss": (lambda x, y: ck.siglip_loss(x, y, 10.0, -5.0), 65, 512),
}


def ours(name: str) -> list[Tensor]:
    loss, n, d = LOSSES[name]
    return value_and_gradients(loss, [randn(n, d, seed=s, dtype=HALF) for s in (1, 2)])


def torchs(name: str) -> list[Tensor]:
    """Products of oneDNN, and attention with those that torch takes from it."""
    _, n, d = LOSSES[name]
    x, y = (randn(n, d, seed=s, dtype=HALF) for s in (3, 4))
    q, k, v = (randn(1, 2, n, 64, seed=s, dtype=HALF) for s in (5, 6, 7))
    return [x @ y.T, x.T @ y, F.linear(x, y), F.scaled_dot_product_attention(q, k, v)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.fixture(params=[1, 2, 5])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_torchs_kernels_in_between(threads):
    of_torch, of_us = ({name: run(name) for name in LOSSES} for run in (torchs, ours))
    for name in [*LOSSES, *reversed(LOSSES)] * 3:
        assert same(torchs(name), of_torch[name]), name
        assert same(ours(name), of_us[name]), name


def test_several_problems_at_once(threads):
    wanted = {(run, name): run(name) for name in LOSSES for run in (ours, torchs)}

    def work(first: int) -> bool:
        torch.set_num_threads(threads)  # of this thread
        order = [*wanted][first:] + [*wanted][:first]
        return all(same(run(name), wanted[run, name]) for run, name in order * 2)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_forked_workers():
    """As a DataLoader has them, with one thread each, of a process that has used tiles."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted = {(run, name): run(name) for name in LOSSES for run in (ours, torchs)}
    children = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are other threads
            children.append(os.fork())
        if children[-1] == 0:
            right = False
            try:
                right = all(same(run(name), result) for (run, name), result in wanted.items())
            finally:
                os._exit(0 if right else 1)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """look(): which of a call's threads have tiles, or shapes of tiles, in use."""
    library = tmp_path_factory.mktemp("tiles") / "look.so"
    compiled.build(Path(__file__).with_name("tile_state.cpp"), library, "-shared", "-fPIC")
    body = ctypes.CDLL(str(library)).look
    run = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    run.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2

    def look() -> list[int]:
        found = (ctypes.c_uint32 * torch.get_num_threads())()
        assert run(0, len(found), 1, ctypes.cast(body, ctypes.c_void_p), found) == 0
        return list(found)

    return look


def refuse(gradient: Tensor) -> None:
    raise RuntimeError("refused")


@compiled.needs_compiler
def test_they_are_given_back(threads, look):
    assert look() == [0] * threads
    for name in LOSSES:
        ours(name)
        assert look() == [0] * threads, name
    # in the middle of a backward pass
    x, y = (randn(300, 64, seed=s, dtype=HALF).requires_grad_() for s in (1, 2))
    x.register_hook(refuse)
    with pytest.raises(RuntimeError, match="refused"):
        (ck.info_nce(x, y) + ck.clip_loss(x, y, 20.0)).backward()
    assert look() == [0] * threads
