"""The site: what it must describe, that it builds, and how it looks in a browser."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import Browser, chromium

import contrastive_kernels as ck
from contrastive_kernels.losses.table import LOSSES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CHROMIUM = shutil.which("chromium")
PHONE, DESK = (390, 844), (1280, 900)
# the contrast of text and background that WCAG 2 asks for
CONTRAST = """(() => {
  const light = color => color.match(/[\\d.]+/g).slice(0, 3)
      .map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const back = light(getComputedStyle(document.body).backgroundColor);
  const text = light(getComputedStyle(document.querySelector('.md-content p')).color);
  return [back, (Math.max(back, text) + 0.05) / (Math.min(back, text) + 0.05)];
})()"""


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_every_loss_has_its_page(row):
    page = (DOCS / "losses" / f"{row.name}.md").read_text()
    for part in (
        "\n$$\n", "**When to use it.**", "**Paper.**", "## Cost", "```python",
        f"::: contrastive_kernels.{row.name}\n", f"::: contrastive_kernels.{row.module.__name__}\n",
    ):  # fmt: skip
        assert part in page, part
    assert re.search(rf"ck\.{row.name}\(|ck\.{row.module.__name__}\(", page)
    assert f"]({row.name}.md)" in (DOCS / "losses" / "index.md").read_text()
    assert f": losses/{row.name}.md" in (ROOT / "mkdocs.yml").read_text()


def test_every_public_name_is_described():
    text = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
    described = re.findall(r"^::: contrastive_kernels\.(?:\w+\.)*(\w+)$", text, re.MULTILINE)
    assert sorted(described) == sorted(ck.__all__)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for module in ("material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def pages(site: Path) -> list[str]:
    found = (path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))
    return sorted("" if page == "." else f"{page}/" for page in found)


def test_nothing_comes_from_elsewhere(site):
    """No script, style, font or picture has an address of another host."""
    addresses = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(https?:[^" >]+)')
    for page in pages(site):
        assert addresses.findall((site / page / "index.html").read_text()) == [], page


def test_help_is_that_of_functions_and_classes(site):
    """Of a function and a module of one name, it is the module that mkdocstrings may take."""
    text = "".join(path.read_text() for path in (site / "losses").rglob("index.html"))
    assert "doc-module" not in text
    assert text.count("doc-object doc-class") + text.count("doc-object doc-function") >= len(
        ck.__all__
    )


def test_formulas_are_drawn(site):
    for row in LOSSES:
        text = (site / "losses" / row.name / "index.html").read_text()
        assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in text
        assert "arithmatex" not in text


@pytest.fixture(scope="module")
def served(site) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=site)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(served) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with chromium(CHROMIUM) as opened:
        yield opened


def test_pages_fit_a_phone(site, served, browser):
    """Every page has a title, and is as wide as the screen; wide tables scroll by themselves."""
    browser.show(*PHONE)
    for page in pages(site):
        browser.open(served + page)
        assert browser.run("document.querySelector('h1').textContent.length") > 2, page
        assert browser.run("document.documentElement.scrollWidth") == PHONE[0], page
        assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth)"), page
    assert len(pages(site)) > 40
    outside = [url for url in browser.requests if not url.startswith((served, "data:"))]
    assert outside == []


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(served, browser, dark):
    browser.show(*DESK, dark=dark)
    browser.open(served + "losses/nt_xent/")
    back, contrast = browser.run(CONTRAST)
    assert (back < 0.1) == dark and (back > 0.8) != dark and contrast > 4.5


@pytest.mark.parametrize(
    ("words", "page"),
    [("SigLIP", "siglip_loss"), ("nt_xent", "nt_xent"), ("queue ranks", "ranks_and_queues")],
)
def test_search_finds_a_page(served, browser, words, page):
    browser.show(*DESK)
    browser.open(served)
    browser.run("document.querySelector('.md-search__input').focus()")
    browser.send("Input.insertText", text=words)
    browser.wait(f"document.querySelector('.md-search-result__link')?.href.includes('/{page}/')")


def test_ranks_and_a_queue_in_two_clicks(served, browser):
    browser.show(*DESK)
    browser.open(served)
    click = "[...document.querySelectorAll('a')].find(a => a.textContent.trim() == {!r}).click()"
    for text, address in (("Scale", "scale/"), ("N ranks and a queue", "ranks_and_queues/")):
        browser.run(click.format(text))
        browser.wait(f"location.href == {served + address!r} && document.readyState == 'complete'")
    assert browser.run("document.querySelector('h1').textContent").startswith("N ranks")
