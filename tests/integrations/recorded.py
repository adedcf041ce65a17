"""A plugin of pytest, `-p recorded`, for the tests of one package: CK_PEER names its integration,
and CK_RECORD the file that tells what passed, what ran fused, and why the rest did not."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

from contrastive_kernels import patch_status

PEER, RECORD = os.environ["CK_PEER"], os.environ["CK_RECORD"]
_outcomes: Counter[str] = Counter()
_skips: set[str] = set()
_fused: Counter[str] = Counter()
_reasons: defaultdict[str, set[str]] = defaultdict(set)


def pytest_collection_modifyitems(config, items):
    """Leaves out what the shared files have for other packages."""

    def of_peer(item) -> bool:
        given = getattr(item, "callspec", None)
        params = given.params if given else {}
        peer = params.get("peer", getattr(params.get("case"), "peer", None))
        if item.path.stem in ("test_overrides", "test_reads"):
            return peer == PEER
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
    status = patch_status().get(PEER, {})
    record = {
        "tests": dict(sorted(_outcomes.items())),
        "fused": sorted(label for label in status if _fused[label]),
        "not fused": sorted(label for label in status if not _fused[label]),
        "reasons": {label: sorted(found) for label, found in sorted(_reasons.items()) if found},
        "skipped": sorted(_skips),
    }
    Path(RECORD).write_text(json.dumps(record))


def _note() -> None:
    for label, status in patch_status().get(PEER, {}).items():
        _fused[label] = max(_fused[label], status.fused)
        _reasons[label] |= set(status.fallback)
