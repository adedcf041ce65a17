"""Modules are their functions: same options, same results, and what they keep."""

from __future__ import annotations

import copy
import inspect
from functools import partial

import pytest
import torch
from oracles import randn

import contrastive_kernels as ck
from contrastive_kernels.losses import base, table
from contrastive_kernels.losses.cases import call, tensors
from contrastive_kernels.losses.table import CASES, LOSSES

PAIR = (randn(6, 5), randn(6, 5, seed=1))


def keeps_z(name: str) -> bool:
    """The module then does not give the loss of the function: tests of its own are below."""
    row, case = CASES[name]
    return row.function is ck.nce and "Z" not in case.options


@pytest.mark.parametrize("name", [name for name in CASES if not keeps_z(name)])
def test_module_equals_function(name):
    row, case = CASES[name]
    given = tensors(case)
    options = {**case.options, "reduction": "mean" if case.coupled else "sum"}
    parameters = inspect.signature(row.function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    def at_call(loss: torch.nn.Module, **arguments) -> torch.Tensor:
        first = [arguments.pop(name) for name in positional if name in arguments]
        return loss(*first, **arguments)

    loss = row.module(**options)
    expected = call(row.function, case._replace(options=options), given)
    without = case._replace(options={})
    assert torch.equal(call(partial(at_call, loss), without, given), expected)
    restored = copy.deepcopy(loss)
    restored.load_state_dict(loss.state_dict())
    assert torch.equal(call(partial(at_call, restored), without, given), expected)


def test_every_loss_has_its_row_and_its_module():
    functions = {row.function for row in LOSSES}
    assert functions == {module.function for module in base.ContrastiveLoss.__subclasses__()}
    for row in LOSSES:
        assert row.module.function is row.function is getattr(ck, row.name)
        assert getattr(ck, row.module.__name__) is row.module
    exported = [name for row in LOSSES for name in (row.module.__name__, row.name)]
    assert sorted(table.__all__) == sorted(exported)


@pytest.mark.parametrize("module", base.ContrastiveLoss.__subclasses__())
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


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_a_group_that_was_not_there_yet_is_an_error(row, monkeypatch):
    """dist.group.WORLD is None before init_process_group, and None is no group."""
    early, none = row.module(group=None), row.module()
    monkeypatch.setattr(base, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=f'None when this {row.module.__name__} .* group="world"'):
        early.at_call({})
    assert "group" not in none.at_call({})
    assert early.at_call({"group": None})["group"] is None


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
