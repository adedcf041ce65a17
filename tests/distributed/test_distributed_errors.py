"""What goes wrong on one rank is an error on all of them, and names what is wrong."""

from __future__ import annotations

from functools import cache

import faults
import gloo
import pytest
import torch
import torch.distributed as dist

import contrastive_kernels as ck
from contrastive_kernels.distributed import Shards, join

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no gloo",
)


@cache
def results() -> list[dict]:
    return gloo.run(3, faults.everything)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("dtype", "image_features must be the same on every rank of group, got float64 (*, 5) on "
         "cpu on rank 0, float32 (*, 5) on cpu on rank 1, float64 (*, 5) on cpu on rank 2"),
        ("features", "z1 must be the same on every rank of group, got float64 (*, 5) on cpu on "
         "rank 0, float64 (*, 6) on cpu on rank 1"),
        ("option", "temperature must be the same on every rank of group, got 0.1 on rank 0, 0.2 on "
         "rank 1"),
        ("gradient", "image_features must be the same on every rank of group, got float64 (*, 5) "
         "on cpu on rank 0, float64 (*, 5) on cpu with gradient on rank 1"),
        ("exchange", "exchange must be the same on every rank of group, got gather on rank 0, ring "
         "on rank 1"),
        ("negatives", "got 3 on rank 0, 2 on rank 1, 3 on rank 2"),
        ("documents", "documents must be as many for each query on every rank of group, got "
         "[3, 6, 3] for [3, 3, 3] rows of query"),
        ("no rows", "a rank of group must have rows, got none on any"),
        ("loss", "loss must be the same on every rank of group, got nt_xent on rank 0, dcl on "
         "rank 1"),
    ],
)  # fmt: skip
def test_what_differs_is_named_on_every_rank(what, text):
    for seen in (report["differences"] for report in results()):
        assert seen[what].startswith("ValueError: ") and text in seen[what], seen[what]
        assert seen["after all"] == "no error"


def test_a_group_refuses_transforms():
    reports = [report["differences"] for report in results()]
    for seen in (report[how] for report in reports for how in ("transform", "tangent")):
        assert seen.startswith("NotImplementedError: a group cannot be differentiated"), seen


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("shape", "ValueError: z1 and z2 must have the same number of rows, got 4 and 3"),
        ("type", "TypeError: image_features must be a tensor, got list"),
        ("missing", "TypeError: clip_loss() missing 1 required positional argument: 'logit_scale'"),
        ("option", "ValueError: temperature must be a finite number > 0, got 0.0"),
        ("reduction", "ValueError: reduction must be \"mean\", \"sum\" or \"none\", got 'avg'"),
        ("exchange", 'ValueError: exchange must be "auto" or "gather" for gist, got "ring"'),
        ("weight", "ValueError: weight must have shape (8,), got (3,)"),
        ("module", "ValueError: query and negatives must have the same number of features D, got 5 "
         "and 2"),
        ("covariance", "ValueError: the covariance of group 0 of 2 is not positive definite: its "
         "features must be linearly independent; use eps > 0, larger groups or fewer features"),
        ("queue", "ValueError: features must have shape (N, 5), got (4, 2)"),
    ],
)  # fmt: skip
def test_an_error_of_one_rank_reaches_all(what, error):
    for rank, report in enumerate(results()):
        seen, seconds = report["errors"][what]
        assert seen == (error if rank == 1 else f"ValueError: rank 1 of group raised {error}")
        assert seconds < 10  # the backend would wait for 60
        assert report["errors"]["after all"][0] == "no error"


def test_a_rank_that_does_not_come_is_an_error_within_the_timeout(tmp_path):
    (seen, seconds), _ = gloo.run(2, faults.never_comes, str(tmp_path), timeout=2)
    assert seen.startswith("RuntimeError: ") and seconds < 10


def test_a_rank_that_dies_is_an_error(tmp_path):
    seen, seconds = gloo.run(2, faults.dies_before_backward, timeout=5)[0]
    assert seen.startswith("RuntimeError: ") and seconds < 15


def test_no_group_is_no_collective(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("a collective")

    monkeypatch.setattr("contrastive_kernels.distributed.call.all_gather", fail)
    x = torch.randn(4, 3)
    ck.clip_loss(x, x, 2.0, group=None, exchange="ring")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"group": 3}, TypeError, "group must be a torch.distributed process group .* got int"),
        ({"group": "world"}, RuntimeError, "group='world' is found at the call, .*init_process_g"),
        ({"exchange": "tree"}, ValueError, 'exchange must be "auto", "gather" or "ring"'),
    ],
)
def test_bad_groups(options, error, text):
    with pytest.raises(error, match=text):
        ck.nt_xent(torch.randn(4, 3), torch.randn(4, 3), **options)


def test_losses_without_a_ring():
    x = torch.randn(4, 3)
    for loss, inputs in ((ck.gist, (x, x, x, x)), (ck.clip_distill, (x, x, 1.0, x, x, 1.0))):
        with pytest.raises(
            ValueError, match=f'exchange must be "auto" or "gather" for {loss.__name__}, got "ring"'
        ):
            loss(*inputs, exchange="ring")


def test_sharded_negatives_need_a_group():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="sharded_negatives needs a group and negatives"):
        ck.gist(x, x, x, x, negatives=x, negatives_guide=x, sharded_negatives=True)
    for loss in (ck.info_nce, ck.eqco, ck.cacr):
        with pytest.raises(ValueError, match="sharded_negatives needs a group"):
            loss(x, x, negatives=x, sharded_negatives=True)


def test_join_without_a_group():
    batch, more = join(None, 3, 5)
    assert (batch.total, more.total) == (3, 5)
    assert not isinstance(batch, Shards) and not isinstance(more, Shards)
