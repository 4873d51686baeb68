"""`geodiag run`: unedited scripts are recorded with bit-identical results, or run unrecorded with a
reason.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geodiag.run import open_run
from tests.cli.test_bad_input import one_line
from tests.hooks.autorecord import unedited
from tests.hooks.autorecord.watching import ROOT, recorded, start, unwatched, watched


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "few.py").write_text(unedited.FEW)
    return tmp_path


# -- trainings -----------------------------------------------------------------------------


def test_the_first_step_of_an_optimizer_created_late_has_its_loss_and_gradient_norm(
    folder: Path,
) -> None:
    run = recorded(folder, watched(folder, unedited.LATE))
    assert run.read("steps")["grad_norm"].notna().all()
    assert run.read("layers").groupby("step")["stream_rms"].count().tolist() == [0, 3, 3]


def test_options_reach_the_training_and_the_manifest(folder: Path) -> None:
    done = watched(
        folder,
        unedited.PLAIN,
        "--every",
        "2",
        "--every",
        "grad_norm=1",
        "--layers",
        "1-",
        "--trace",
        "0,5",
    )
    run = recorded(folder, done)
    assert run.manifest["config"]["cadence"]["layers"] == [1, 2]
    assert run.manifest["config"]["command"] == [sys.executable, "train.py"]
    rows = run.read("layers")
    assert set(rows["layer"]) == {1, 2}
    assert rows.dropna(subset=["stream_rms"])["step"].unique().tolist() == [0, 2]


def test_ranks_that_multiprocessing_spawns_are_recorded_and_their_loaders_are_not(
    folder: Path,
) -> None:
    run = recorded(folder, watched(folder, unedited.SPAWNED))
    assert len(run.read("steps")) == 3


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_under_torchrun_record_into_one_run(folder: Path, parallel: str) -> None:
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--standalone",
    ]
    done = watched(
        folder, unedited.SPREAD, command=[sys.executable, *torchrun], arguments=[parallel]
    )
    assert done.returncode == 0, done.stderr
    run = open_run(folder / "run")
    assert run.status() == "finished"
    assert run.manifest["world_size"] == 2
    steps = run.read("steps").sort_values(["rank", "step"])
    losses = [float(x) for r in (0, 1) for x in (folder / f"losses-{r}").read_text().split()]
    assert steps["loss"].tolist() == losses
    assert "problem" not in set(run.read("events")["kind"]), done.stderr
    assert done.stderr.count("geodiag watches") == 1


# -- endings -------------------------------------------------------------------------------


def test_a_script_that_fails_has_its_own_error_and_its_run_is_failed(folder: Path) -> None:
    done = watched(folder, unedited.PLAIN + "raise RuntimeError('a bug')\n")
    assert done.returncode == 1
    assert "RuntimeError: a bug" in done.stderr
    recorded(folder, done, "failed")


def test_the_exit_code_is_that_of_the_command_and_not_0_is_a_failure(folder: Path) -> None:
    done = watched(folder, unedited.PLAIN + "sys.exit(7)\n")
    assert done.returncode == 7
    recorded(folder, done, "failed")


WAITING = unedited.PLAIN + "import time\ntime.sleep(60)\n"


def until_it_waits(folder: Path, **how: Any) -> tuple[subprocess.Popen[str], str]:
    (folder / "train.py").write_text(WAITING)
    process = start(folder, [sys.executable, "train.py"], **how)
    assert process.stdout is not None
    return process, "".join(process.stdout.readline() for _ in range(4))


def test_a_signal_is_passed_on_and_ctrl_c_reaches_the_command_once(folder: Path) -> None:
    for number, code, status in (
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "interrupted"),
    ):
        process, printed = until_it_waits(folder)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code, errors
        recorded(folder, subprocess.CompletedProcess([], code, printed, errors), status)
        (folder / "run").rename(folder / f"run-{number}")


def test_a_killed_command_loses_no_finished_step(folder: Path) -> None:
    process, printed = until_it_waits(folder)
    child = next(
        p for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    )
    os.kill(int(child), signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    recorded(folder, subprocess.CompletedProcess([], 0, printed, errors), "interrupted")


def test_stdin_is_the_commands_own(folder: Path) -> None:
    process = start(folder, ["cat"], stdin=subprocess.PIPE)
    out, _ = process.communicate("words\n", timeout=60)
    assert out == "words\n"


# -- nothing to record ---------------------------------------------------------------------


def nothing(done: subprocess.CompletedProcess, *words: str, code: int = 0) -> None:
    """The command ran as it would, and the last line says why nothing was recorded."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("geodiag: nothing was recorded in ")
    for word in words:
        assert word in last


def test_a_script_without_torch_loads_nothing_of_geodiag(folder: Path) -> None:
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text("mark = 'the user’s own'\n")
    script = """
import importlib.util, sys
assert importlib.util.find_spec("torch")
import sitecustomize
print(sitecustomize.mark, sorted(m for m in sys.modules if m.startswith("geodiag")), len(sys.path))
"""
    (folder / "train.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}"}
    bare = subprocess.run(
        [sys.executable, "train.py"], cwd=folder, env=environment, capture_output=True, text=True
    )
    process = start(
        folder, [sys.executable, "train.py"], env={"PYTHONPATH": environment["PYTHONPATH"]}
    )
    out, err = process.communicate(timeout=60)
    assert out == bare.stdout
    assert "the user’s own []" in out
    nothing(
        subprocess.CompletedProcess([], process.returncode, out, err),
        "nothing in the command imported torch",
    )


def test_a_script_that_never_trains_is_explained(folder: Path) -> None:
    done = watched(
        folder,
        "from few import *\nmodel = Blocks()\nx = adamw(model)\n"
        "loss_of(model, batch())\nprint(1)\n",
    )
    assert (
        "no step was recorded in run: the training ended before its first step"
        in done.stderr.splitlines()[-1]
    )
    (folder / "run").rename(folder / "one")
    nothing(watched(folder, "import torch\n"), "no optimizer of torch took a step")


def test_a_model_without_blocks_trains_unrecorded(folder: Path) -> None:
    done = watched(folder, unedited.NO_BLOCKS)
    nothing(done, "Linear has no list of alike blocks")
    assert len(done.stdout.split()) == 2
    assert done.stderr.count("training goes on unrecorded") == 1


def test_a_run_directory_that_cannot_be_created_ends_no_training(folder: Path) -> None:
    done = watched(folder, unedited.PLAIN, "--run", "few.py/run")
    nothing(done, "cannot write a run to")
    assert len(done.stdout.split()) == 4


def test_a_script_that_attaches_geodiag_itself_keeps_its_own_record(folder: Path) -> None:
    done = watched(folder, unedited.OWN_RECORD)
    nothing(done, "the script attaches geodiag itself")
    assert open_run(folder / "own").read("steps")["loss"].tolist() == [float(done.stdout)]


def test_a_failure_of_geodiag_is_reported_once_and_the_training_goes_on(
    folder: Path, monkeypatch
) -> None:
    broken = "import geodiag.hooks.autorecord.model_search as s\ns.count_held = lambda *_: 1 / 0\n"
    done = watched(folder, "import torch\n" + broken + unedited.PLAIN)
    nothing(done, "ZeroDivisionError")
    assert done.stderr.count("training goes on unrecorded") == 1
    assert done.stdout == unwatched(folder, monkeypatch)


# -- mistakes ------------------------------------------------------------------------------


def test_mistakes_are_one_line_that_names_the_fix(
    cli: Callable[..., Any], tmp_path: Path, capfd
) -> None:
    one_line(cli("run"), "no command to run", "geodiag run -- python train.py")
    one_line(cli("run", "--", "no-such-command"), "no command 'no-such-command'", "spelling")
    one_line(cli("run", "train.py"), "write python train.py")
    script = tmp_path / "train.py"
    script.write_text("")
    one_line(cli("run", script), "not executable", f"write python {script}")
    one_line(cli("run", "--run", tmp_path, "true"), "already holds", "pass another --run")
    one_line(cli("run", "--every", "0", "true"), "--every 0")
    one_line(cli("run", "--every", "gain_of_salt=1", "true"), "no metric begins with")
    one_line(cli("run", "--layers", "some", "true"), "--layers some names no layers")
    one_line(cli("run", "--trace", "some", "true"), "--trace some names no tokens")
    one_line(cli("run", "--nonsense", "true"), "No such option", "geodiag run --help")
