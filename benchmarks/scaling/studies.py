"""The points of the scaling studies: how time and memory grow with one size at a time."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..baselines import dense, packages
from ..baselines.baseline import eager
from ..cases.case import Case
from ..cases.inputs import Sizes
from ..cases.oracle import BLOCK, Oracle
from ..cases.table import CASES
from .oracle import directions, negatives

FEATURES = 128
QUERIES = 256
# Negatives of more bytes than this are in a file, which ours reads chunk by chunk.
RESIDENT_BYTES = 2**30


@dataclass(frozen=True)
class Point:
    """A case, at one place of the axis of its study.

    Attributes:
        x: the place.
        threads: None: those of the run.
        streamed: whether the negatives are in a file; a baseline reads all of it into memory.
    """

    x: int
    case: Case
    threads: int | None = None

    @property
    def streamed(self) -> bool:
        sizes = self.case.sizes
        return "negatives" in self.case.frozen and 4 * sizes.m * sizes.d > RESIDENT_BYTES


@dataclass(frozen=True)
class Study:
    """A size and its points; `label` names its axis, `title` what is fixed, {n} rows."""

    name: str
    label: str
    title: str
    points: Callable[[bool], list[Point]]


def _at(case: Case, sampled: Oracle, n: int, m: int, d: int = FEATURES) -> Case:
    """The case of these sizes; large ones are checked by a sample."""
    oracle = case.oracle if n * m <= BLOCK else sampled
    baselines = tuple(each for each in case.baselines if not each.on_request)
    return replace(case, sizes=Sizes(n, m, d), oracle=oracle, baselines=baselines)


INFO_NCE = replace(
    CASES["info_nce"],
    baselines=(eager(dense.info_nce), packages.LINEAR_CROSS_ENTROPY),
)
BOTH = directions("image_features", "text_features", symmetric=True)


def _info_nce(n: int, d: int = FEATURES) -> Case:
    return _at(INFO_NCE, directions("query", "key"), n, n, d)


def _negatives(quick: bool) -> list[Point]:
    places = [1024, 4096] if quick else [4**k for k in range(5, 13)]
    return [Point(m, _at(CASES["info_nce_frozen"], negatives, QUERIES, m)) for m in places]


def _batches(quick: bool) -> list[int]:
    return [256, 512] if quick else [4**k for k in range(4, 9)]


def _batch(quick: bool) -> list[Point]:
    return [Point(n, _info_nce(n)) for n in _batches(quick)]


def _clip(quick: bool) -> list[Point]:
    return [Point(n, _at(CASES["clip_loss"], BOTH, n, n)) for n in _batches(quick)]


def _features(quick: bool) -> list[Point]:
    if quick:
        return [Point(d, _info_nce(256, d)) for d in (16, 32)]
    return [Point(2**k, _info_nce(4096, 2**k)) for k in range(4, 11)]


def _threads(quick: bool) -> list[Point]:
    cores = os.cpu_count() or 1
    counts = sorted({2**k for k in range(cores.bit_length())} | {cores})
    return [Point(count, _info_nce(256 if quick else 4096), threads=count) for count in counts]


_STUDIES = (
    Study("negatives", "negatives M", "InfoNCE against frozen negatives, N = {n}", _negatives),
    Study("batch", "batch N", "InfoNCE in the batch", _batch),
    Study("clip", "batch N", "CLIP, both directions", _clip),
    Study("features", "features D", "InfoNCE, N = {n}", _features),
    Study("threads", "threads", "InfoNCE, N = {n}", _threads),
)
STUDIES = {study.name: study for study in _STUDIES}
