"""Bad input on the training side: one line that names the fix, exit 1, no traceback, nothing
half-made left behind.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from geodiag.reference_models.train import Trainer
from geodiag.run import open_run
from tests.cli.test_bad_input import one_line
from tests.geodiag.store import kills


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kills.text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def train(cli: Callable[..., Any], text: Path, tmp_path: Path) -> Callable[..., Any]:
    def run(*args: object) -> Any:
        given = [] if "--data" in args else ["--data", text]
        return cli(
            "train", "--run", tmp_path / "run", "--steps", 3, "--sequences", 2, *given, *args
        )

    return run


def refused_in_one_line(folder: Path, result: Any, *words: str) -> None:
    """One line, and no run directory."""
    one_line(result, *words)
    assert not (folder / "run").exists(), "nothing half-made is left"


# -- faults --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("earthquake@1", ["unknown fault kind 'earthquake'", "expert-scale", "bit-flip"]),
        (
            "expert-scale",
            ["cannot read the fault 'expert-scale'", "KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"],
        ),
        ("expert-scale@-1", ["cannot read the fault"]),
        ("expert-scale@3", ["comes after the last step", "pass --steps"]),
        (
            "gate-column@1:0",
            ["cannot be planted in layer 0", "layers that can take it: 1, 2, 3, 4, 5"],
        ),
        ("expert-scale@1:6", ["cannot be planted in layer 6"]),
    ],
)
def test_a_fault_that_cannot_be_planted(
    train, tmp_path: Path, fault: str, words: list[str]
) -> None:
    refused_in_one_line(tmp_path, train("--inject", fault), *words)


def test_a_fault_of_residual_maps_in_a_model_without_them(train, tmp_path: Path) -> None:
    refused_in_one_line(
        tmp_path,
        train("--residual", "plain", "--inject", "residual-expand@1"),
        "has no place for it",
    )


# -- the run directory ---------------------------------------------------------------------


def test_an_existing_run_is_refused_and_left_as_it_is(train, tmp_path: Path) -> None:
    assert train().exit_code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    one_line(train(), "already holds a run", "pass another --run")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    (tmp_path / "run/run.json").unlink()
    one_line(train(), "already holds a run")


def test_a_file_at_the_run_directory_or_above_it(train, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    one_line(train(), "cannot write a run to", "pass a folder you may write")
    one_line(train("--run", tmp_path / "run/below"), "cannot write a run to", "Not a directory")
    assert (tmp_path / "run").read_text() == "a file"


# -- data ----------------------------------------------------------------------------------


def test_unusable_data_is_refused(train, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "few.txt").write_text("few words")
    (tmp_path / "odd.bin").write_bytes(b"12345")
    (tmp_path / "blank.txt").touch()
    for name, words in {
        "absent": ["absent does not exist", "pass --data stdlib"],
        "empty": ["holds no text or code files", "pass a folder with some"],
        "few.txt": ["few.txt: the text has 9 tokens", "add text"],
        "odd.bin": ["has 5 bytes", "uint16 or uint32"],
        "blank.txt": ["is empty"],
    }.items():
        refused_in_one_line(tmp_path, train("--data", tmp_path / name), *words)


def test_unreadable_data_is_refused(train, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "secret.txt").write_text("hidden")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    out = train("--data", tmp_path / "secret.txt")
    refused_in_one_line(
        tmp_path, out, "cannot read", "secret.txt: Permission denied", "pass data you may read"
    )


# -- the machine ---------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["toaster", "", "cuda:99", "meta", "hpu"])
def test_a_missing_device_is_refused(train, tmp_path: Path, device: str) -> None:
    refused_in_one_line(
        tmp_path, train("--device", device), f"no device '{device}' here", "pass --device cpu"
    )


def test_triton_kernels_on_a_cpu_are_refused(train, tmp_path: Path) -> None:
    refused_in_one_line(
        tmp_path,
        train("--kernels", "triton", "--device", "cpu"),
        "need a GPU",
        "pass --kernels reference",
    )


def test_a_model_larger_than_memory_is_refused(train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("geodiag.cli.model_setup.device_memory", lambda device: 8e9)
    refused_in_one_line(
        tmp_path,
        train("--size", "3b", "--device", "cpu"),
        "needs 38 GB",
        "cpu has 8",
        "pass a smaller --size",
    )


def crashing(monkeypatch, error: BaseException) -> None:
    """The third step fails."""
    update = Trainer.update

    def fail(self: Trainer) -> Any:
        if self.steps_done == 2:
            raise error
        return update(self)

    monkeypatch.setattr(Trainer, "update", fail)


def test_out_of_memory_fails_the_run_and_keeps_its_steps(train, tmp_path, monkeypatch) -> None:
    crashing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    out = train()
    assert out.exit_code == 1
    assert "Traceback" not in out.output
    assert (
        "at step 2; pass fewer --sequences, or more --micro-batches" in out.stderr.splitlines()[-1]
    )
    kept(tmp_path / "run", "failed")


def test_an_unexpected_error_propagates_and_the_run_is_closed(
    train, tmp_path: Path, monkeypatch
) -> None:
    crashing(monkeypatch, RuntimeError("a bug"))
    out = train()
    assert isinstance(out.exception, RuntimeError)
    kept(tmp_path / "run", "failed")


def test_ctrl_c_in_the_middle_of_a_step_keeps_the_steps_before_it(
    train, tmp_path: Path, monkeypatch
) -> None:
    crashing(monkeypatch, KeyboardInterrupt())
    assert train().exit_code == 130
    kept(tmp_path / "run", "interrupted")


def kept(folder: Path, status: str) -> None:
    run = open_run(folder)
    assert run.manifest["status"] == status
    assert run.read("steps")["step"].tolist() == [0, 1]
    assert run.problems == {}
    assert not [t for t in threading.enumerate() if t.name.startswith("geodiag")], (
        "no thread is left"
    )


# -- numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--micro-batches", "3"],
            ["2 sequences do not make 3 equal micro-batches", "pass one of 1, 2"],
        ),
        (["--lr", "-1"], ["lr is 0 to", "not -1"]),
        (["--lr", "nan"], ["not nan"]),
    ],
)
def test_numbers_out_of_range_are_refused(
    train, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    refused_in_one_line(tmp_path, train(*options), *words)


def test_an_unknown_choice_lists_the_choices(train, tmp_path: Path) -> None:
    for options, words in (
        (["--size", "huge"], "27b"),
        (["--residual", "mch"], "mhc"),
        (["--seed", "-1"], "0"),
    ):
        refused_in_one_line(tmp_path, train(*options), words)
