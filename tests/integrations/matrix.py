"""`make compat`: the conformance tests of each package against its versions of the last months.

    python tests/integrations/matrix.py [PACKAGE[==VERSION] ...] [--jobs 2] [--table]
    python tests/integrations/matrix.py --environment FOLDER REQUIREMENTS

Each version is installed in an environment of its own with all that it needs, but for what the
interpreter that runs this has already in a version that serves; torch and its like stay as they
are. What came out goes to versions.json, and as a table to docs/integrations.md (`--table`: only
that). The second form makes one environment of a file of requirements, without what these need.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "versions.json"
PAGE = ROOT / "docs" / "integrations.md"
MARKS = "<!-- versions -->\n", "<!-- /versions -->"
KEPT = ("torch", "triton", "torchvision")  # of the interpreter that runs this


class Package(NamedTuple):
    """distribution: as pip calls it. versions: the last of each minor one, newest first. files: of
    tests, beside the one of its name. selected, few: pytest's -k, for the matrix and for the oldest
    version in `make test`. needs: requirements instead of its own, of which some go with no torch
    but an older one."""

    distribution: str
    versions: str
    files: tuple[str, ...] = ()
    selected: str = ""
    few: str = ""
    needs: tuple[str, ...] = ()


PACKAGES = {
    "info_nce": Package("info-nce-pytorch", "0.1.4 0.1.3 0.1.1 0.1.0"),
    "lightly": Package(
        "lightly", "1.6.0 1.5.26 1.5.25 1.5.24 1.5.23 1.5.22 1.5.21 1.5.20", few="0.07 or bank"
    ),
    "open_clip": Package(
        "open_clip_torch", "3.3.0 3.2.0 3.1.0 3.0.0 2.32.0 2.31.0 2.30.0", few="not compiles"
    ),
    "pylate": Package(
        "pylate",
        "1.6.0",
        needs=("sentence-transformers==5.3.0", "datasets", "accelerate", "pandas", "ujson==5.12.0"),
    ),
    "pytorch_metric_learning": Package(
        "pytorch-metric-learning",
        "2.9.0 2.8.1 2.7.0 2.6.0",
        ("pytorch_metric_learning_unfused",),
        few="test_references or test_similarities or test_self_supervised_pairs",
    ),
    "sentence_transformers": Package(
        "sentence-transformers",
        "6.2.0 6.1.0 6.0.1 5.7.0 5.6.1 5.5.1 5.4.1 5.3.0 5.2.3 5.1.2 5.0.0",
        ("mining", "multi_vector"),
        few="test_ranking or test_symmetric or (test_training_step and not 2d and not Adaptive)",
    ),
    "transformers": Package(
        "transformers",
        "5.24.0 5.23.0 5.22.2 5.21.1 5.20.2 5.19.0 5.18.0 5.17.0 5.16.1 5.15.1 5.14.1 5.13.1 "
        "5.12.1 5.11.0 5.10.4 5.9.0 5.8.1 5.7.0 5.6.2 5.5.4 5.4.0 5.3.0 5.2.0 5.1.0 5.0.0 "
        "4.57.6 4.56.2 4.55.4 4.54.1 4.53.3 4.52.4 4.51.3 4.50.3",
        ("transformers_family",),
        "not test_loss_of_features or (37 and 0.07)",  # the models are what versions differ in
        "test_whole_model or test_loss_and_gradients",
    ),
}


def run_tests(python: str, *peers: str, few: bool = False) -> tuple[dict[str, dict], str]:
    """The records of the tests of these packages, or of a few of them, and what pytest printed."""
    names, chosen = [] if few else ["overrides", "reads"], []
    for peer in peers:
        package = PACKAGES[peer]
        names += [peer, *package.files]
        select = package.few if few else package.selected
        if len(peers) > 1:  # each has a choice of its own
            of = " or ".join(f"test_{name}.py" for name in (peer, *package.files))
            select = f"(({of}) and ({select}))" if select else f"({of})"
        chosen.append(select)
    files = [str(HERE / f"test_{name}.py") for name in names]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        search = os.pathsep.join((str(ROOT), str(HERE)))
        settings = {"PYTHONPATH": search, "CK_PEERS": ",".join(peers), "CK_RECORD": str(record)}
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "0", "-p", "recorded", "-p", "no:cacheprovider",
             "--tb=short", "-k", " or ".join(chosen), *files],
            env=os.environ | settings, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        text = done.stdout + done.stderr
        if not record.exists():
            return {peer: {"error": text} for peer in peers}, text
        return json.loads(record.read_text()), text


def environment(folder: Path, *arguments: str) -> str:
    """The interpreter of a new environment in `folder`, with what pip installs of the arguments
    beside torch and the test's own needs, which are those of this interpreter."""
    folder = folder.resolve()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = str(folder / "bin" / "python")
    base = folder / "base"
    base.mkdir()
    for name in filter(_installed, _base_names()):
        for top in {file.parts[0] for file in metadata.files(name) or ()} - {"..", "__pycache__"}:
            place = base / top
            if not place.exists():
                place.symlink_to(Path(sysconfig.get_path("purelib")) / top)
    (next(folder.glob("lib/*/site-packages")) / "base.pth").write_text(str(base))
    pins = folder / "pins.txt"
    pins.write_text("".join(f"{name}=={_installed(name)}\n" for name in KEPT if _installed(name)))
    _install(python, "-c", str(pins), *arguments)
    return python


def _install(python: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python,
         "install", "-qq", "--no-compile", *arguments],
        check=True, capture_output=True, text=True,
    )  # fmt: skip


def _base_names() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [*KEPT, *(line.partition("==")[0] for line in lines if "==" in line)]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def measure(peer: str, version: str) -> dict:
    """The record of one version; prints one line, and what failed."""
    requirement = f"{PACKAGES[peer].distribution}=={version}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            needs = PACKAGES[peer].needs
            python = environment(Path(folder) / "env", *(needs or (requirement,)))
            if needs:
                _install(python, "--no-deps", requirement)
        except subprocess.CalledProcessError as error:
            record, text = {"error": error.stderr}, error.stderr
        else:
            records, text = run_tests(python, peer)
            record = records[peer]
    print(requirement, record.get("tests", "no tests"), flush=True)
    if not passed(record):
        print(text, flush=True)
    return record


def passed(record: dict) -> bool:
    return bool(record.get("tests")) and "failed" not in record["tests"]


def wanted(names: list[str]) -> list[tuple[str, str]]:
    """(package, version) of "package" and "package==version"; of none: all."""
    pairs = []
    for name in names or list(PACKAGES):
        peer, _, version = name.partition("==")
        versions = [version] if version else PACKAGES[peer].versions.split()
        pairs += [(peer, v) for v in versions]
    return pairs


def table(results: dict) -> str:
    """Rows of neighbouring versions with the same result."""
    lines = [
        "| package | versions | tests passed | runs fused | runs the package's own code |",
        "|---|---|---|---|---|",
    ]
    for peer, package in PACKAGES.items():
        records = results.get(peer, {})
        versions = [v for v in package.versions.split() if v in records]
        newest = records[versions[0]] if versions else {}
        rows: list[tuple[list[str], str, str, list[str]]] = []
        for version in versions:
            record = records[version]
            fused, own = _fused(record, newest), _own(record, newest)
            if rows and rows[-1][1:3] == (fused, own):
                rows[-1][0].append(version)
                rows[-1][3].append(_count(record))
            else:
                rows.append(([version], fused, own, [_count(record)]))
        for shown, fused, own, counts in rows:
            span = shown[0] if len(shown) == 1 else f"{shown[-1]} – {shown[0]}"
            few = " – ".join(dict.fromkeys((min(counts, key=int), max(counts, key=int))))
            lines.append(f"| {package.distribution} | {span} | {few} | {fused} | {own} |")
    return "\n".join(lines) + "\n"


def _count(record: dict) -> str:
    return str(record["tests"].get("passed", 0))


def _title(label: str) -> str:
    return f"`{label.partition('.')[0]}`"


def _fused(record: dict, newest: dict) -> str:
    missing = sorted(set(newest["fused"]) - set(record["fused"]))
    if not missing:
        return "all"
    return "all but " + ", ".join(dict.fromkeys(map(_title, missing)))


def _own(record: dict, newest: dict) -> str:
    """Reasons that the newest version does not know."""
    known = {reason for found in newest["reasons"].values() for reason in found}
    reasons = {
        f"{_title(label)}: {reason}"
        for label, found in record["reasons"].items()
        for reason in found
        if reason not in known
    }
    skipped = set(record["skipped"]) - set(newest["skipped"])
    return "; ".join([*sorted(reasons), *sorted(skipped)]) or "–"


def with_table(page: str, results: dict) -> str:
    """The page with the table between its marks."""
    start, end = map(re.escape, MARKS)
    return re.sub(
        f"{start}.*?{end}", lambda _: MARKS[0] + table(results) + MARKS[1], page, flags=re.S
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests of the drop-ins over versions.")
    parser.add_argument("names", nargs="*", metavar="PACKAGE[==VERSION]")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="write the table, run nothing")
    parser.add_argument("--environment", type=Path, help="make one, of a file of requirements")
    options = parser.parse_args()
    if options.environment:
        environment(options.environment, "--no-deps", "-r", *options.names)
        return 0
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = []
    if not options.table:
        with ThreadPoolExecutor(options.jobs) as pool:
            running = {pool.submit(measure, *pair): pair for pair in wanted(options.names)}
            for done in as_completed(running):
                peer, version = running[done]
                if not passed(done.result()):
                    failed.append(f"{peer}=={version}")
                    continue
                results.setdefault(peer, {})[version] = done.result()
                RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), results))
    if failed:
        print("failed:", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
