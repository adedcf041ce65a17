"""Every block of Python on a page runs, page by page and block after block; and the notebooks do.

`<!-- run: code -->` is code that a reader does not see, at its place. A block after
`<!-- compiled only: why -->` is compiled and not run.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import notebooks
import pytest
import torch

import contrastive_kernels as ck
from benchmarks.baselines.loading import declare_torchvision

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(
    r"<!-- run:(?P<hidden>.*?)-->"
    r"|(?P<compiled><!-- compiled only: [^>]+ -->\n)?^```(?:python|py)\n(?P<shown>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


@pytest.fixture(autouse=True)
def peers(monkeypatch):
    declare_torchvision()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def blocks(page: Path) -> list[tuple[str, bool]]:
    """(code, whether it is run) of a page, with line numbers of the page."""
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        name = "hidden" if match["hidden"] else "shown"
        line = text.count("\n", 0, match.start(name))
        found.append(("\n" * line + match[name], match["compiled"] is None))
    return found


def test_every_block_is_found():
    shown = sum(text.count("\n```") for text in (page.read_text() for page in WITH_CODE))
    assert shown % 2 == 0
    for page in WITH_CODE:
        text = page.read_text()
        assert len(re.findall(r"^ *```py", text, re.MULTILINE)) == sum(
            m["shown"] is not None for m in BLOCK.finditer(text)
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    try:
        for code, runs in blocks(page):
            compiled = compile(code, str(page), "exec")
            if runs:
                exec(compiled, names)
    except ImportError as error:  # of a package that an integration serves
        if "contrastive_kernels.integrations" not in str(error) and "ck.patch" not in code:
            raise
        pytest.skip(str(error))
    finally:
        ck.unpatch()


def text(cell: dict) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert any(cell["outputs"] for cell in code) and path.stat().st_size < 60_000
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])


def test_swap():
    for module in ("sentence_transformers", "datasets", "accelerate"):
        pytest.importorskip(module)
    before = {k: v.fused for k, v in ck.patch_status().get("sentence_transformers", {}).items()}
    notebook, names = notebooks.run(EXAMPLES / "swap.ipynb")
    assert len(names["own"]) == 10 and names["own"][-1] < 0.2 * names["own"][0]
    for own, fused in zip(names["own"], names["fused"], strict=True):
        assert abs(own - fused) <= 1e-3 * abs(own)  # what the Trainer logs is rounded
    name = "MultipleNegativesRankingLoss.compute_loss_from_embeddings"
    status = ck.patch_status()["sentence_transformers"][name]
    assert status.fused == before.get(name, 0) + 10 and not status.patched


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the memory")
@pytest.mark.skipif(not ck.backends()["cpu"].usable, reason="there are no kernels for the CPU")
def test_negatives():
    pytest.importorskip("matplotlib").use("agg")
    threads = torch.get_num_threads()
    notebook, names = notebooks.run(EXAMPLES / "negatives.ipynb")
    torch.set_num_threads(threads)
    (dense, grad), (fused, our_grad) = names["results"]
    assert abs(dense - fused) <= 1e-5 * dense
    torch.testing.assert_close(grad, our_grad, rtol=1e-4, atol=1e-7)
    _, dense_mb, _, fused_mb = names["table"][65_536]
    assert dense_mb > 100 > 64 > fused_mb  # N x M logits take 67 MB
    pictures = [o for cell in notebook["cells"] for o in cell.get("outputs", ()) if "data" in o]
    assert base64.b64decode(pictures[0]["data"]["image/png"])[:4] == b"\x89PNG"
