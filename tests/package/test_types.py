"""What type checkers and `help` know of the package."""

import inspect
import typing

import pytest

import contrastive_kernels as ck
from contrastive_kernels.losses.base import _described
from contrastive_kernels.losses.table import LOSSES


def functions(owner: object) -> list[object]:
    """A function, or the methods of a class."""
    if not inspect.isclass(owner):
        return [owner] if callable(owner) else []
    members = (getattr(member, "fget", member) for member in vars(owner).values())
    members = (getattr(member, "__func__", member) for member in members)
    return [owner, *(member for member in members if inspect.isfunction(member))]


@pytest.mark.parametrize("name", ck.__all__)
def test_hints_of_what_is_public_can_be_read(name):
    for function in functions(getattr(ck, name)):
        typing.get_type_hints(function)


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_hints_of_losses_are_complete(row):
    hints = typing.get_type_hints(row.function)
    assert hints.keys() == {*inspect.signature(row.function).parameters, "return"}
    assert "return" in typing.get_type_hints(row.module.forward)


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_help_describes_every_argument(row):
    described = _described(inspect.getdoc(row.function))
    assert described.keys() == inspect.signature(row.function).parameters.keys()
    assert all(described.values())
