"""Bad input on the reading side: one clear line that names the fix, exit 1, no traceback; what can
be read is read.
"""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geodiag.errors import GeodiagError
from geodiag.run import Run, find_runs, open_run
from geodiag.store import writer as writing
from geodiag.store.files import Folder


def one_line(result, *words: str) -> None:
    """The command failed as a user's mistake does."""
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("geodiag: ")
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    "command", [("show",), ("runs",), ("routing", "status"), ("routing", "on")]
)
def test_a_path_that_does_not_exist(cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *action = command
    one_line(
        cli(name, tmp_path / "absent", *action), "absent does not exist", "pass a run directory"
    )


def test_a_folder_that_holds_no_run(cli, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    one_line(cli("show", tmp_path / "photos"), "has no run.json", "pass a run directory")
    Run.create(tmp_path / "many/one").close()
    one_line(cli("show", tmp_path / "many"), "is a folder of runs", f"e.g. {tmp_path}/many/one")
    one_line(cli("runs", tmp_path / "photos"), "holds no runs", "sample_runs")


def test_a_file_instead_of_a_run_directory(cli, tmp_path: Path) -> None:
    (tmp_path / "loss.csv").write_text("step,loss\n")
    one_line(cli("show", tmp_path / "loss.csv"), "has no run.json")


def test_a_url_of_an_unknown_protocol(cli) -> None:
    one_line(cli("show", "nosuch://bucket/run"), "cannot open nosuch://bucket/run")


@pytest.mark.parametrize("text", ["", "{", '{"status": "fini', "[1, 2]", "\x00\x01"])
def test_a_truncated_manifest_is_named_and_the_rows_are_read(
    make_run, cli, tmp_path: Path, text: str
) -> None:
    make_run(steps=8)
    (tmp_path / "run/run.json").write_text(text)
    out = cli("show", tmp_path / "run")
    assert out.exit_code == 0
    assert "last step 7" in out.output
    assert "run.json: missing or unreadable" in out.output


@pytest.mark.parametrize("attempts", ['"none"', "[1, null]", '[{"attempt": "x"}]', "null"])
def test_a_manifest_with_invalid_attempts_is_read_and_resumed(
    make_run, tmp_path: Path, attempts: str
) -> None:
    make_run(steps=8)
    (tmp_path / "run/run.json").write_text(f'{{"status": "finished", "attempts": {attempts}}}')
    assert open_run(tmp_path / "run").read("steps")["step"].tolist() == list(range(8))
    Run.create(tmp_path / "run").close()


def test_a_run_of_another_schema_version_is_refused_by_name(make_run, tmp_path: Path) -> None:
    make_run(steps=3)
    (tmp_path / "run/run.json").write_text('{"schema_version": 99}')
    run = open_run(tmp_path / "run")
    assert len(run.read("steps")) == 3
    assert "upgrade geodiag" in run.problems["run.json"]


# -- broken pieces -------------------------------------------------------------------------


def parts_of(run_folder: Path, table: str = "steps") -> list[Path]:
    return sorted((run_folder / table / "rank-0").glob("*.parquet"))


def garbage(path: Path) -> None:
    path.write_bytes(b"PAR1" + os.urandom(200) + b"PAR1")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def overwritten_inside(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4:400] = bytes(396)  # the pages are gone, the footer is whole
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", [garbage, empty, cut, overwritten_inside])
def test_a_corrupt_part_is_named_and_the_rest_is_read(
    make_run, cli, monkeypatch, tmp_path: Path, harm
) -> None:
    monkeypatch.setattr(writing, "ROLL_BATCHES", 5)
    make_run(steps=20)
    first, *_ = parts_of(tmp_path / "run")
    harm(first)
    run = open_run(tmp_path / "run")
    assert run.read("steps")["step"].tolist() == list(range(5, 20))
    assert list(run.problems) == [f"steps/rank-0/{first.name}"]
    assert run.problems[f"steps/rank-0/{first.name}"].startswith("unreadable (")
    out = cli("show", tmp_path / "run")
    assert out.exit_code == 0
    assert f"not read: steps/rank-0/{first.name}" in out.output


@pytest.mark.parametrize("harm", [garbage, empty, cut, overwritten_inside])
def test_a_corrupt_part_does_not_stop_recording_or_compaction(
    make_run, monkeypatch, tmp_path, harm
) -> None:
    monkeypatch.setattr(writing, "ROLL_BATCHES", 1)
    run = make_run(steps=5, close=False)
    harm(parts_of(tmp_path / "run")[2])
    for step in range(5, 25):
        run.append("steps", {"step": [step]})
    run.close()
    assert open_run(tmp_path / "run").read("steps")["step"].tolist() == [
        s for s in range(25) if s != 2
    ]
    assert len(parts_of(tmp_path / "run")) < 20
    Run.create(tmp_path / "run").close()


def test_a_column_of_the_wrong_type_is_named_and_the_rest_is_read(
    make_run, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(writing, "ROLL_BATCHES", 5)
    make_run(steps=10)
    first, _ = parts_of(tmp_path / "run")
    table = pq.read_table(first)
    words = pa.array(["low"] * len(table))
    pq.write_table(table.set_column(table.schema.get_field_index("loss"), "loss", words), first)
    run = open_run(tmp_path / "run")
    assert run.read("steps")["step"].tolist() == list(range(5, 10))
    assert run.problems == {f"steps/rank-0/{first.name}": "column loss is string, not float"}
    assert open_run(tmp_path / "run").read("steps", ["step"])["step"].tolist() == list(range(10)), (
        "not asked for: no harm"
    )


def test_wider_numbers_of_the_same_kind_are_read(make_run, tmp_path: Path) -> None:
    make_run(steps=4)
    (part,) = parts_of(tmp_path / "run")
    pq.write_table(
        pa.Table.from_pandas(
            pq.read_table(part).to_pandas().astype({"loss": "float64", "step": "int64"})
        ),
        part,
    )
    run = open_run(tmp_path / "run")
    assert run.read("steps")["step"].tolist() == [0, 1, 2, 3]
    assert run.problems == {}


def test_a_part_without_its_key_columns_is_named(make_run, tmp_path: Path) -> None:
    make_run(steps=4)
    (part,) = parts_of(tmp_path / "run")
    pq.write_table(pq.read_table(part).drop_columns(["attempt"]), part)
    run = open_run(tmp_path / "run")
    assert len(run.read("steps")) == 0
    assert run.problems == {f"steps/rank-0/{part.name}": "has no column attempt"}


def test_unknown_files_in_a_table_are_ignored(make_run, tmp_path: Path) -> None:
    make_run(steps=4)
    for stray in (".DS_Store", "part-x-y.parquet", "notes.txt"):
        (tmp_path / "run/steps" / stray).write_bytes(b"?")
    (tmp_path / "run/steps/rank-0/notes.txt").write_bytes(b"?")
    run = open_run(tmp_path / "run")
    assert len(run.read("steps")) == 4
    assert run.problems == {}


# -- callers -------------------------------------------------------------------------------


def test_an_unknown_table_or_column_lists_the_known_ones(make_run) -> None:
    run = make_run()
    with pytest.raises(GeodiagError, match="no table 'step'; pass one of steps, layers"):
        run.read("step")
    with pytest.raises(GeodiagError, match=r"table steps has no column lss; it has rank, .*loss"):
        run.read("steps", ["lss"])


def test_a_run_folder_that_cannot_be_created_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/geodiag-run")):
        with pytest.raises(
            GeodiagError, match=r"cannot write a run to .*; pass a folder you may write"
        ):
            Run.create(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_a_folder_without_permissions_is_reported_as_such(make_run, tmp_path: Path) -> None:
    make_run()
    (tmp_path / "run").chmod(0o000)
    try:
        with pytest.raises(GeodiagError, match="permission denied; check"):
            open_run(tmp_path / "run")
    finally:
        (tmp_path / "run").chmod(0o755)


def test_refused_listings_and_files_name_the_permissions(tmp_path: Path, monkeypatch) -> None:
    store = Folder.of(tmp_path)

    def refuse(*args, **how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(store.fs), "ls", refuse)
    monkeypatch.setattr(type(store.fs), "cat_file", refuse)
    with pytest.raises(GeodiagError, match=r"cannot read .*run.json: permission denied; check"):
        open_run(tmp_path)
    with pytest.raises(GeodiagError, match=r"cannot list .*: permission denied; check"):
        find_runs(tmp_path)


# -- the process itself --------------------------------------------------------------------


def geodiag(*args: object, **how) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from geodiag.cli.main import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **how)


def test_the_real_process_prints_one_line_and_exits_with_1(tmp_path: Path) -> None:
    done = geodiag("show", tmp_path / "absent" / ("long" * 40))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("geodiag: ")
    assert "pass a run directory" in done.stderr


def test_an_unknown_command_or_option_causes_no_traceback() -> None:
    for args in (("shwo", "x"), ("show", "x", "--jsn"), ("routing", "x", "sideways")):
        done = geodiag(*args)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert done.stderr.strip().endswith("--help")


def test_a_closed_pipe_is_no_error(make_run, tmp_path: Path) -> None:
    make_run()
    geodiag = f'"{sys.executable}" -m geodiag.cli'
    command = f'{geodiag} show "{tmp_path}/run" --json | head -c 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "{"
    assert done.stderr == ""


def test_ctrl_c_exits_with_130_and_prints_nothing(tmp_path: Path) -> None:
    code = (
        "import geodiag.health\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "geodiag.health.health = stop\n"
        "from geodiag.run import Run; Run.create('run').close()\n"
        "from geodiag.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "show", "run"], cwd=tmp_path, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
