"""The derivatives of registered operators, in reverse mode and in the transforms of torch.func, and
the one way in which a derivative that is not there is refused; derivatives by autograd in full
precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn import Parameter

P = ParamSpec("P")
T = TypeVar("T")


def in_transform() -> bool:
    """Whether this runs within a transform of torch.func (grad, vmap, jvp ...), where a tensor
    shows only what the innermost one knows of it."""
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether derivatives may be taken in forward mode here: by torch.func.jvp, jacfwd, hessian, or
    in a dual level of torch.autograd.forward_ad."""
    # torch.compile cannot trace this; operators look again when its graph runs
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def no_second_order(ctx: Any = None, *_: Any) -> Any:
    """The backward of what has no second derivative."""
    raise NotImplementedError(
        'second-order gradients need backend="reference", without group and chunks: this backward '
        "has no derivative"
    )


def no_forward_mode(ctx: Any = None, *_: Any) -> Any:
    """The jvp of what has no derivative in forward mode."""
    raise NotImplementedError(
        'forward-mode derivatives need backend="auto" or "reference", without group and chunks, in '
        "a loss that is itself called in forward mode: a kernel has none"
    )


def no_transform(what: str) -> None:
    """Raise within a transform of torch.func, and in forward mode."""
    if in_transform() or in_forward_mode():
        raise NotImplementedError(
            f"{what} cannot be differentiated by torch.func or in forward mode: use backward() or "
            "torch.autograd.grad"
        )


def in_vmap() -> bool:
    """Whether a transform around this is vmap, which runs many problems as one."""
    if not in_transform():
        return False
    functorch = torch._C._functorch
    around = functorch.get_interpreter_stack() or ()
    return any(each.key() == functorch.TransformType.Vmap for each in around)


def without_tangent(t: Tensor) -> Tensor:
    """The numbers of a tensor that may have a derivative in forward mode, as a constant."""
    return forward_ad.unpack_dual(t).primal if in_forward_mode() else t


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates what torch.compile cannot trace: a graph breaks there, once."""
    untraced = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        # without it a first call need not import the compiler
        return (untraced if torch.compiler.is_compiling() else function)(*args, **options)

    return call


def refuse_tangents(values: Iterable[Any]) -> None:
    """`no_forward_mode` if a tensor has a tangent."""
    if forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in values
    ):
        no_forward_mode()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd.Function: what it gives is refused a derivative in what
    it is made of, the gradients from above and the saved tensors.

    torch's decorator of this name does not tie the result to these, so that a second derivative
    could be 0 in silence. `ctx.ready_made`: it is made of tensors that are not saved.
    """

    @wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():  # which refuses second derivatives itself
            with torch.no_grad():
                return backward(ctx, *grads)
        ctx = _Unpacked(ctx)
        refuse_tangents((*grads, *ctx.saved_tensors))
        with torch.no_grad():
            made = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return made  # no create_graph=True
        of = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        if getattr(ctx, "ready_made", False):  # something of which a derivative may be asked
            of.append(torch.zeros((), requires_grad=True))
        if not of:
            return made
        if isinstance(made, Tensor):
            return _Refuse.apply(made, *of)
        return tuple(t if t is None else _Refuse.apply(t, *of) for t in made)

    return call


class _Unpacked:
    """A context whose saved tensors are asked for once, as activation checkpointing wants it."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, *of: Tensor) -> Tensor:
        return made.view_as(made)

    backward = staticmethod(no_second_order)


def define(library: torch.library.Library) -> Callable[[Callable[..., Any]], OpOverload]:
    """Decorates a function: it becomes an operator of its name in `library`."""

    def decorate(function: Callable[..., Any]) -> OpOverload:
        name = function.__name__.lstrip("_")
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(getattr(torch.ops, library.ns), name).default

    return decorate


def register_rules(
    library: torch.library.Library,
    op: OpOverload,
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] = lambda ctx, inputs, output: None,
    kernel: Callable[..., Any] | None = None,
    fill: Callable[[tuple, Any], Any] = lambda inputs, output: output,
) -> Callable[..., Any]:
    """Registers how an operator is traced and differentiated; `kernel`: what it does with CPU
    tensors, where that is in Python. Returns what calls the operator, without torch's dispatcher
    where that takes longer than a small problem does.

    A kernel may return None for a result that was not asked for; `fill` makes tensors of those for
    the dispatcher, which takes nothing else.

    Backward and context are as torch.library.register_autograd takes them, whose derivatives do not
    work within transforms of torch.func, as these do. vmap takes one problem after another.
    """
    torch.library.register_fake(op.name(), fake, lib=library)
    library.impl(op, _derivative(op, backward, setup_context), "Autograd")
    torch.library.register_vmap(op.name(), partial(_one_by_one, op), lib=library)
    if kernel is None:
        return op
    library.impl(op, lambda *args: fill(args, kernel(*args)), "CPU")
    direct = _derivative(kernel, backward, setup_context)
    return lambda *args: direct(*args) if _reaches_derivative(args) else op(*args)


def _reaches_derivative(args: tuple) -> bool:
    """Whether torch's dispatcher would do nothing but hand these arguments to the derivative, and
    then to the kernel of CPU tensors, and no one looks on."""
    return reaches_kernel(args) and not (
        torch._C._autograd._profiler_enabled()
        or torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradCPU)
    )


def reaches_kernel(args: tuple, gpu: bool = False) -> bool:
    """Whether a kernel of CPU tensors, or of a `gpu` too, may take these arguments: they lie in
    memory as they are, and nothing comes before."""
    if (
        torch.compiler.is_compiling()
        or in_transform()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            # without storage: gradients that are taken as a batch
            if (
                not (arg.is_cpu or (gpu and arg.is_cuda))
                or arg.is_neg()
                or not torch._C._has_storage(arg)
            ):
                return False
        elif arg is not None and isinstance(arg, Tensor):
            return False
    return True


def _derivative(run: Callable, backward_rule: Callable, setup_context: Callable) -> Callable:
    """Without the walk through the schema of register_autograd, which takes longer than a small
    loss does."""

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            # a Function turns the mode off; kernels ask it whether a backward may follow
            before = torch.is_grad_enabled()
            torch._C._set_grad_enabled(True)
            try:
                with torch._C._AutoDispatchBelowAutograd():
                    output = run(*args)
            finally:
                torch._C._set_grad_enabled(before)
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(backward_rule)

    class RuleOfTransform(Rule):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            # a Function turns these off; the transforms around this one need them
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return Rule.forward(ctx, *args)

    def call(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(args)
        if not torch.is_grad_enabled() or not _requires_grad(args):
            with torch._C._AutoDispatchBelowAutograd():
                return run(*args)
        # Function.apply itself would look at all arguments again, and start transforms anew; here,
        # below the dispatcher, the innermost one is at work, and the operator goes to the next
        if not in_transform():
            return super(torch.autograd.Function, Rule).apply(*args)
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, RuleOfTransform).apply(*args)

    return call


def _requires_grad(args: tuple) -> bool:
    # in a loop: a generator takes longer than the question
    for arg in args:
        if isinstance(arg, Tensor) and arg.requires_grad:
            return True
    return False


def _one_by_one(op: OpOverload, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """The vmap rule of an operator: its results for each problem, stacked."""
    given = list(zip(args, in_dims, strict=True))
    made = [
        op(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in given))
        for i in range(info.batch_size)
    ]
    if isinstance(made[0], Tensor):
        return torch.stack(made), 0
    results = tuple(torch.stack(each) for each in zip(*made, strict=True))
    return results, (0,) * len(results)


def precise(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function of tensors, the first argument one, that autograd differentiates: its
    products are those of its operands' dtype, forward and backward, inside autocast regions too."""

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        device = args[0].device.type  # type: ignore[attr-defined]
        with torch.autocast(device, enabled=False):
            made = function(*args, **options)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            given = (*args, *options.values())
            before = {t.grad_fn for t in given if isinstance(t, Tensor)}
            _guard_nodes(made, before, device)
        return made

    return call


def _guard_nodes(made: Any, before: set[Node | None], device: str) -> None:
    """Turn autocast off while any node between `before` and the results runs."""
    results = made if isinstance(made, tuple) else (made,)
    stack = [t.grad_fn for t in results if isinstance(t, Tensor)]
    modes: list[bool] = []

    def off(_grads: Any) -> None:
        modes.append(torch.is_autocast_enabled(device))
        torch.set_autocast_enabled(device, False)

    def back(_inputs: Any, _outputs: Any) -> None:
        torch.set_autocast_enabled(device, modes.pop())

    while stack:
        node = stack.pop()
        if node is None or node in before:
            continue
        before.add(node)
        if node.next_functions:  # not a leaf's
            node.register_prehook(off)
            node.register_hook(back)
            stack.extend(following for following, _ in node.next_functions)
