"""Modules are their functions: same options, same results, and what they keep."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from oracles import randn

import contrastive_kernels as ck
from contrastive_kernels import modules

PAIR = (randn(6, 5), randn(6, 5, seed=1))
# module, function, positional inputs, options at construction, options at the call
CASES = [
    (ck.InfoNCE, ck.info_nce, PAIR, {"temperature": 0.3, "symmetric": True}, {}),
    (ck.InfoNCE, ck.info_nce, PAIR, {"in_batch": True}, {"negatives": randn(4, 5, seed=2)}),
    (ck.EqCo, ck.eqco, PAIR, {"alpha": 9.0}, {"negatives": randn(4, 5, seed=2)}),
    (ck.NTXent, ck.nt_xent, PAIR, {"temperature": 0.5}, {}),
    (ck.CLIPLoss, ck.clip_loss, (*PAIR, torch.tensor(14.0)), {"reduction": "sum"}, {}),
    (ck.CLIPDistill, ck.clip_distill, (*PAIR, 9.0, *PAIR[::-1], 5.0), {"normalize": False}, {}),
    (ck.MNRL, ck.mnrl, PAIR, {"directions": ("query_to_doc", "doc_to_query")}, {}),
    (ck.GIST, ck.gist, (*PAIR, *PAIR[::-1]), {"margin": 0.1, "temperature": 0.5}, {}),
    (ck.SigLIPLoss, ck.siglip_loss, (*PAIR, 10.0, torch.tensor(-10.0)), {}, {}),
    (ck.SupCon, ck.sup_con, (PAIR[0], torch.tensor([0, 1, 0, 1, 2, 2])), {}, {}),
    (ck.DCL, ck.dcl, PAIR, {"sigma": 0.5}, {}),
    (ck.Debiased, ck.debiased, PAIR, {"tau_plus": 0.05}, {}),
    (ck.HCL, ck.hcl, PAIR, {"beta": 0.5}, {}),
    (ck.NCE, ck.nce, (*PAIR, randn(4, 5, seed=2)), {"num_data": 100, "Z": 50.0}, {}),
    (ck.CACR, ck.cacr, (PAIR[0], randn(6, 3, 5)), {"t_pos": 0.5, "cost": "rbf"}, {}),
    (ck.CACRViews, ck.cacr_views, (randn(3, 6, 5),), {"detach_weights": True}, {}),
    (ck.CCT, ck.cct, (PAIR[0], randn(6, 3, 5)), {"t_neg": 0.9}, {}),
    (
        ck.WMSE,
        ck.w_mse,
        (randn(2, 12, 3),),
        {"group_size": 6, "eps": 0.1},
        {"permutations": torch.randperm(12)[None]},
    ),
    (ck.INTL, ck.intl, (randn(3, 6, 10),), {"axis": 1, "lam": 0.1}, {}),
]


@pytest.mark.parametrize("module, function, inputs, options, at_call", CASES)
def test_module_equals_function(module, function, inputs, options, at_call):
    loss = module(**options)
    expected = function(*inputs, **options, **at_call)
    assert torch.equal(loss(*inputs, **at_call), expected)
    restored = copy.deepcopy(loss)
    restored.load_state_dict(loss.state_dict())
    assert torch.equal(restored(*inputs, **at_call), expected)


def test_every_loss_has_its_module():
    functions = {module.function for module in modules.ContrastiveLoss.__subclasses__()}
    assert functions == {case[1] for case in CASES}


@pytest.mark.parametrize("module", modules.ContrastiveLoss.__subclasses__())
def test_signature_and_help_are_those_of_the_function(module):
    keyword_only = [
        p
        for p in inspect.signature(module.function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    ]
    assert list(inspect.signature(module).parameters.values()) == keyword_only
    assert module.function.__name__ in module.__doc__


def test_options_are_shown_and_checked():
    assert repr(ck.InfoNCE(temperature=0.2)) == "InfoNCE(temperature=0.2)"
    with pytest.raises(TypeError, match="NTXent has no option 'tau'; it has temperature"):
        ck.NTXent(tau=0.1)
    with pytest.raises(TypeError, match="scale must be a plain option here"):
        ck.InfoNCE(scale=torch.tensor(2.0))


def test_options_at_the_call_come_first():
    loss = ck.InfoNCE(temperature=0.3, return_stats=True)
    value, stats = loss(*PAIR, temperature=0.5)
    assert torch.equal(value, ck.info_nce(*PAIR, temperature=0.5))
    assert isinstance(stats, ck.LossStats)


def test_gradients_reach_a_learned_scale():
    log_scale = torch.tensor(1.0, requires_grad=True)
    ck.CLIPLoss()(*PAIR, log_scale.exp()).backward()
    assert log_scale.grad.isfinite() and log_scale.grad != 0


def test_nce_freezes_its_first_z():
    loss = ck.NCE(num_data=100, temperature=0.5)
    negatives = randn(4, 5, seed=2)
    first = loss(*PAIR, negatives)
    expected = ck.nce(*PAIR, negatives, num_data=100, temperature=0.5)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=0)

    others = (randn(6, 5, seed=5), randn(6, 5, seed=6), randn(4, 5, seed=7))
    second = loss(*others)
    assert not torch.isclose(second, ck.nce(*others, num_data=100, temperature=0.5))
    z = loss.log_z.exp()
    torch.testing.assert_close(
        second, ck.nce(*others, num_data=100, temperature=0.5, Z=z), rtol=1e-6, atol=0
    )


def test_nce_saves_its_z():
    loss = ck.NCE(num_data=100)
    fresh = ck.NCE(num_data=100)
    fresh.load_state_dict(loss.state_dict())  # of a loss that has not seen a batch
    negatives = randn(4, 5, seed=2)
    assert torch.equal(fresh(*PAIR, negatives), loss(*PAIR, negatives))

    resumed = ck.NCE(num_data=100)
    resumed.load_state_dict(loss.state_dict())
    others = (randn(6, 5, seed=5), randn(6, 5, seed=6), randn(4, 5, seed=7))
    assert torch.equal(resumed(*others), loss(*others))


def test_nce_returns_statistics():
    value, stats = ck.NCE(num_data=100, return_stats=True)(*PAIR, randn(4, 5, seed=2))
    assert value.shape == () and stats.rank.shape == (6,)
