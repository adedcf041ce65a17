"""How a method of another package is replaced by a fused one, and put back.

A module of this folder serves one package, its peer. It makes a `Peer`, which checks that the
package is there in a version it knows, writes fused methods with `Peer.fused`, and derives classes
that use them; `patch` sets the same methods on the peer's own classes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

PEERS = (
    "info_nce",
    "lightly",
    "open_clip",
    "pytorch_metric_learning",
    "sentence_transformers",
    "transformers",
)


_imported: dict[str, list[Swap]] = {}  # of the peers whose integration has been imported


class Unfused(NamedTuple):
    """What a fused method returns when the peer's own has to run, and why.

    expected: whether a user means it so, and needs no warning.
    """

    reason: str
    expected: bool = False


class SwapStatus(NamedTuple):
    """One method of a peer.

    patched: whether the peer's own class has the fused method now.
    fused, fallback: calls that ran fused, and the others by their reason. Calls in a graph of
        torch.compile are not counted.
    """

    patched: bool
    fused: int
    fallback: dict[str, int]


class Swap:
    """A method of a peer's class, or a function of its module, and the fused one for it."""

    def __init__(self, owner: type | ModuleType, name: str, function: Callable) -> None:
        self.owner, self.name = owner, name
        self.original = getattr(owner, name)
        self.inherited = name not in vars(owner)
        self.fused_calls = 0
        self.fallbacks: Counter[str] = Counter()

        @functools.wraps(self.original)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            fused = not isinstance(result, Unfused)
            if not torch.compiler.is_compiling():
                self._count(None if fused else result)
            return result if fused else self.original(*args, **kwargs)

        self.method = method

    @property
    def title(self) -> str:
        """The class, or the name of a function."""
        return self.owner.__name__ if isinstance(self.owner, type) else self.name

    @property
    def label(self) -> str:
        """The class with its method, or the name of a function."""
        return f"{self.title}.{self.name}" if isinstance(self.owner, type) else self.name

    @property
    def patched(self) -> bool:
        return vars(self.owner).get(self.name) is self.method

    def set(self, patched: bool) -> None:
        if patched:
            setattr(self.owner, self.name, self.method)
        elif self.patched:
            if self.inherited:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self.original)

    def _count(self, unfused: Unfused | None) -> None:
        if unfused is None:
            self.fused_calls += 1
            return
        if unfused.reason not in self.fallbacks and not unfused.expected:
            warnings.warn(f"{self.label} runs unfused: {unfused.reason}", stacklevel=3)
        self.fallbacks[unfused.reason] += 1


class Peer:
    """A package that is installed in a version with the signatures its integration knows.

    Args:
        module: the name of the integration.
        distribution: what pip calls the package.
        versions: (first, first beyond), as "1.5".

    Raises:
        ImportError: it is not installed, or another version.
    """

    def __init__(self, module: str, distribution: str, versions: tuple[str, str]) -> None:
        self.swaps: list[Swap] = []
        wanted = f"{distribution} >= {versions[0]}, < {versions[1]}"
        needs = f"contrastive_kernels.integrations.{module} needs {wanted}"
        try:
            found = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(f"{needs}, which is not installed") from error
        if not _release(versions[0]) <= _release(found) < _release(versions[1]):
            raise ImportError(f"{needs}, found {found}")
        _imported[module] = self.swaps

    def load(self, module: str) -> ModuleType:
        """A module of the peer."""
        return importlib.import_module(module)

    def fused(self, owner: type | ModuleType, name: str = "forward") -> Callable:
        """Decorates the fused form of `owner.name`: same arguments; it may return Unfused."""

        def decorate(function: Callable) -> Callable:
            swap = Swap(owner, name, function)
            self.swaps.append(swap)
            return swap.method

        return decorate


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split("."))


def world_size() -> int:
    """Processes of the default group, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def patch(peer: str, *names: str) -> None:
    """Run the losses of an installed package fused, those of instances made before too.

    Args:
        peer: one of `integrations.PEERS`, e.g. "lightly".
        names: classes or functions of it; none: all that its integration has.

    Raises:
        ValueError: an unknown peer or name.
        ImportError: the peer is not installed in a version that its integration knows.
    """
    for swap in _select(peer, names):
        swap.set(True)


def unpatch(peer: str | None = None) -> None:
    """Give a peer its own methods back; None: every peer."""
    for swap in [s for swaps in _loaded(peer).values() for s in swaps]:
        swap.set(False)


@contextmanager
def patched(peer: str, *names: str) -> Iterator[None]:
    """`patch` within a with block; what was patched before it stays so."""
    changed = [swap for swap in _select(peer, names) if not swap.patched]
    for swap in changed:
        swap.set(True)
    try:
        yield
    finally:
        for swap in changed:
            swap.set(False)


def patch_status() -> dict[str, dict[str, SwapStatus]]:
    """What is patched, and how calls ran, by peer and class, of the integrations imported so far.

    The classes of `integrations` count here as the patched ones do.
    """
    return {
        peer: {
            swap.label: SwapStatus(swap.patched, swap.fused_calls, dict(swap.fallbacks))
            for swap in swaps
        }
        for peer, swaps in _loaded(None).items()
    }


def _swaps(peer: str) -> list[Swap]:
    if peer not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {peer!r}")
    return importlib.import_module(f"{__package__}.{peer}").PEER.swaps


def _loaded(peer: str | None) -> dict[str, list[Swap]]:
    return dict(_imported) if peer is None else {peer: _swaps(peer)}


def _select(peer: str, names: tuple[str, ...]) -> list[Swap]:
    swaps = _swaps(peer)
    known = {swap.title for swap in swaps}
    for name in names:
        if name not in known:
            raise ValueError(f"{peer} has {', '.join(sorted(known))} to patch, got {name!r}")
    return [swap for swap in swaps if not names or swap.title in names]
