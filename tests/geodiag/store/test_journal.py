"""The journal: a torn tail costs the torn batch and nothing else; a full disk costs nothing."""

from pathlib import Path

import pyarrow as pa
import pytest

from geodiag.metrics.schema import SCHEMAS
from geodiag.store.journal import Journal, read_journal
from geodiag.store.writer import to_batch

STEPS = SCHEMAS["steps"]


def batch(step: int) -> pa.RecordBatch:
    return to_batch(
        "steps", {"step": [step], "loss": [float(step)], "routing_mode": ["on"]}, rank=0, attempt=0
    )


def steps_in(raw: bytes) -> list[int]:
    return [b["step"][0].as_py() for b in read_journal(raw)[1]]


def test_a_journal_torn_at_any_byte_of_its_last_batch_keeps_all_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rank-0-steps.arrows"
    journal = Journal(path, STEPS)
    for step in range(4):
        journal.append(batch(step))
    whole_4 = path.read_bytes()
    journal.append(batch(4))
    whole_5 = path.read_bytes()
    assert len(whole_5) > len(whole_4) + 100
    for end in range(len(whole_4), len(whole_5)):
        assert steps_in(whole_5[:end]) == [0, 1, 2, 3], f"cut at byte {end}"
    assert steps_in(whole_5) == [0, 1, 2, 3, 4]


def test_a_journal_torn_at_any_byte_at_all_gives_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "rank-0-steps.arrows"
    journal = Journal(path, STEPS)
    for step in range(3):
        journal.append(batch(step))
    whole, longest = path.read_bytes(), -1
    for end in range(len(whole) + 1):
        got = steps_in(whole[:end])
        assert got == list(range(len(got)))
        assert len(got) >= longest
        longest = len(got)
    assert longest == 3


def test_zeros_after_the_last_batch_are_not_rows(tmp_path: Path) -> None:
    path = tmp_path / "rank-0-steps.arrows"
    journal = Journal(path, STEPS)
    journal.append(batch(0))
    assert steps_in(path.read_bytes() + bytes(4096)) == [0]


@pytest.mark.parametrize("raw", [b"", b"\0" * 64, b"not an Arrow stream at all", b"\xff" * 64])
def test_nonsense_is_an_empty_journal_without_an_id(raw: bytes) -> None:
    assert read_journal(raw) == ("", [])


def test_nothing_is_on_disk_before_the_first_batch_nor_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "journal" / "rank-0-steps.arrows"
    journal = Journal(path, STEPS)
    assert not path.exists()
    journal.append(batch(0))
    old = journal.id
    journal.restart()
    assert not path.exists()
    assert journal.id != old
    journal.append(batch(1))
    assert steps_in(path.read_bytes()) == [1]


def test_a_batch_the_disk_refused_is_written_with_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "rank-0-steps.arrows"
    journal = Journal(path, STEPS)
    journal.append(batch(0))
    good = journal._file
    journal._file = FullDisk(good)  # type: ignore[assignment]
    journal._stream = pa.ipc.new_stream(journal._file, STEPS)
    with pytest.raises(OSError, match="No space left"):
        journal.append(batch(1))
    assert steps_in(path.read_bytes()) == [0]
    journal.append(batch(2))
    assert steps_in(path.read_bytes()) == [0, 1, 2]


class FullDisk:
    """A file that takes the stream's head and then refuses."""

    closed = False

    def __init__(self, file: object) -> None:
        self.file = file

    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        self.closed = True
