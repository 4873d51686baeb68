"""How much memory there is: of the machine or of the container, whichever has less, shared among
its ranks.
"""

from pathlib import Path

import pytest

from geodiag.hooks.snapshots.host_memory import free_memory


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """64 MB free; a container of 32 MB that has taken 20, of which it could give 4 back."""
    (tmp_path / "meminfo").write_text("MemTotal:  100000 kB\nMemAvailable:   65536 kB\n")
    (tmp_path / "memory.max").write_text(f"{32 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{20 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {4 << 20}\n")
    return tmp_path / "meminfo", tmp_path


def test_the_smaller_of_machine_and_container_counts(
    machine: tuple[Path, Path], monkeypatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    meminfo, group = machine
    assert free_memory(meminfo, group) == 16 << 20
    (group / "memory.max").write_text("max\n")
    assert free_memory(meminfo, group) == 64 << 20
    (group / "memory.max").unlink()
    assert free_memory(meminfo, group) == 64 << 20
    assert free_memory(meminfo / "absent", group) > 1 << 20, (
        "a system without /proc says how much there is in all"
    )


def test_ranks_of_one_machine_share(machine: tuple[Path, Path], monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(*machine) == 4 << 20
