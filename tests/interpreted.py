"""Triton's interpreter without what it repeats: the same results in a fifth of the time."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace


def prepare_once() -> None:
    """Does once what Triton does for every function call, operation and value.

    It looks through all names of its language for what it has to replace, lists the dtypes of
    numpy, checks and prints shapes, looks for the type and the shape that two operands have in
    common, and computes integers a second time for an assertion that it then leaves out. Nothing is
    done to a version of Triton that has other parts.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        prepare, np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
        builder, semantic = interpreter.interpreter_builder, interpreter.TritonSemantic
        semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value  # noqa: B018
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
        remember_operands(tl, semantic)


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


def remember_operands(tl, semantic) -> None:
    """Two operands of one type are left as they are, and a number that meets a block becomes the
    block that it became the first time: no operation writes to its operands."""
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    computed_as_they_are = {tl.int1, tl.int32, tl.int64, tl.float32, tl.float64}
    plain = {dtype.name for dtype in computed_as_they_are}
    blocks = {}

    def checked(self, lhs, rhs, *options, **more):
        kinds = type(lhs), type(rhs)
        if kinds == (tl.tensor, tl.tensor):
            if lhs.dtype.name == rhs.dtype.name and lhs.dtype.name in plain:
                return self.broadcast_impl_value(lhs, rhs)
        elif kinds in ((tl.tensor, int), (tl.tensor, float)):
            key = lhs.type.name, repr(rhs), options, *more.items()
            if key in blocks:
                return lhs, blocks[key]
            same, block = check(self, lhs, rhs, *options, **more)
            if same is lhs:
                blocks[key] = block
            return same, block
        return check(self, lhs, rhs, *options, **more)

    def broadcasted(self, lhs, rhs):
        return (lhs, rhs) if lhs.type.name == rhs.type.name else broadcast(self, lhs, rhs)

    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = checked, broadcasted
