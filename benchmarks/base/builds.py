"""The two builds of a comparison: the one that runs, and that of another commit or folder."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import contrastive_kernels as ck

from ..harness.environment import commit, commit_of
from ..harness.paths import ROOT

PACKAGE = "contrastive_kernels"
FOLDER = ROOT / "build" / "base"
LAST_LINES = 15


class Unusable(Exception):
    """Why there is nothing to compare with."""


class Build(NamedTuple):
    """A commit, or a folder that is none, and the folder of its package."""

    name: str
    package: Path


def current() -> Build:
    return Build(commit(), Path(ck.__file__).parent)


def find(reference: str) -> Build:
    """The build in a folder, as it is; or that of a git commit, made in build/base when it is new.

    Raises:
        Unusable: there is neither, or the commit cannot be built.
    """
    folder = Path(reference)
    if (folder / PACKAGE / "__init__.py").exists():
        folder = folder.resolve()
        return Build(commit_of(folder) or str(folder), folder / PACKAGE)
    sha = _sha(reference)
    return Build(sha, _built(sha) / PACKAGE)


def _sha(reference: str) -> str:
    """The short hash of a commit of this checkout."""
    if not (ROOT / ".git").exists():
        raise Unusable(
            f"{reference} is no folder with {PACKAGE}, and only a git checkout has commits"
        )
    command = ["git", "rev-parse", "--verify", "--short=12", f"{reference}^{{commit}}"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise Unusable(f"git could not be run: {error}") from error
    if done.returncode != 0:
        raise Unusable(f"{reference} is neither a commit nor a folder with {PACKAGE}")
    return done.stdout.strip()


def _built(sha: str) -> Path:
    """The folder with this commit, and with its extension for this interpreter and torch."""
    folder, stamp = FOLDER / sha, FOLDER / f"{sha}.built"
    if not (folder / ".git").exists():
        # --force: git may remember a folder that was deleted
        _run("git", "worktree", "add", "--force", "--detach", str(folder), sha, cwd=ROOT)
        stamp.unlink(missing_ok=True)
    made_for = f"{sys.executable}, torch {torch.__version__}"
    if not stamp.exists() or stamp.read_text() != made_for:
        print(f"building {sha} in {folder}, once", flush=True)
        _run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=folder)
        stamp.write_text(made_for)
    return folder


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "CK_FORCE_BUILD": "1"},  # a failed build is an error
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        lines = "\n".join(done.stdout.splitlines()[-LAST_LINES:])
        raise Unusable(f"`{' '.join(command)}` failed in {cwd}:\n{lines}")
