"""A plugin of pytest, `-p recorded`, for the tests of packages: CK_PEERS names their integrations,
and CK_RECORD the file that tells what passed, and of each package what ran fused and why the rest
did not."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

from contrastive_kernels import patch_status

PEERS, RECORD = os.environ["CK_PEERS"].split(","), os.environ["CK_RECORD"]
_outcomes: Counter[str] = Counter()
_skips: set[str] = set()
_fused: Counter[tuple[str, str]] = Counter()
_reasons: defaultdict[tuple[str, str], set[str]] = defaultdict(set)


def pytest_collection_modifyitems(config, items):
    """Leaves out what the shared files have for other packages."""

    def of_peer(item) -> bool:
        given = getattr(item, "callspec", None)
        params = given.params if given else {}
        peer = params.get("peer", getattr(params.get("case"), "peer", None))
        if item.path.stem in ("test_overrides", "test_reads"):
            return peer in PEERS
        return True

    kept = [item for item in items if of_peer(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_logreport(report):
    if report.skipped:
        _skips.add(str(report.longrepr[2]).removeprefix("Skipped: "))
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.outcome] += 1


def pytest_runtest_call(item):
    """After the test, before its fixtures are put back; pytest runs this one first."""
    _note()


def pytest_runtest_teardown(item):
    _note()


def pytest_sessionfinish():
    Path(RECORD).write_text(json.dumps({peer: _record(peer) for peer in PEERS}))


def _record(peer: str) -> dict:
    labels = sorted(patch_status().get(peer, {}))
    found = {label: sorted(_reasons[peer, label]) for label in labels}
    return {
        "tests": dict(sorted(_outcomes.items())),
        "fused": [label for label in labels if _fused[peer, label]],
        "not fused": [label for label in labels if not _fused[peer, label]],
        "reasons": {label: reasons for label, reasons in found.items() if reasons},
        "skipped": sorted(_skips),
    }


def _note() -> None:
    for peer in PEERS:
        for label, status in patch_status().get(peer, {}).items():
            _fused[peer, label] = max(_fused[peer, label], status.fused)
            _reasons[peer, label] |= set(status.fallback)
