"""The ranks bench: nothing it starts can outlive it, and what went wrong is on its page in
capitals.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from geodiag.benchmarks.ranks_launch import Started, call
from geodiag.benchmarks.ranks_page import markdown

_PARENT = """
import subprocess, sys, time
command = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(command, start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(600)
"""


def test_a_command_that_hangs_ends_with_all_that_it_started(tmp_path: Path) -> None:
    with Started([sys.executable, "-c", _PARENT], tmp_path / "log", seconds=600) as started:
        while not started.output():
            time.sleep(0.02)
        started.ends = time.monotonic()
        assert not started.running
        ended = started.finish()
    assert ended["hung"]
    child = int(started.output().split()[1])
    assert _gone(child)


def test_a_command_that_ends_by_itself_does_not_hang_and_says_how_it_ended(tmp_path: Path) -> None:
    ended = call([sys.executable, "-c", "print('step 7/9'); exit(3)"], tmp_path / "log", seconds=60)
    assert (ended["hung"], ended["code"], ended["tail"]) == (False, 3, "step 7/9\n")


def _gone(pid: int) -> bool:
    """Also where nobody has asked for its end yet."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


def result(**parts: Any) -> dict[str, Any]:
    machine = {"cpu": "a cpu", "cores": 2, "system": "Linux"}
    return {
        "ranks": 2,
        "machine": machine,
        "versions": {"torch": "2"},
        "command": "geodiag bench ranks",
    } | parts


@pytest.mark.parametrize(
    ("begins", "code", "wrong"),
    [([20, 20], 0, False), ([30, 20], 0, True), ([10, 10], 0, True), ([20, 20], 1, True)],
)
def test_ranks_that_go_on_from_anything_but_the_newest_in_common_are_wrong(
    begins: list[int], code: int, wrong: bool
) -> None:
    part = {
        "began_again_at": begins,
        "kept": [[10, 20, 30], [10, 20, 30]],
        "lost": 30,
        "code": code,
    }
    assert ("WRONG" in markdown(result(resumed_ddp=part))) == wrong


def test_what_hung_failed_or_lost_steps_is_said_in_capitals() -> None:
    steered = {"hung": False, "alike": False, "events": {"spike": 1}}
    killed = {"hung": False, "complete": False, "seconds_to_the_end": 2.0}
    page = markdown(
        result(
            steered_ddp=steered,
            killed_ddp=killed,
            killed_fsdp={"hung": True},
            same={"failed": "OSError: no"},
        )
    )
    for words in ("DIFFERENT modes", "STEPS ARE MISSING", "| HUNG |", "FAILED: OSError: no"):
        assert words in page
    steered["alike"] = killed["complete"] = True
    page = markdown(result(steered_ddp=steered, killed_ddp=killed))
    assert not any(word.isupper() and len(word) > 3 for word in page.replace("|", " ").split())


def test_equal_losses_are_the_same_bits_and_others_are_numbers() -> None:
    cost = {"bare_ms": 10.0, "watched_ms": 11.0, "peak_gb": None}
    worker = {p: {"cost": cost, "backend": "nccl"} for p in ("ddp", "fsdp")}
    same = {"with_geodiag": 0.0, "without_again": 0.0, "with_a_broken_probe": 0.0}
    worker["ddp"]["same"], worker["fsdp"]["same"] = same, same | {"with_geodiag": 1e-7}
    page = markdown(result(worker=worker))
    assert (
        "| ddp, nccl | the same bits | the same bits | the same bits | 10.0 ms | 11.0 ms | +10.0 "
        "% |" in page
    )
    assert "| fsdp, nccl | 1.0e-07 | the same bits | the same bits |" in page
