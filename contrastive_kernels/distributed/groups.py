"""Process groups, and how a module keeps one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..types import Group

if TYPE_CHECKING:  # not there in a torch without torch.distributed
    from torch.distributed import ProcessGroup

WORLD = "world"


class KeptGroup:
    """A group that a module keeps by its name, so that it is copied, pickled and saved; it is found
    again at every call, and "world", the default group, need not be there before."""

    def __init__(self, group: Group | KeptGroup) -> None:
        if isinstance(group, KeptGroup):
            self.name: str = group.name
        elif isinstance(group, str):
            self.name = group
        else:
            from torch.distributed import group as default

            found = resolve_group(group)
            self.name = WORLD if found is default.WORLD else found.group_name

    def find(self) -> ProcessGroup:
        return resolve_group(self.name)

    def __repr__(self) -> str:
        return repr(self.name)


def resolve_group(group: Any) -> Any:
    """The ProcessGroup of a group, of a DeviceMesh with one dimension, or of a name.

    Raises:
        RuntimeError: a name before torch.distributed is initialised.
        TypeError, ValueError: none of these.
    """
    from torch.distributed import ProcessGroup, is_initialized
    from torch.distributed import group as default
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import _resolve_process_group

    if isinstance(group, KeptGroup):
        group = group.name
    if isinstance(group, str):
        if not is_initialized():
            raise RuntimeError(
                f"group={group!r} is found at the call, and there is none: call "
                "torch.distributed.init_process_group before"
            )
        if group == WORLD:
            return default.WORLD
        try:
            return _resolve_process_group(group)  # type: ignore[arg-type]  # GroupName is a str
        except (LookupError, RuntimeError, ValueError):
            pass  # said below
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a DeviceMesh of one dimension, got {group.ndim}: pass mesh[name]"
            )
        group = group.get_group()
    if not isinstance(group, ProcessGroup):
        got = repr(group) if isinstance(group, str) else type(group).__name__
        raise TypeError(
            "group must be a torch.distributed process group of this rank, a DeviceMesh or "
            f'"{WORLD}", got {got}'
        )
    return group


def world_size() -> int:
    """Processes of the default group, 1 without one."""
    from torch.distributed import get_world_size, is_available, is_initialized

    return get_world_size() if is_available() and is_initialized() else 1
