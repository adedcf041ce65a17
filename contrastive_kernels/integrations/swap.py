"""How a method of another package is replaced by a fused one, and put back.

A module of this folder serves one package, its peer. It makes a `Peer`, which checks that the
package is there in a version it knows, writes fused methods with `Peer.fused`, and derives classes
that use them; `patch` sets the same methods on the peer's own classes. A fused method names what it
computes itself (`Own`): where a user has put something else in its place, the peer's code runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..backends import DISABLED
from ..types import known
from ._own import Own, own_function

PEERS = (
    "info_nce",
    "lightly",
    "open_clip",
    "pylate",
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
    unreached: why the patch does not serve all calls, e.g. of a function that other modules
        imported by name before it.
    """

    patched: bool
    fused: int
    fallback: dict[str, int]
    unreached: tuple[str, ...] = ()


class Swap:
    """A method of a peer's class, or a function of its module, and the fused one for it.

    own: what the fused one computes itself, of the object whose method it is, or of the module.
    refuse: called with the object and an `Unfused`; it may raise.
    choices: the values of each option that a patch may set as an attribute of the class.
    """

    def __init__(
        self,
        owner: type | ModuleType,
        name: str,
        function: Callable,
        own: Own,
        refuse: Callable[[Any, Unfused], None] | None,
        choices: dict[str, tuple[str, ...]],
    ) -> None:
        self.owner, self.name, self.choices = owner, name, choices
        self.function, self.own = function, own
        self.options: dict[str, str] = {}
        self.original = getattr(owner, name)
        self.inherited = name not in vars(owner)
        overridden = Unfused(f"{name} is overridden")
        theirs = own_function(owner, name) is None
        self.fused_calls = 0
        self.fallbacks: Counter[str] = Counter()

        @functools.wraps(self.original)
        def method(*args: Any, **kwargs: Any) -> Any:
            thing = args[0] if isinstance(owner, type) else owner
            reason = DISABLED or own.replaced(thing)
            if theirs:
                result: Any = overridden
            elif reason is not None:
                result = Unfused(reason)
            else:
                result = function(*args, **kwargs)
            fused = not isinstance(result, Unfused)
            if refuse is not None and not fused:
                refuse(thing, result)
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

    @property
    def unreached(self) -> tuple[str, ...]:
        """Why a patch does not serve all calls."""
        if self._replaced:
            return (f"{self.label} is overridden: it stays as it is",)
        if isinstance(self.owner, type) or not self.patched:
            return ()
        return tuple(
            f"held by {place}, stays unfused: import it after the patch, or call "
            f"{self.owner.__name__}.{self.name}"
            for place in _holders(self.original)
        )

    @property
    def _replaced(self) -> bool:
        """Whether neither the peer's own method nor the fused one is there."""
        found = vars(self.owner).get(self.name)
        if isinstance(found, staticmethod):
            found = found.__func__
        return found not in (self.method, None if self.inherited else self.original)

    def set(self, patched: bool, options: dict[str, str]) -> None:
        """Set or take back the fused method, with those of the options that the class has.

        A method that somebody else has put there stays.
        """
        for option in self.options:
            delattr(self.owner, option)
        self.options = {name: value for name, value in options.items() if name in self.choices}
        for option, value in self.options.items():
            setattr(self.owner, option, value)
        if self._replaced:
            return
        if patched:
            for place in self._places(self.original):
                setattr(place, self.name, self.method)
        elif self.patched and self.inherited:
            delattr(self.owner, self.name)
        elif self.patched:
            for place in self._places(self.method):
                setattr(place, self.name, self.original)

    def _places(self, held: Callable) -> list[type | ModuleType]:
        """The class; or of a function the modules of the peer that hold it under its name."""
        if isinstance(self.owner, type):
            return [self.owner]
        root = self.owner.__name__.partition(".")[0]
        modules = {id(m): m for t, m in sys.modules.items() if t.partition(".")[0] == root}
        modules[id(self.owner)] = self.owner
        return [m for m in modules.values() if getattr(m, "__dict__", {}).get(self.name) is held]

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
        self._release = release(found)
        if not release(versions[0]) <= self._release < release(versions[1]):
            raise ImportError(f"{needs}, found {found}")
        _imported[module] = self.swaps

    def since(self, version: str) -> bool:
        """Whether the installed one is `version` or newer: what older ones have is written beside
        what newer ones have."""
        return self._release >= release(version)

    def load(self, module: str) -> Any:
        """A module of the peer, whose classes are bases of ours."""
        return importlib.import_module(module)

    def fused(
        self,
        owner: type | ModuleType,
        name: str = "forward",
        *,
        own: Own,
        refuse: Callable[[Any, Unfused], None] | None = None,
        **choices: tuple[str, ...],
    ) -> Callable:
        """Decorates the fused form of `owner.name`: same arguments; it may return Unfused.

        `own`: what it computes itself of what the peer's form reads; where that is replaced, the
        peer's form runs instead. `refuse`: called with the object and the Unfused, to raise.
        `choices`: options of ours for this class, with their values; it reads them as attributes.
        """

        def decorate(function: Callable) -> Callable:
            swap = Swap(owner, name, function, own, refuse, choices)
            self.swaps.append(swap)
            return swap.method

        return decorate


def release(version: str) -> tuple[int, ...]:
    """(1, 5, 20) of "1.5.20", also of "1.5.20rc1"."""
    numbers = known(re.match(r"\d+(\.\d+)*", version))[0]
    return tuple(int(part) for part in numbers.split("."))


def patch(peer: str, *names: str, **options: str) -> None:
    """Run the losses of an installed package fused, those of instances made before too.

    Args:
        peer: one of `integrations.PEERS`, e.g. "lightly".
        names: classes or functions of it; none: all that its integration has.
        options: of the integration, for those of the classes that have them; left out: their
            defaults. open_clip's ClipLoss and SigLipLoss: grad_scale="peer" or "exact".

    Raises:
        ValueError: an unknown peer, name or value of an option.
        TypeError: an unknown option.
        ImportError: the peer is not installed in a version that its integration knows.
    """
    for swap in _select(peer, names, options):
        swap.set(True, options)
        for reason in swap.unreached:
            warnings.warn(f"{swap.label}: {reason}", stacklevel=2)


def unpatch(peer: str | None = None) -> None:
    """Give a peer its own methods back; None: every peer."""
    for swap in [s for swaps in _loaded(peer).values() for s in swaps]:
        swap.set(False, {})


@contextmanager
def patched(peer: str, *names: str, **options: str) -> Iterator[None]:
    """`patch` within a with block; what was patched before it stays so, with its options."""
    before = [(swap, swap.patched, swap.options) for swap in _select(peer, names, options)]
    for swap, _, _ in before:
        swap.set(True, options)
    try:
        yield
    finally:
        for swap, was_patched, old_options in before:
            swap.set(was_patched, old_options)


def patch_status() -> dict[str, dict[str, SwapStatus]]:
    """What is patched, and how calls ran, by peer and class, of the integrations imported so far.

    The classes of `integrations` count here as the patched ones do.
    """
    return {
        peer: {
            swap.label: SwapStatus(
                swap.patched, swap.fused_calls, dict(swap.fallbacks), swap.unreached
            )
            for swap in swaps
        }
        for peer, swaps in _loaded(None).items()
    }


def _holders(function: Any) -> Iterator[str]:
    """The names under which other modules hold a function, as module.name."""
    home = function.__module__, function.__name__
    modules = {id(module): (title, module) for title, module in reversed(sys.modules.items())}
    for title, module in modules.values():  # each once, under its first name
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is function and (title, name) != home:
                yield f"{title}.{name}"


def _swaps(peer: str) -> list[Swap]:
    if peer not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {peer!r}")
    return importlib.import_module(f"{__package__}.{peer}").PEER.swaps


def _loaded(peer: str | None) -> dict[str, list[Swap]]:
    return dict(_imported) if peer is None else {peer: _swaps(peer)}


def _select(peer: str, names: tuple[str, ...], options: dict[str, str]) -> list[Swap]:
    swaps = _swaps(peer)
    known = {swap.title for swap in swaps}
    for name in names:
        if name not in known:
            raise ValueError(f"{peer} has {', '.join(sorted(known))} to patch, got {name!r}")
    selected = [swap for swap in swaps if not names or swap.title in names]
    choices = {name: values for swap in selected for name, values in swap.choices.items()}
    for name, value in options.items():
        if name not in choices:
            of = ", ".join(names) or peer
            raise TypeError(f"options must be those of {of}: {sorted(choices)}, got {name!r}")
        check_option(name, value, choices[name])
    return selected


def check_option(name: str, value: str, choices: tuple[str, ...]) -> str:
    """`value`, if it is one of the choices for the option `name`."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value
