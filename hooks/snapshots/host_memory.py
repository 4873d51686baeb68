"""How much memory a process may still take: of the machine, and of the container that it runs in."""

import os
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def free_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = _GROUP) -> int:
    """Bytes of host memory that this process could have, its share where several ranks are on one
    machine.
    """
    ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return min(_of_the_machine(meminfo), _of_the_container(group)) // ranks


def _of_the_machine(meminfo: Path) -> int:
    try:
        line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_the_container(group: Path) -> int:
    """What the control group leaves; caches that it could give back are not counted as taken."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return 1 << 62
        taken = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(int(limit) - taken + int(stat.get("inactive_file", 0)), 0)
    except (OSError, ValueError):  # no control groups here, or of the older kind
        return 1 << 62
