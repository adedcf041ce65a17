"""Triton's interpreter without what it repeats: the same results in a quarter of the time."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace


def prepare_once() -> None:
    """Does once what Triton does for every function call, operation and value.

    It looks through all names of its language for what it has to replace, lists the dtypes of
    numpy, checks and prints shapes, and computes integers a second time for an assertion that it
    then leaves out. Nothing is done to a version of Triton that has other parts.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        prepare, np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
        builder = interpreter.interpreter_builder
        without_checks = dataclasses.replace(builder.options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        return
    if not hasattr(interpreter, "_ck_prepared"):
        interpreter._ck_prepared = True
        prepare(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        prepared = SimpleNamespace(restore=lambda: None)
        interpreter._patch_lang = lambda function: prepared
        interpreter._get_np_dtype = remember_dtypes(np_dtype)
        if not builder.options.debug:
            builder.options = without_checks
        remember_shapes(tl)


def remember_dtypes(np_dtype):
    known = {}

    def remembered(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype(dtype)
        return known[name]

    return remembered


def remember_shapes(tl) -> None:
    """Types of blocks, and tensors, have the attributes of the first ones like them."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types, tensors = {}, {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if key in types:
            vars(self).update(types[key])
        else:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))

    def tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = {k: v for k, v in vars(self).items() if k != "handle"}
        vars(self).update(tensors[type.name], handle=handle, type=type)

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
