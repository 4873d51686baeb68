"""How much more host memory this process may use: of the machine, and of its container."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 62


def free_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = _CGROUP) -> int:
    """Return the free bytes of host memory, divided by the ranks on this machine."""
    ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return min(_free_on_machine(meminfo), _free_in_container(group)) // ranks


def _free_on_machine(meminfo: Path) -> int:
    try:
        line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_in_container(group: Path) -> int:
    """Return the free bytes of the control group (version 2).

    Its inactive file cache counts as free, because the kernel gives it back on demand.
    """
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return _NO_LIMIT
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(int(limit) - used + int(stat.get("inactive_file", 0)), 0)
    except (OSError, ValueError):  # no control groups, or version 1
        return _NO_LIMIT
