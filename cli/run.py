"""`geodiag run`: records the training that a command does, with no edit to it."""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geodiag.errors import GeodiagError

if TYPE_CHECKING:
    from geodiag.hooks.autorecord.run_config import Orders

_RUN = "Run directory; a new one, or an empty folder.  (default: runs/SCRIPT-TIME)"
_EVERY = "Steps between samples, of everything or of metrics by the beginning of their names; repeatable.  (default: 1)"
_LAYERS = "Layers that are recorded, e.g. 0-7,30-.  (default: all)"
_TRACE = (
    "Tokens of the first batch that are followed: flipped, margin, or their places with commas."
)

_ANY_DEPTH = 10_000
"""How many layers the model has, only the model can say."""


def run(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- CMD …",
            help="What trains: python train.py …, torchrun … train.py",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--run", "--run-dir", help=_RUN, show_default=False)
    ] = None,
    every: Annotated[
        list[str] | None, typer.Option(metavar="N|METRIC=N", help=_EVERY, show_default=False)
    ] = None,
    probe_every: Annotated[
        int, typer.Option(min=1, help="Steps between probes; slow ones keep their ratio.")
    ] = 10,
    layers: Annotated[str | None, typer.Option(help=_LAYERS, show_default=False)] = None,
    trace: Annotated[str, typer.Option(help=_TRACE)] = "flipped",
) -> None:
    """Run a training command as it is, and record what it trains."""
    from geodiag.cli.child_process import check, signals_kept

    if not command:
        raise GeodiagError(
            "no command to run; write it behind --, e.g. geodiag run -- python train.py"
        )
    check(command[0])
    path = folder or Path("runs") / f"{_name(command)}-{datetime.now():%Y%m%d-%H%M%S}"
    _check_free(path)
    with signals_kept() as mask:
        code = _recorded(command, path, every or [], probe_every, layers, trace, mask)
    raise typer.Exit(code)


def _recorded(
    command: Sequence[str],
    path: Path,
    every: list[str],
    probe_every: int,
    layers: str | None,
    trace: str,
    mask: set,
) -> int:
    from geodiag.cli.child_process import carry_out
    from geodiag.hooks.autorecord.run_config import Orders

    steps = _cadence(every, probe_every, layers, trace)
    with tempfile.TemporaryDirectory(prefix="geodiag-") as notes:
        orders = Orders(
            path=str(path.absolute()),
            notes=notes,
            every=steps,
            probe_every=probe_every,
            layers=layers,
            trace=trace,
            command=tuple(command),
        )
        _say(f"recording to {path}")
        code = carry_out(command, _environment(orders), mask)
        _say(_outcome(path, Path(notes), code))
    return code


def _name(command: Sequence[str]) -> str:
    """Of the script, or else of the module or the program."""
    script = next((Path(word).stem for word in command if word.endswith(".py")), None)
    module = next((b.rpartition(".")[2] for a, b in pairwise(command) if a == "-m"), None)
    return script or module or Path(command[0]).name


def _check_free(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        raise GeodiagError(
            f"{path} already holds a run or other files; pass another --run, or move it away"
        )


def _cadence(every: list[str], probe_every: int, layers: str | None, trace: str) -> dict[str, int]:
    """What is asked for, as far as it can be checked before there is a model. GeodiagError for what
    makes no sense.
    """
    from geodiag.metrics.cadence import Cadence, parse_every, parse_layers

    steps = parse_every(every)
    Cadence.of(steps or 1, probe_every)
    try:
        parse_layers(layers, _ANY_DEPTH)
    except GeodiagError:
        raise GeodiagError(
            f"--layers {layers} names no layers; pass numbers, e.g. 0-7,30-"
        ) from None
    if trace not in ("flipped", "margin"):
        from geodiag.hooks.probes.token_trace import parse_trace

        parse_trace(trace)
    return steps


def _environment(orders: "Orders") -> dict[str, str]:
    """Python looks for a sitecustomize on its path first thing: there it finds geodiag's bootstrap
    under that name.
    """
    from geodiag.hooks.autorecord import sitecustomize_hook as bootstrap

    site = Path(orders.notes) / "site"
    site.mkdir()
    shutil.copyfile(bootstrap.__file__, site / "sitecustomize.py")
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | orders.environment()


def _outcome(path: Path, notes: Path, code: int) -> str:
    """What is on record now, and where to look at it; or why nothing is."""
    from geodiag.hooks.autorecord.run_config import why_nothing
    from geodiag.run import looks_like_a_run, open_run
    from geodiag.store.files import Folder, write_json

    if not looks_like_a_run(Folder.of(path)):
        return f"nothing was recorded in {path}: {why_nothing(notes)}"
    record = open_run(path)
    if (
        code and record.manifest.get("status") == "finished"
    ):  # an exit code is all that sys.exit tells
        write_json(path / "run.json", record.manifest | {"status": "failed"})
    last = record.last_step()
    if last is None:
        return f"no step was recorded in {path}: {why_nothing(notes)}"
    return (
        f"recorded up to step {last}; look at it: geodiag show {path}, or geodiag dashboard {path}"
    )


def _say(what: str) -> None:
    """On stderr: stdout is the command's own."""
    print(f"geodiag: {what}", file=sys.stderr, flush=True)
