"""Lets an allocation fail that asks for more memory than is free.

Without it Linux grants the memory, and ends the process when it is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import resource
except ImportError:  # there is none on Windows
    resource = None

# What of the free memory one step may ask for.
SHARE = 0.9
CGROUP = Path("/sys/fs/cgroup")
STATUS = Path("/proc/self/status")


def bytes_of(path: Path, field: str) -> int:
    """A field that /proc gives in kilobytes."""
    lines = path.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def free_bytes() -> int | None:
    """Memory that is free, on the machine and in the control group; None where nobody says."""
    try:
        free = bytes_of(Path("/proc/meminfo"), "MemAvailable")
    except (OSError, StopIteration):
        return None
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


@contextmanager
def limited() -> Iterator[None]:
    """Within, this process can allocate what is free, and no more; torch's error says how much
    was asked for."""
    free = free_bytes()
    if resource is None or free is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = bytes_of(STATUS, "VmSize")
    limit = mapped + int(SHARE * free)
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
