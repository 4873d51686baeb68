"""Options are declared once, as fields of dataclasses, and commands receive them as such."""

import inspect
import json
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_type_hints

import pytest
import typer
from typer.models import OptionInfo
from typer.testing import CliRunner

import geodiag
from geodiag.cli.dataclass_options import takes_options
from geodiag.cli.main import app
from geodiag.cli.resume import resumed_options
from geodiag.cli.train_options import CHANGEABLE, Options, RecordingOptions, Size
from geodiag.reference_models.config import SIZES
from geodiag.reference_models.train import TrainConfig

NOT_ON_THE_COMMAND_LINE = {"resume"}


def declarations(options: type) -> dict[str, list[OptionInfo]]:
    """The `typer.Option`s of each field, over all classes that declare a field of that name."""
    found: dict[str, list[OptionInfo]] = {f.name: [] for f in fields(options)}
    for base in options.__mro__:
        for name in inspect.get_annotations(base):
            annotation = get_type_hints(base, include_extras=True)[name]
            found[name] += [m for m in get_args(annotation) if isinstance(m, OptionInfo)]
    return found


def declared_twice_or_never(options: type) -> list[str]:
    return sorted(
        name
        for name, found in declarations(options).items()
        if len(found) != 1 and name not in NOT_ON_THE_COMMAND_LINE
    )


def options_of(command: str) -> set[str]:
    """The parameters of a command that are options, `--help` aside."""
    params = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    return {p.name for p in params if p.opts[0].startswith("--")} - {"help"}


def test_every_field_has_exactly_one_declaration_and_its_help() -> None:
    assert declared_twice_or_never(Options) == []
    assert all(f.help for found in declarations(Options).values() for f in found)


def test_a_second_or_a_missing_declaration_is_found() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Twice(RecordingOptions):
        trace: Annotated[str, typer.Option(help="Again.")] = "margin"
        width: int = 3

    assert declared_twice_or_never(Twice) == ["trace", "width"]


def test_train_and_run_have_the_declared_options() -> None:
    declared = {f.name for f in fields(Options)}
    assert options_of("train") == declared | {"resume"}
    assert options_of("run") == {f.name for f in fields(RecordingOptions)} | {"folder"}
    assert len(declared) >= 32


def test_the_help_of_train_lists_every_option() -> None:
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).stdout
    names = {f"--{f.name.replace('_', '-')}" for f in fields(Options)}
    assert [n for n in names if n not in shown] == []
    for panel in ("Model", "Training", "Closed loop", "Recording"):
        assert f"─ {panel} ─" in shown


def test_defaults_are_those_of_the_python_interface() -> None:
    options = Options()
    assert options.policy() == geodiag.Policy()
    assert options.snapshot_every == default_of(geodiag.Snapshots, "every")
    assert options.delay == default_of(geodiag.AnticipatoryRouting, "delay_steps")
    assert options.probe_every == default_of(geodiag.attach, "probe_every")
    assert options.trace == default_of(geodiag.attach, "trace")
    assert declarations(Options)["lr"][0].show_default == f"{TrainConfig.lr:g}"
    assert set(get_args(Size)) == set(SIZES)


def default_of(function: Any, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


def test_what_a_resumed_training_may_change_are_options() -> None:
    assert {f.name for f in fields(Options)} >= CHANGEABLE
    assert not {"seed", "data", "residual", "size", "run"} & CHANGEABLE


def test_options_of_older_manifests_are_read(make_run, tmp_path) -> None:
    run = make_run("old")
    manifest = run.manifest
    manifest["config"] = {
        "options": {"every": 2, "inject": ["lr-shock@3"], "clamp": None, "removed_option": 1}
    }
    (tmp_path / "old/run.json").write_text(json.dumps(manifest))
    (tmp_path / "old/snapshots/rank-0/step-00000002").mkdir(parents=True)
    options = resumed_options(tmp_path / "old", {"steps": 9})
    assert options == Options(
        every=("2",),
        inject=("lr-shock@3",),
        clamp=None,
        steps=9,
        run=tmp_path / "old",
        resume=True,
        rollback="disk",
    )


@dataclass(frozen=True, kw_only=True)
class Small:
    panel = "Things"

    number: Annotated[int, typer.Option(min=1, help="A number.")] = 3
    words: Annotated[tuple[str, ...], typer.Option(help="Words; repeatable.")] = ()
    flag: Annotated[bool, typer.Option("--flag", help="A flag.")] = False


def call(*args: str) -> tuple[Small, frozenset[str], str]:
    """What a command with the options of `Small` and an argument of its own receives."""
    received: list[Any] = []
    small = typer.Typer()

    @small.command()
    @takes_options(Small)
    def command(options: Small, written: frozenset[str], own: str = "a") -> None:
        received.extend((options, written, own))

    result = CliRunner().invoke(small, list(args))
    if result.exit_code:
        raise ValueError(result.output)
    return tuple(received)  # type: ignore[return-value]


def test_a_command_receives_its_options_as_a_dataclass() -> None:
    assert call() == (Small(), frozenset(), "a")
    assert call("--words", "x", "--words", "y", "--flag", "--own", "b") == (
        Small(words=("x", "y"), flag=True),
        {"words", "flag"},
        "b",
    )


def test_an_option_that_is_written_with_its_default_counts_as_written() -> None:
    assert call("--number", "3") == (Small(), {"number"}, "a")


def test_a_value_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="number"):
        call("--number", "0")
