"""How much memory logits may take that wait for a backward pass."""

from __future__ import annotations

from types import TracebackType

from .backends import CPU_ERROR


class workspace_limit:  # noqa: N801  # called like a function, as torch.no_grad is
    """Limits the memory of logits that the `cpu` backend keeps from forward to backward, in bytes.

    A forward pass keeps the logits of as many keys as fit into 64 MB, unless this says otherwise,
    for all calls of the process together; a backward pass makes the others again, at the cost of
    another product with the keys. Values and gradients are the same. The memory is free when the
    graph is; of what is free, the last piece stays for the next call.

    `workspace_limit(0)` keeps nothing. It holds from the call on, or as a context manager until its
    end.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"size must be a number of bytes, 0 or more, got {size}")
        self.before = _exchange(size)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        _exchange(self.before)


def _exchange(size: int) -> int:
    """Sets the limit and returns the former one; without the engine there is none."""
    if CPU_ERROR is not None:
        return size
    from . import _cpu  # type: ignore[attr-defined]

    before = _cpu.workspace_limit()
    _cpu.set_workspace_limit(size)
    return before


def engine_peak() -> int:
    """The most bytes of the engine's buffers at one time since this was last asked."""
    if CPU_ERROR is not None:
        return 0
    from . import _cpu  # type: ignore[attr-defined]

    return _cpu.memory_peak()
