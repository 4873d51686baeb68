"""`geodiag run`: run a training command and record it, without changes to its code."""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geodiag.cli.dataclass_options import takes_options
from geodiag.cli.train_options import RecordingOptions, new_run_folder
from geodiag.errors import GeodiagError

if TYPE_CHECKING:
    from geodiag.hooks.autorecord.run_config import RunConfig

_ANY_DEPTH = 10_000
"""A number of layers for the check of --layers: the model, and so its real number, comes later."""


@takes_options(RecordingOptions)
def run(
    options: RecordingOptions,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- CMD …",
            help="The training command: python train.py …, torchrun … train.py.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--run",
            "--run-dir",
            help="Run directory: a new folder, or an empty one.",
            show_default="runs/SCRIPT-TIME",
            rich_help_panel=RecordingOptions.panel,
        ),
    ] = None,
) -> None:
    """Run a training command unchanged and record the model that it trains."""
    from geodiag.cli.child_process import check, signals_blocked

    if not command:
        raise GeodiagError(
            "no command to run; write it behind --, e.g. geodiag run -- python train.py"
        )
    check(command[0])
    path = folder or new_run_folder(_name(command))
    _check_free(path)
    every = _checked_cadence(options)
    with signals_blocked() as mask:
        code = _run_recorded(command, path, options, every, mask)
    raise typer.Exit(code)


def _run_recorded(
    command: Sequence[str],
    path: Path,
    options: RecordingOptions,
    every: dict[str, int],
    mask: set,
) -> int:
    from geodiag.cli.child_process import run_command
    from geodiag.hooks.autorecord.run_config import RunConfig

    with tempfile.TemporaryDirectory(prefix="geodiag-") as notes:
        config = RunConfig(
            path=str(path.absolute()),
            notes=notes,
            every=every,
            probe_every=options.probe_every,
            layers=options.layers,
            trace=options.trace,
            command=tuple(command),
        )
        _print(f"recording to {path}")
        code = run_command(command, _environment(config), mask)
        _print(_outcome(path, Path(notes), code))
    return code


def _name(command: Sequence[str]) -> str:
    """Return the name of the script, of the module, or of the program."""
    script = next((Path(word).stem for word in command if word.endswith(".py")), None)
    module = next((b.rpartition(".")[2] for a, b in pairwise(command) if a == "-m"), None)
    return script or module or Path(command[0]).name


def _check_free(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        raise GeodiagError(
            f"{path} already holds a run or other files; pass another --run, or move it away"
        )


def _checked_cadence(options: RecordingOptions) -> dict[str, int]:
    """Return the cadence, after all checks that need no model. GeodiagError for a wrong option."""
    from geodiag.metrics.cadence import Cadence, parse_every, parse_layers

    every = parse_every(options.every)
    Cadence.of(every or 1, options.probe_every)
    try:
        parse_layers(options.layers, _ANY_DEPTH)
    except GeodiagError:
        raise GeodiagError(
            f"--layers {options.layers} names no layers; pass numbers, e.g. 0-7,30-"
        ) from None
    if options.trace not in ("flipped", "margin"):
        from geodiag.hooks.probes.token_trace import parse_trace

        parse_trace(options.trace)
    return every


def _environment(config: "RunConfig") -> dict[str, str]:
    """Return the command's environment, in which each Python process loads geodiag's hook.

    Python imports `sitecustomize` when it starts; the hook is first on its path under that name.
    """
    from geodiag.hooks.autorecord import sitecustomize_hook

    site = Path(config.notes) / "site"
    site.mkdir()
    shutil.copyfile(sitecustomize_hook.__file__, site / "sitecustomize.py")
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | config.environment()


def _outcome(path: Path, notes: Path, code: int) -> str:
    """Return what was recorded and how to see it, or why nothing was recorded."""
    from geodiag.hooks.autorecord.run_config import why_nothing
    from geodiag.run import open_run
    from geodiag.store.files import Folder, write_json
    from geodiag.store.run_folder import looks_like_a_run

    if not looks_like_a_run(Folder.of(path)):
        return f"nothing was recorded in {path}: {why_nothing(notes)}"
    record = open_run(path)
    if code and record.manifest.get("status") == "finished":
        # The process closed its run in good order; only its exit code shows that it failed.
        write_json(path / "run.json", record.manifest | {"status": "failed"})
    last = record.last_step()
    if last is None:
        return f"no step was recorded in {path}: {why_nothing(notes)}"
    return f"recorded up to step {last}; see it: geodiag show {path}, or geodiag dashboard {path}"


def _print(line: str) -> None:
    """Print on stderr: stdout belongs to the command."""
    print(f"geodiag: {line}", file=sys.stderr, flush=True)
