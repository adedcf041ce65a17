"""Gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup"): a step over a batch whose activations do not fit.

A contrastive loss needs the features of the whole batch at once, but not their graphs. So the
features are made chunk by chunk without gradient, the loss gives its gradient for them as leaves,
and each chunk is encoded once more, with the random numbers that it had, to pass its part on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .autograd import no_transform
from .distributed import all_gather, resolve_group
from .types import Group
from .whitening import Whitening

Encoder = Callable[..., Any]


def cached_step(
    model: Encoder | Sequence[Encoder],
    inputs: Any,
    loss: Callable[..., Any],
    *,
    chunk: int,
    scaler: Any = None,
    group: Group | None = None,
) -> Any:
    """Forward and backward of a loss over the whole batch, in the memory of one chunk of it.

    Gradients are added to those of all parameters, as by `loss(model(inputs)).backward()`, whose
    value is returned; the model is run twice.

    Args:
        model: a module or function that encodes rows, or a tuple or list of them; one may come
            twice. It returns features (n, ...) of its n rows: a tensor, or a tuple or mapping of
            tensors. One that is 0-d must not depend on the rows, as a learned scale.
        inputs: what it takes: a tensor (N, ...), a tuple or list (passed as `model(*inputs)`) or a
            mapping (`model(**inputs)`); for several encoders a tuple or list with one of these for
            each. Tensors are cut along their first axis, all else is passed as it is.
        loss: takes the features of all rows, those of one encoder after the other, by name where
            they come in a mapping; returns a 0-d tensor, or a tuple that begins with one.
        chunk: rows that are encoded at once, at most.
        scaler: a `GradScaler`, which scales the loss before the backward.
        group: passed on to the loss, as `group=`. Its ranks then take equally many chunks, as FSDP
            needs, by those of the rank that has the most rows.

    Returns:
        What the loss returned, detached.

    Under DDP gradients are reduced with the last chunk alone, and not within `no_sync()`; a
    parameter that the loss uses must then be returned by the model. FSDP2 reduces those of every
    chunk. Autocast is that of the call. Random numbers are those of torch, on the CPU and the
    devices of inputs and parameters.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a model that cannot be run in chunks: with batch norm or `Whitening` in
            training mode, or with state that changes from call to call; no gradient is enabled.
        NotImplementedError: in transforms of torch.func and in forward mode.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a whole number >= 1, got {chunk!r}")
    no_transform("cached_step")  # which makes gradients itself
    if not torch.is_grad_enabled():
        raise RuntimeError("cached_step makes gradients: call it outside of torch.no_grad()")
    towers = _towers(model, inputs)
    steps = [max(1, -(-tower.rows // chunk)) for tower in towers]
    if group is not None:
        steps = _most(steps, group)
    for tower, count in zip(towers, steps, strict=True):
        tower.embed(count)
    torch.clear_autocast_cache()  # older torch keeps weights that were cast without gradient
    result = loss(
        *_features(towers), **_named(towers), **({} if group is None else {"group": group})
    )
    value = result[0] if isinstance(result, tuple) else result
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a 0-d tensor, alone or before others, got {got}")
    with _watched(towers):
        (value if scaler is None else scaler.scale(value)).backward()
    for place, tower in enumerate(towers):
        later = [m for other in towers[place + 1 :] for m in other.replicas]
        tower.backward([m for m in tower.replicas if m not in later])
    torch.clear_autocast_cache()  # weights will change
    if not isinstance(result, tuple):
        return value.detach()
    every = [t.detach() if isinstance(t, Tensor) else t for t in result]
    return result._make(every) if hasattr(result, "_make") else tuple(every)


def _towers(model: Any, inputs: Any) -> list[_Tower]:
    if not isinstance(model, tuple | list | nn.ModuleList):
        return [_Tower(model, inputs)]
    if not (isinstance(inputs, tuple | list) and len(inputs) == len(model)):
        got = len(inputs) if isinstance(inputs, tuple | list) else type(inputs).__name__
        raise ValueError(f"inputs must be a tuple of {len(model)}, one for each model, got {got}")
    return [_Tower(*pair) for pair in zip(model, inputs, strict=True)]


def _features(towers: list[_Tower]) -> list[Tensor]:
    """Those that the loss takes by their places."""
    return [leaf for tower in towers for key, leaf in tower.leaves.items() if isinstance(key, int)]


def _named(towers: list[_Tower]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for tower in towers:
        for key, leaf in tower.leaves.items():
            if key in named:
                raise ValueError(f"models must return features of different names, got {key} twice")
            if isinstance(key, str):
                named[key] = leaf
    return named


class _Tower:
    """An encoder and its rows."""

    def __init__(self, encoder: Encoder, inputs: Any) -> None:
        if not callable(encoder):
            raise TypeError(f"model must be a module or a function, got {type(encoder).__name__}")
        named = isinstance(inputs, Mapping)
        self.encoder = encoder
        self.named: dict[str, Any] = dict(inputs) if named else {}
        self.inputs: list[Any] = []
        if not named:
            self.inputs = list(inputs) if isinstance(inputs, tuple | list) else [inputs]
        tensors = [t for t in (*self.inputs, *self.named.values()) if isinstance(t, Tensor)]
        sizes = {len(t) for t in tensors if t.dim() > 0}
        if len(sizes) != 1:
            got = f"tensors of {sorted(sizes)} rows" if sizes else "no tensor"
            raise ValueError(f"inputs of a model must be tensors of equally many rows, got {got}")
        if any(t.requires_grad and not t.is_leaf for t in tensors):
            raise ValueError("inputs must not have a graph, which every chunk would go through")
        self.rows = sizes.pop()
        modules = _modules(encoder)
        self.modules: list[nn.Module] = [] if modules is None else modules
        self.is_known = modules is not None
        self.parts: list[slice] = []
        self.random: list[_Random] = []
        self.leaves: dict[int | str, Tensor] = {}
        devices = {t.device for t in (*tensors, *(p for m in self.modules for p in m.parameters()))}
        self.devices = sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)

    @property
    def replicas(self) -> list[Any]:
        """The modules that reduce all gradients over ranks when a backward ends."""
        if not torch.distributed.is_available():
            return []
        return [m for m in self.modules if isinstance(m, nn.parallel.DistributedDataParallel)]

    def embed(self, steps: int) -> None:
        """Makes the leaves, chunk by chunk."""
        bounds = [self.rows * i // steps for i in range(steps + 1)]
        self.parts = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
        found: list[dict[int | str, Tensor]] = []
        with torch.no_grad(), self._seen():
            for module in self.modules:
                _refuse(module)
            for part in self.parts:
                self.random.append(_Random(self.devices))
                made = self._run(part)
                # a parameter that FSDP gathered is gone after the call
                found.append({key: t.detach().clone() for key, t in made.items()})
        for key, first in found[0].items():
            every = [each[key] for each in found]
            same = first.dim() == 0 and bool((torch.stack(every) == first).all())
            if first.dim() == 0 and not same:
                raise ValueError(
                    "model must return features (n, ...) of its n rows, and what is 0-d must be "
                    "the same for every chunk"
                )
            if _looks_like_a_scale(every, self.rows):
                raise ValueError(
                    "model must return 0-d what does not depend on the rows, as a learned scale: "
                    "got shape (1,), the same for every chunk of one row; numbers of rows that are "
                    "all the same take a chunk of 2"
                )
            leaf = torch.cat(every) if first.dim() else first
            self.leaves[key] = leaf.requires_grad_(leaf.is_floating_point())

    def backward(self, last: list[Any]) -> None:
        """Passes the gradients of the leaves on, chunk by chunk; `last`: replicas that meet no
        further chunk, of another tower, after these."""
        unlike: list[Tensor] = []
        for step, (part, random) in enumerate(zip(self.parts, self.random, strict=True)):
            ends = step + 1 == len(self.parts)
            with ExitStack() as stack:
                for replica in self.replicas:
                    if not (ends and replica in last):
                        stack.enter_context(replica.no_sync())
                with random.again():
                    made = self._run(part)
                unlike += self._differences(made, part)
                if not self.devices:  # of which each look is a wait
                    _refuse_if(unlike)
                    unlike = []
                outputs, grads = [], []
                for key, t in made.items():
                    grad = self.leaves[key].grad
                    if grad is None and self.replicas:  # which wait for every parameter
                        grad = torch.zeros_like(self.leaves[key])
                    if grad is not None and t.requires_grad and (t.dim() or ends):
                        outputs.append(t)
                        grads.append(grad[part] if t.dim() else grad)
                if outputs:
                    torch.autograd.backward(outputs, grads)
            if not any(t.requires_grad for t in made.values()):
                break  # a frozen encoder
        _refuse_if(unlike)

    def _run(self, part: slice) -> dict[int | str, Tensor]:
        def cut(t: Any) -> Any:
            return t[part] if isinstance(t, Tensor) and t.dim() else t

        named = {key: cut(t) for key, t in self.named.items()}
        made: Any = self.encoder(*map(cut, self.inputs), **named)
        if isinstance(made, Tensor):
            made = (made,)
        outputs: dict[int | str, Any] = (
            dict(made) if isinstance(made, Mapping) else dict(enumerate(made))
        )
        for t in outputs.values():
            if not isinstance(t, Tensor) or (t.dim() and len(t) != part.stop - part.start):
                got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
                raise ValueError(
                    "model must return tensors of as many rows as it gets, "
                    f"{part.stop - part.start}, or 0-d, as a learned scale; got {got}"
                )
        return outputs

    def _differences(self, made: dict[int | str, Tensor], part: slice) -> Iterator[Tensor]:
        """Whether what was made again is not what it was, 0-d."""
        for key, t in made.items():
            before = self.leaves[key].detach()
            before = before[part] if t.dim() else before
            # as far as the same kernels may differ, with sums in another order
            bound = min(1e-2, torch.finfo(t.dtype).eps ** 0.5) if t.is_floating_point() else 0.0
            yield (t.detach() - before).double().norm() > bound * before.double().norm()

    @contextmanager
    def _seen(self) -> Iterator[None]:
        """Finds the modules that a function calls."""
        if self.is_known:
            yield
            return

        def see(module: nn.Module, _: Any) -> None:
            if module not in self.modules:
                _refuse(module)
                self.modules.append(module)

        with torch.nn.modules.module.register_module_forward_pre_hook(see):
            yield


def _looks_like_a_scale(every: list[Tensor], rows: int) -> bool:
    """Whether outputs (1,) of chunks of one row may be no features of rows."""
    first = every[0]
    if rows == 1 or first.shape != (1,) or not first.is_floating_point():
        return False
    return all(t.shape == first.shape for t in every) and bool((torch.stack(every) == first).all())


def _refuse_if(unlike: list[Tensor]) -> None:
    if unlike and bool(torch.stack(unlike).any()):
        raise RuntimeError(
            "model must give the same features each time it gets the same rows: it keeps "
            "state from call to call, or draws random numbers that are not torch's own"
        )


class _Random:
    """The state of torch's random numbers, on the CPU and on devices."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.others = [(d, torch.get_device_module(d).get_rng_state(d)) for d in devices]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            torch.get_device_module(device).set_rng_state(state, device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The random numbers that followed this state, and then those that follow now."""
        now = _Random([device for device, _ in self.others])
        self.restore()
        try:
            yield
        finally:
            now.restore()


def _modules(encoder: Encoder) -> list[nn.Module] | None:
    """Those of a module or of its method; None: a function, of which it is not known."""
    while isinstance(encoder, partial):
        encoder = encoder.func
    owner = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
    return list(owner.modules()) if isinstance(owner, nn.Module) else None


def _refuse(module: nn.Module) -> None:
    """Raise for a module whose rows are not each for themselves."""
    mixes = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    if mixes or (isinstance(module, Whitening) and module.training):
        raise RuntimeError(
            f"cached_step cannot run a model with {type(module).__name__} in training mode, which "
            "would see the statistics of a chunk and not of the batch: call its eval(), or use "
            "LayerNorm or GroupNorm"
        )


@contextmanager
def _watched(towers: list[_Tower]) -> Iterator[None]:
    """Raises if the backward of the loss reaches parameters that DDP is to reduce."""
    replicas = [m for tower in towers for m in tower.replicas]
    watched = [(name, p, _version(p)) for m in replicas for name, p in m.named_parameters()]
    yield
    touched = [name for name, p, before in watched if _version(p) != before]
    if touched:
        raise RuntimeError(
            f"loss must not use {touched[0]} of a DistributedDataParallel model, which would not "
            "average its gradient: let the model return it, 0-d, beside the features"
        )


def _version(parameter: Tensor) -> tuple[int, int]:
    grad = parameter.grad
    return (0, 0) if grad is None else (id(grad), grad._version)


def _most(steps: list[int], group: Group) -> list[int]:
    """The largest numbers of any rank."""
    from torch.distributed.distributed_c10d import _get_object_coll_device

    ranks = resolve_group(group)
    mine = torch.tensor([steps], device=_get_object_coll_device(ranks))
    return all_gather(mine, ranks).amax(0).tolist()
