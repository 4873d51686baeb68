"""Nothing lost: kill -9 at random moments, a full disk, two writers, readers while files come and
go.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from geodiag.errors import GeodiagError
from geodiag.run import Run, open_run
from geodiag.store import parquet_parts as parts
from geodiag.store import writer as writing
from geodiag.store.parquet_parts import list_parts, write_part
from geodiag.store.writer import TableWriter

WRITER = """
import sys
from geodiag.store import writer as writing
from geodiag.run import Run
writing.ROLL_BATCHES = 7                      # so that kills hit rolls and merges too
run = Run.create(sys.argv[1])
step = int(sys.argv[2])
print("begun", flush=True)
while True:
    places = {"layer": [0, 0, 1, 1], "site": ["attn", "ffn"] * 2}
    run.append("layers", {"step": [step] * 4, **places, "flip_rate": 0.5})
    run.append("steps", {"step": [step], "loss": [float(step)]})
    run.heartbeat(step)
    print(step, flush=True)
    step += 1
"""


def writer(*args: object) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> list[int]:
    """Kills the writer; the steps it said were appended."""
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    return [int(line) for line in out.splitlines() if line.isdigit()]


@pytest.mark.slow
def test_fifty_kills_at_random_moments_lose_no_step_that_was_appended(tmp_path: Path) -> None:
    rng, step = random.Random(2), 0
    for _ in range(50):
        process = writer(tmp_path / "run", step)
        assert process.stdout.readline() == "begun\n"
        heard = [int(process.stdout.readline()) for _ in range(rng.randrange(24))]
        time.sleep(rng.uniform(0.0, 0.01))
        said = heard + kill(process)
        run = open_run(tmp_path / "run")
        have = run.read("steps")["step"].tolist()
        assert have in (list(range(len(have))), []), "every step once, in order"
        assert set(said) <= set(have)
        assert len(have) - step - len(said) in (0, 1), (
            "at most the step that was in flight is there unsaid"
        )
        assert run.read("layers").groupby("step").size().loc[: step + len(said) - 1].eq(4).all()
        assert run.status() == "interrupted"
        assert run.problems == {}
        step = len(have)
    assert step > 500
    assert len(list((tmp_path / "run/steps/rank-0").iterdir())) < 60


def test_a_killed_runs_journal_is_folded_once_however_often_it_is_reopened(
    make_run, tmp_path: Path
) -> None:
    run = make_run(steps=5, close=False)
    del run
    journal = tmp_path / "run/journal/rank-0-steps.arrows"
    saved = journal.read_bytes()
    for _ in range(3):
        journal.write_bytes(
            saved
        )  # as if killed after the part was closed, before the journal went
        del _
        again = Run.create(tmp_path / "run")
        assert again.read("steps", attempt="all")["step"].tolist() == [0, 1, 2, 3, 4]
        assert not journal.exists()
        del again


def test_what_a_killed_merge_left_is_read_once_and_swept_at_the_next_start(
    make_run, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(writing, "ROLL_BATCHES", 2)
    unlink = os.unlink
    monkeypatch.setattr(
        parts.os, "unlink", lambda path: None
    )  # killed before the first of them went
    make_run(steps=20)
    monkeypatch.setattr(parts.os, "unlink", unlink)
    folder = tmp_path / "run/steps/rank-0"
    (folder / ".part-00000000-00000001.parquet.tmp").write_bytes(b"half")
    assert len(list(folder.glob("*.parquet"))) == 11
    assert open_run(tmp_path / "run").read("steps")["step"].tolist() == list(range(20))
    Run.create(tmp_path / "run").close()
    assert [p.name for p in folder.iterdir()] == ["part-00000000-00000019.parquet"]
    assert open_run(tmp_path / "run").read("steps")["step"].tolist() == list(range(20))


def test_parts_that_name_no_journal_stand_for_themselves(make_run, tmp_path: Path) -> None:
    run = make_run(steps=4)
    rows = run.read_arrow("steps")
    write_part(tmp_path / "run/steps/rank-1", rows, [])
    write_part(tmp_path / "run/steps/rank-1", rows, ["x", "y"])
    write_part(tmp_path / "run/steps/rank-1", rows, ["y"])
    found = list_parts(run._store, "steps/rank-1", {})
    assert sorted(len(p.journals) for p in found) == [0, 2]


@pytest.mark.slow
def test_a_reader_sees_every_step_once_while_parts_roll_and_merge(tmp_path: Path) -> None:
    process = writer(tmp_path / "run", 0)
    assert process.stdout.readline() == "begun\n"
    said = 0

    def listen() -> None:
        nonlocal said
        for line in process.stdout:
            said = int(line) + 1

    listener = threading.Thread(target=listen)
    listener.start()
    reads, began = 0, time.monotonic()
    try:
        # Six seconds of looking, and longer on a busy machine: enough parts have to roll and merge
        # meanwhile.
        while time.monotonic() < began + 6 or (said <= 300 and time.monotonic() < began + 60):
            before = said
            run = open_run(tmp_path / "run")
            have = run.read("steps", ["step"])["step"].tolist()
            assert have == list(range(len(have))), "no gap, no double, no disorder"
            assert len(have) >= before, "what was appended before the look is seen"
            assert run.problems == {}
            assert run.status() == "running"
            reads += 1
    finally:
        process.kill()
        listener.join()
        process.wait()
    assert reads > 10
    assert said > 300


def test_the_reader_looks_again_when_a_merge_takes_parts_away_under_it(
    make_run, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(writing, "ROLL_BATCHES", 2)
    run = make_run(
        steps=19, close=False
    )  # nine parts and one row in the journal: the next row merges
    reader, looks = open_run(tmp_path / "run"), 0
    read_metadata = parts.pq.read_metadata

    def slow_look(file):
        nonlocal looks
        looks += 1
        if looks == 3:
            monkeypatch.setattr(parts.pq, "read_metadata", read_metadata)
            run.append("steps", {"step": [19]})
            monkeypatch.setattr(parts.pq, "read_metadata", slow_look)
        return read_metadata(file)

    monkeypatch.setattr(parts.pq, "read_metadata", slow_look)
    assert reader.read("steps")["step"].tolist() == list(range(20))
    assert reader.problems == {}
    assert looks >= 4


def test_a_second_training_cannot_write_into_a_live_runs_folder(tmp_path: Path) -> None:
    process = writer(tmp_path / "run", 0)
    assert process.stdout.readline() == "begun\n"
    try:
        with pytest.raises(
            GeodiagError, match=f"being written by process {process.pid}; stop that training"
        ):
            Run.create(tmp_path / "run")
    finally:
        kill(process)
    Run.create(tmp_path / "run").close()


def test_a_process_that_shares_a_dead_trainings_number_is_not_taken_for_it(
    make_run, tmp_path: Path
) -> None:
    run = make_run(close=False)
    assert open_run(tmp_path / "run").status() == "running"
    beat = tmp_path / "run/heartbeat.json"
    beat.write_text(beat.read_text().replace('"started": "', '"started": "9'))
    assert open_run(tmp_path / "run").status() == "interrupted"
    beat.write_text(beat.read_text().replace('"host": "', '"host": "elsewhere'))
    assert open_run(tmp_path / "run").status() == "running", (
        "on another machine a fresh sign of life is all there is"
    )
    run.close("failed")
    assert open_run(tmp_path / "run").status() == "failed"


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from geodiag.run import Run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Run.create(sys.argv[1])
journal = Path(sys.argv[1], "journal/rank-0-steps.arrows")
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
refused = 0
for step in range(60):
    if step == 20:
        full_amid_a_batch = journal.stat().st_size + 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (full_amid_a_batch, hard))
    if step == 40:
        assert Run.open(sys.argv[1]).read("steps", ["step"])["step"].tolist() == list(range(20))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    try:
        run.append("steps", {"step": [step]})
    except OSError:
        refused += 1
print(refused)
sys.stdout.flush()
import os, signal
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
run.close()
"""


@pytest.mark.parametrize("end", ["kill", "close"])
def test_a_full_disk_is_an_os_error_and_the_rows_are_written_once_there_is_space(
    tmp_path: Path, end: str
) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run"), end]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "20\n", done.stderr
    run = open_run(tmp_path / "run")
    assert run.read("steps", ["step"])["step"].tolist() == list(range(60))
    assert run.problems == {}
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_disk_that_refuses_a_part_keeps_the_journal_and_leaves_no_half_part(
    make_run, monkeypatch, tmp_path
) -> None:
    run = make_run(steps=8, close=False)

    def refuse(table, file, **how):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(parts.pq, "write_table", refuse)
        with pytest.raises(OSError, match="No space left"):
            run.close()
    assert open_run(tmp_path / "run").read("steps")["step"].tolist() == list(range(8))
    assert not list((tmp_path / "run").rglob("*.tmp"))
    run.close()
    assert open_run(tmp_path / "run").read("steps")["step"].tolist() == list(range(8))
    assert open_run(tmp_path / "run").status() == "finished"


def test_rows_refused_before_the_manifest_knows_the_attempt_are_still_told_apart(
    make_run, monkeypatch, tmp_path
) -> None:
    run = make_run(steps=6, close=False)
    run.next_attempt()

    def refuse(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("geodiag.store.run_writer.write_json", refuse)
        with pytest.raises(OSError, match="No space left"):
            run.append("steps", {"step": [4]})
    assert open_run(tmp_path / "run").read("steps")["attempt"].tolist() == [0, 0, 0, 0, 1]
    run.append("steps", {"step": [5]})
    assert open_run(tmp_path / "run").manifest["attempts"][1]["first_step"] == 4


def test_a_journal_of_an_unknown_table_is_left_alone(make_run, tmp_path: Path) -> None:
    make_run()
    later = tmp_path / "run/journal/rank-0-quantum.arrows"
    later.write_bytes(b"a later version's table")
    TableWriter(tmp_path / "run", rank=0, attempt=1).close()
    assert later.read_bytes() == b"a later version's table"


def test_a_journal_that_cannot_be_understood_is_named_and_kept(make_run, tmp_path: Path) -> None:
    make_run(steps=3)
    (tmp_path / "run/journal/rank-0-steps.arrows").write_bytes(b"overwritten by something else")
    run = open_run(tmp_path / "run")
    assert len(run.read("steps")) == 3
    assert run.problems == {"journal/rank-0-steps.arrows": "unreadable (no Arrow stream)"}
    Run.create(tmp_path / "run").close()
    assert (tmp_path / "run/journal/rank-0-steps.unreadable").exists()
