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

    def __init__(self, group: Group) -> None:
        self.name, self.ranks = WORLD, None
        if group != WORLD:
            from torch.distributed import get_process_group_ranks
            from torch.distributed import group as default

            found = resolve_group(group)
            if found is not default.WORLD:
                self.name, self.ranks = found.group_name, get_process_group_ranks(found)

    def find(self) -> ProcessGroup:
        """The group.

        Raises:
            RuntimeError: it is gone, as in another run, where its name may be that of another one.
        """
        if self.name == WORLD:
            return resolve_group(WORLD)
        from torch.distributed import get_process_group_ranks

        try:
            found = resolve_group(self.name)
        except TypeError:
            found = None
        if found is None or get_process_group_ranks(found) != self.ranks:
            raise RuntimeError(
                f"the group of ranks {self.ranks} that a module was made with is not there: make "
                'the module anew, or with group="world"'
            )
        return found

    def __repr__(self) -> str:
        return repr(self.name)


def resolve_group(group: Any) -> Any:
    """The ProcessGroup of a group, of a DeviceMesh with one dimension, or of a name.

    Raises:
        RuntimeError: "world" before torch.distributed is initialised.
        TypeError, ValueError: none of these.
    """
    from torch.distributed import ProcessGroup, is_initialized
    from torch.distributed import group as default
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import _resolve_process_group

    if isinstance(group, KeptGroup):
        return group.find()
    if group == WORLD and isinstance(group, str):
        if not is_initialized():
            raise RuntimeError(
                f"group={group!r} is found at the call, and there is none: call "
                "torch.distributed.init_process_group before"
            )
        return default.WORLD
    if isinstance(group, str) and is_initialized():
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
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
