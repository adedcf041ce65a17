"""What MkDocs does not do by itself: files of the repository as pages, formulas as MathML.

The pages of docs/ link to files of the repository, so that they also read well there; on the site
these links lead to the pages that are made of the files.
"""

import ast
import html
import json
import re
from pathlib import Path
from posixpath import dirname, normpath, relpath

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = [
    path
    for path in sorted((ROOT / "examples").iterdir(), key=lambda path: (path.suffix, path.name))
    if path.suffix == ".ipynb" or (path.suffix == ".py" and "__main__" in path.read_text())
]
# pages of the site by the files of the repository that they are made of
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples": "examples/index.md",
    **{f"examples/{path.name}": f"examples/{path.stem}.md" for path in EXAMPLES},
}
SOURCES = {page: source for source, page in PAGES.items() if source != "README.md"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]*)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Adds the pages that are made of files of the repository."""
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, content=text_of(ROOT / source)))
    return files


def text_of(path: Path) -> str:
    if path.is_dir():
        return examples()
    text = path.read_text()
    if path.suffix == ".py":
        return f"# {path.stem}\n\n```python\n{text}```\n"
    return notebook(json.loads(text)) if path.suffix == ".ipynb" else text


def examples() -> str:
    """A list of the examples with the first lines that they say of themselves."""
    lines = ["# Examples", ""]
    for path in EXAMPLES:
        text = path.read_text()
        if path.suffix == ".ipynb":
            head = "".join(json.loads(text)["cells"][0]["source"]).splitlines()[0].lstrip("# ")
        else:
            head = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
        lines.append(f"- [{path.name}]({path.stem}.md): {head}")
    return "\n".join(lines) + "\n"


def notebook(content: dict) -> str:
    """Its cells, and what they printed and drew."""
    parts = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown, page, config, files):
    """Links to files of the repository lead to their pages; <x, y> is a product, not a tag."""
    uri = page.file.src_uri
    if uri.startswith("losses/"):
        page.meta["search"] = {"boost": 4}  # who looks for a loss finds its page first
    source = SOURCES.get(uri, f"docs/{uri}")

    def target(match: re.Match) -> str:
        found = normpath(f"{dirname(source)}/{match[1]}".lstrip("/"))
        at = PAGES.get(found, found.removeprefix("docs/") if found.startswith("docs/") else None)
        return relpath(at, dirname(uri) or ".") if match[1] and at else match[1]

    parts = CODE.split(markdown)
    parts[::2] = [
        re.sub(r"<(?=[\w.]+, [\w.]+>)", "&lt;", LINK.sub(target, part)) for part in parts[::2]
    ]
    return "".join(parts)


def on_page_content(content, page, config, files):
    """Formulas, which Arithmatex leaves as LaTeX."""

    def formula(match: re.Match) -> str:
        display = "block" if match[1] == "div" else "inline"
        mathml = convert(html.unescape(match[2]).strip(), display=display)
        return f'<{match[1]} class="formula">{mathml}</{match[1]}>'

    return MATH.sub(formula, content)
