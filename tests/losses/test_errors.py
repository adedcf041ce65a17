"""Bad input of the losses gets an error that names the argument, what it must be and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels.losses.cases import FROZEN, LEARNED, Row, call, tensors
from contrastive_kernels.losses.table import LOSSES

NAN, INF = float("nan"), float("inf")
HERE = str(torch.empty(0).device)  # as messages name it


def x(*shape: int, **options) -> torch.Tensor:
    return torch.ones(shape, **options)


def labels(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.long)


PAIR = (x(4, 3), x(4, 3))
TWO_VIEWS = [pytest.param(row, *row.two_views, id=row.name) for row in LOSSES if row.two_views]


def named(rows: Iterable[Row]) -> list:
    return [pytest.param(row, id=row.name) for row in rows]


def run(row: Row, *, n: int = 4, given: dict | None = None, **options):
    """The first case of a loss, float32 (n, 3), with other inputs or options."""
    inputs = tensors(row.first, dtype=torch.float32, N=n, D=3)
    return call(row.function, row.first, inputs | (given or {}), **options)


FEATURES = [
    pytest.param(row, name, id=f"{row.name}, {name}")
    for row in LOSSES
    for name, given in row.first.inputs.items()
    if given.kind in (*LEARNED, *FROZEN) and given.shape
]


@pytest.mark.parametrize(("row", "name"), FEATURES)
def test_features_must_be_dense(row, name):
    dense = tensors(row.first, dtype=torch.float32)[name].detach()
    sparse = dense.to_sparse()
    with pytest.raises(TypeError, match=rf"{name} must be a dense tensor, got .*to_dense\(\)"):
        run(row, n=dense.shape[0], given={name: sparse})
    nested = torch.nested.nested_tensor(list(dense.unbind()), layout=torch.jagged)
    with pytest.raises(TypeError, match=rf"{name} must be a dense tensor, got a nested one"):
        run(row, n=dense.shape[0], given={name: nested})


@pytest.mark.parametrize("row", named(LOSSES))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_meta_tensors_have_no_numbers(row, backend):
    inputs = tensors(row.first, dtype=torch.float32)
    meta = {name: t.detach().to("meta") for name, t in inputs.items()}
    with pytest.raises(ValueError, match="must have numbers, got tensors on the meta device"):
        call(row.function, row.first, meta, backend=backend)


@pytest.mark.parametrize(("row", "first", "second"), TWO_VIEWS)
def test_two_views_must_fit(row, first, second):
    def fails(error, message, a, b):
        with pytest.raises(error, match=message):
            run(row, given={first: a, second: b})

    fails(TypeError, f"{first} must be a tensor, got list", [[1.0]], x(4, 3))
    fails(TypeError, f"{second} must be a tensor, got None", x(4, 3), None)
    fails(TypeError, f"{first} must be float32.*got int64", labels(4)[:, None], x(4, 3))
    fails(ValueError, rf"{first} must have shape \(N, D\), got \(4,\)", x(4), x(4, 3))
    fails(ValueError, rf"{second} must have shape \(N, D\), got \(4, 1, 3\)", x(4, 3), x(4, 1, 3))
    fails(ValueError, f"{first} must not be empty", x(0, 3), x(0, 3))
    fails(ValueError, f"{first} must not be empty", x(4, 0), x(4, 0))
    fails(ValueError, f"{first} and {second} .*same number of rows, got 4 and 5", x(4, 3), x(5, 3))
    fails(ValueError, f"{first} and {second} .*features D, got 3 and 2", x(4, 3), x(4, 2))
    double = x(4, 3, dtype=torch.float64)
    fails(TypeError, f"{first} and {second} must both be float64 or neither", x(4, 3), double)
    meta = x(4, 3, device="meta")
    fails(ValueError, f"{first} and {second} must be on one device, got {HERE} and", x(4, 3), meta)


@pytest.mark.parametrize(("row", "first", "second"), TWO_VIEWS)
def test_a_batch_of_one_has_no_negatives(row, first, second):
    if row.alone:
        assert run(row, n=1).isfinite()
        return
    with pytest.raises(ValueError, match=f"{first} must have at least 2 rows: a batch of one has"):
        run(row, n=1)


@pytest.mark.parametrize("row", named(LOSSES))
@pytest.mark.parametrize("reduction", ["average", None])
def test_reductions(row, reduction):
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or "none", got'):
        run(row, reduction=reduction)


@pytest.mark.parametrize("row", named(LOSSES))
def test_backends(row):
    with pytest.raises(ValueError, match="backend must be .* got 'fast'"):
        run(row, backend="fast")
    message = 'backend="cuda" cannot run on cpu tensors: '
    with torch.device("cpu"), pytest.raises(RuntimeError, match=message):
        run(row, backend="cuda")


@pytest.mark.parametrize("temperature", [0.0, -0.1, NAN, INF])
@pytest.mark.parametrize("row", named(row for row in LOSSES if row.takes("temperature")))
def test_temperatures(row, temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, got"):
        run(row, temperature=temperature)


IDS = torch.arange(4)
BAD_VALUES = [
    # info_nce
    (ck.info_nce, PAIR, {"scale": NAN}, "scale must be a finite number, got nan"),
    (ck.info_nce, PAIR, {"scale": x(2)}, r"scale must be .*one element, got shape \(2,\)"),
    (ck.info_nce, PAIR, {"alpha": 0.0}, "alpha must be a finite number > 0, got 0.0"),
    (ck.info_nce, PAIR, {"in_batch": False}, "negatives must be given with in_batch=False"),
    (
        ck.info_nce,
        PAIR,
        {"negatives": x(5, 3), "symmetric": True},
        "symmetric must be False without in-batch negatives, got True",
    ),
    (ck.info_nce, PAIR, {"negatives": x(5)}, r"negatives must have shape .* got \(5,\)"),
    (ck.info_nce, PAIR, {"negatives": x(0, 3)}, "negatives must not be empty"),
    (ck.info_nce, PAIR, {"negatives": x(4, 0, 3)}, "negatives must not be empty"),
    (ck.info_nce, PAIR, {"negatives": x(5, 2, 3)}, r"N = 4 as query has, got \(5, 2, 3\)"),
    (ck.info_nce, PAIR, {"negatives": x(5, 2)}, "query and negatives .*features D, got 3 and 2"),
    (ck.info_nce, PAIR, {"key_bias": x(5)}, r"key_bias must have shape \(4,\), got \(5,\)"),
    (
        ck.info_nce,
        PAIR,
        {"negatives": x(5, 3), "in_batch": True, "key_bias": x(5)},
        r"key_bias must have shape \(9,\), got \(5,\)",
    ),
    (
        ck.info_nce,
        PAIR,
        {"exclude": (IDS, IDS[:3])},
        r"exclude: col_ids must have shape \(4,\), got \(3,\)",
    ),
    (
        ck.info_nce,
        PAIR,
        {"exclude": (IDS[:1], IDS)},
        r"exclude: row_ids must have shape \(4,\), got \(1,\)",
    ),
    # scalars
    (ck.clip_loss, (*PAIR, INF), {}, "logit_scale must be a finite number, got inf"),
    (ck.clip_loss, (*PAIR, x(3)), {}, "logit_scale must be a number or a tensor of one element"),
    (ck.siglip_loss, (*PAIR, NAN), {}, "logit_scale must be a finite number, got nan"),
    (ck.siglip_loss, (*PAIR, 1.0, NAN), {}, "logit_bias must be a finite number, got nan"),
    (ck.siglip_loss, (*PAIR, 1.0, x(2)), {}, "logit_bias must be a number or a tensor of one"),
    (ck.dcl, PAIR, {"sigma": 0.0}, "sigma must be a finite number > 0, got 0.0"),
    (ck.dcl, PAIR, {"weight": x(4)}, r"weight must have shape \(8,\), got \(4,\)"),
    (ck.dcl, PAIR, {"weight": x(8), "sigma": 0.5}, "weight and sigma must not both be given"),
    (ck.nt_xent, PAIR, {"scale": x(2)}, r"scale must be .*one element, got shape \(2,\)"),
    (ck.debiased, PAIR, {"tau_plus": 1.0}, r"tau_plus must be a finite number in \[0, 1\), got 1"),
    (ck.hcl, PAIR, {"tau_plus": NAN}, r"tau_plus must be a finite number in \[0, 1\), got nan"),
    (ck.hcl, PAIR, {"beta": -1.0}, "beta must be a finite number >= 0, got -1.0"),
    (ck.hcl, PAIR, {"beta": INF}, "beta must be a finite number >= 0, got inf"),
    # sup_con
    (ck.sup_con, (x(1, 3), labels(1)), {}, "features must have at least 2 rows"),
    (ck.sup_con, (x(4), labels(4)), {}, r"features must have shape .* got \(4,\)"),
    (ck.sup_con, (x(4, 3), labels(3)), {}, r"labels must have shape \(4,\), got \(3,\)"),
    (ck.sup_con, (x(4, 2, 3), labels(8)), {}, r"labels must have shape \(4,\), got \(8,\)"),
    (ck.sup_con, (x(4, 0, 3), labels(4)), {}, "features must"),
    (
        ck.sup_con,
        (x(4, 3), labels(4)),
        {"base_temperature": NAN},
        "base_temperature must be a finite number > 0, got nan",
    ),
    (
        ck.sup_con,
        (x(4, 3), torch.zeros(4, dtype=torch.long, device="meta")),
        {},
        f"labels and features must be on one device, got meta and {HERE}",
    ),
    # triplet
    (ck.triplet, (x(1, 3), labels(1)), {}, "features must have at least 2 rows"),
    (ck.triplet, (x(4, 3), labels(3)), {}, r"labels must have shape \(4,\), got \(3,\)"),
    (ck.triplet, (x(4, 3), labels(4)), {"mining": "easy"}, "mining must be one of hard, semihard"),
    (ck.triplet, (x(4, 3), labels(4)), {"margin": NAN}, "margin must be a finite number, got nan"),
    (
        ck.triplet,
        (x(4, 3), labels(4)),
        {"margin": None, "mining": "semihard"},
        'margin must be a number with mining="semihard", got None',
    ),
    (
        ck.triplet,
        (x(4, 3), labels(4)),
        {"distance": "cosine", "normalize": False},
        "distance must be a Euclidean one with normalize=False",
    ),
    (
        ck.triplet,
        (x(4, 3), torch.zeros(4, dtype=torch.long, device="meta")),
        {},
        f"labels must be on {HERE}, got meta",
    ),
    # nce
    (ck.nce, (*PAIR, x(5, 3)), {"num_data": 0}, "num_data must be a finite number > 0, got 0"),
    (ck.nce, (*PAIR, x(5, 3)), {"num_data": 9, "Z": -1.0}, "Z must be a finite number > 0"),
    (ck.nce, (*PAIR, x(5, 3)), {"num_data": 9, "Z": x(2)}, "Z must be a number or a tensor of one"),
    (ck.nce, (*PAIR, x(5, 3)), {"num_data": 9, "log_z": NAN}, "log_z must be a finite number"),
    (ck.nce, (*PAIR, x(3, 5, 3)), {"num_data": 9}, "N = 4 as query has"),
    # cacr
    (ck.cacr, (x(1, 3), x(1, 3)), {}, "query must have at least 2 rows: a batch of one has no"),
    (ck.cacr, (x(4, 3), x(5, 3)), {}, r"positives must have shape .* N = 4 .* got \(5, 3\)"),
    (ck.cacr, (x(4, 3), x(4, 0, 3)), {}, r"positives must have shape .* got \(4, 0, 3\)"),
    (ck.cacr, (x(4, 3), x(4, 2)), {}, "query and positives .*features D, got 3 and 2"),
    (ck.cacr, PAIR, {"negatives": x(4, 5, 3)}, r"negatives must have shape \(N, D\), got"),
    (ck.cacr, PAIR, {"t_pos": -1.0}, "t_pos must be a finite number >= 0, got -1.0"),
    (ck.cacr, PAIR, {"t_neg": 0.0}, "t_neg must be a finite number > 0, got 0.0"),
    (ck.cacr, PAIR, {"t_neg": NAN}, "t_neg must be a finite number > 0, got nan"),
    (ck.cacr, PAIR, {"cost": "cosine"}, 'cost must be "euclidean" or "rbf", got \'cosine\''),
    (ck.cacr, PAIR, {"cost": "rbf", "rbf_t": 0.0}, "rbf_t must be a finite number > 0, got 0.0"),
    (
        ck.cacr,
        PAIR,
        {"cost": "rbf", "reduction": "none"},
        'reduction must be "mean" with cost="rbf", whose rows are coupled, got \'none\'',
    ),
    (ck.cacr_views, (x(1, 4, 3),), {}, r"V >= 2 and N >= 2, got \(1, 4, 3\)"),
    (ck.cacr_views, (x(3, 1, 3),), {}, r"V >= 2 and N >= 2, got \(3, 1, 3\)"),
    (ck.cacr_views, (x(4, 3),), {}, r"views must have shape .* got \(4, 3\)"),
    (ck.cacr_views, (x(3, 4, 3),), {"reduction": "max"}, "reduction must be"),
    (ck.cct, PAIR, {"t_neg": -1.0}, "t_neg must be a finite number > 0, got -1.0"),
    # w_mse
    (
        ck.w_mse,
        (x(2, 4, 3),),
        {"group_size": 4, "permutations": torch.zeros(1, 4, dtype=torch.long, device="meta")},
        f"permutations must be on {HERE}, got meta",
    ),
    # rince
    (ck.rince, PAIR, {"q": 0.0}, r"q must be a number in \(0, 1\], got 0.0"),
    (ck.rince, PAIR, {"q": NAN}, r"q must be a number in \(0, 1\], got nan"),
    (ck.rince, PAIR, {"lam": 0.0}, "lam must be a finite number > 0, got 0.0"),
    # cpc
    (ck.cpc, (x(4, 3, 2, 5), x(4, 2, 5)), {}, "must have the 2 times of targets, got 3"),
    (ck.cpc, (x(4, 1, 2, 5), x(4, 1, 5)), {}, "at least 1 step and 2 times, got shapes"),
    (ck.cpc, (x(3, 4, 2, 5), x(2, 4, 5)), {}, "same number of rows, got 3 and 2"),
    (
        ck.cpc,
        (x(1, 4, 2, 5), x(1, 4, 5)),
        {"negatives_from": "sequences"},
        "needs at least 2 sequences, got 1",
    ),
    (
        ck.cpc,
        (x(4, 4, 2, 5), x(4, 4, 5)),
        {"negatives_from": "all"},
        "negatives_from must be one of sequences, times, both, got 'all'",
    ),
    # intl
    (ck.intl, (x(1, 4, 3),), {}, r"V >= 2, got \(1, 4, 3\)"),
    (ck.intl, (x(4, 3),), {}, r"views must have shape .* got \(4, 3\)"),
    (ck.intl, (x(2, 4, 3),), {"axis": 2}, "axis must be 0 .* or 1 .*, got 2"),
    (ck.intl, (x(2, 4, 1),), {}, r"at least 2 features with axis=0, got shape \(2, 4, 1\)"),
    (ck.intl, (x(2, 1, 3),), {"axis": 1}, r"at least 2 samples with axis=1, got shape"),
    (ck.intl, (x(2, 4, 3),), {"lam": -0.1}, "lam must be a finite number >= 0, got -0.1"),
    (ck.intl, (x(2, 4, 3),), {"lam": NAN}, "lam must be a finite number >= 0, got nan"),
    (ck.intl, (x(2, 4, 3),), {"iterations": 0}, "iterations must be at least 1, got 0"),
    (ck.intl, (x(2, 4, 3),), {"reduction": "max"}, "reduction must be"),
    # mi_lower_bound
    (ck.mi_lower_bound, (x(3), 0), {}, "num_negatives must be at least 1, got 0"),
]


@pytest.mark.parametrize("loss, inputs, options, message", BAD_VALUES)
def test_bad_values(loss, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        loss(*inputs, **options)


BAD_TYPES = [
    (ck.info_nce, PAIR, {"key_bias": [0.0] * 4}, "key_bias must be a tensor, got list"),
    (ck.dcl, PAIR, {"weight": [1.0] * 8}, "weight must be a tensor, got list"),
    (
        ck.w_mse,
        (x(2, 4, 3),),
        {"group_size": 4, "permutations": [0]},
        "permutations must be an int",
    ),
    (ck.info_nce, PAIR, {"temperature": torch.tensor(0.1)}, "temperature must be a number, got a"),
    (ck.info_nce, PAIR, {"exclude": IDS}, "exclude must be a pair"),
    (ck.info_nce, PAIR, {"exclude": (x(4), IDS)}, "exclude: row_ids must be an integer tensor"),
    (ck.info_nce, PAIR, {"exclude": (IDS, [0] * 4)}, "exclude: col_ids .* got list"),
    (
        ck.info_nce,
        PAIR,
        {"exclude": (IDS, IDS.to(torch.uint64))},
        "exclude: row_ids and col_ids must both be uint64 or neither, got torch.int64 and",
    ),
    (
        ck.info_nce,
        PAIR,
        {"negatives": x(5, 3, dtype=torch.float64)},
        "query and negatives must both be float64 or neither",
    ),
    (ck.sup_con, (x(4, 3), x(4)), {}, "labels must be an integer tensor, got torch.float32"),
    (ck.sup_con, (x(4, 3), None), {}, "labels must be an integer tensor, got NoneType"),
    (ck.nce, (*PAIR, None), {"num_data": 9}, "negatives must be a tensor, .* got NoneType"),
    (ck.cacr, (x(4, 3), None), {}, "positives must be a tensor, got NoneType"),
]


@pytest.mark.parametrize("loss, inputs, options, message", BAD_TYPES)
def test_bad_types(loss, inputs, options, message):
    with pytest.raises(TypeError, match=message):
        loss(*inputs, **options)


def test_numbers_that_are_tensors_are_welcome_where_they_may_be_learned():
    scale = torch.full((1,), math.log(10.0), requires_grad=True)
    loss = ck.clip_loss(*PAIR, scale.exp()) + ck.siglip_loss(*PAIR, scale.exp(), -scale)
    loss.backward()
    assert scale.grad.shape == (1,) and scale.grad.isfinite().all()
