"""Options of a resumed training: those that it began with, changed by those that are given now."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from geodiag.cli.train_options import CHANGEABLE, Options
from geodiag.errors import GeodiagError


def resumed_options(run: Path, given: Mapping[str, Any]) -> Options:
    """Return the options to resume `run` with. GeodiagError where that is impossible."""
    recorded = _recorded_options(run)
    for name, value in sorted(given.items()):
        if name not in CHANGEABLE and _as_json(value) != recorded.get(name):
            option = "--" + name.replace("_", "-")
            raise GeodiagError(f"a resumed training keeps its {option}; leave that out")

    known = {f.name for f in fields(Options)}
    began = Options(**{name: value for name, value in recorded.items() if name in known})
    began = replace(
        began,
        inject=tuple(began.inject),
        every=_as_words(began.every),
        run=run,
        resume=True,
        rollback="disk",
    )
    return replace(began, **{name: v for name, v in given.items() if name != "rollback"})


def _recorded_options(path: Path) -> dict[str, Any]:
    """Return the options in the manifest of a run that can be resumed."""
    from geodiag.hooks.snapshots.disk_store import snapshots_in
    from geodiag.run import open_run

    run = open_run(path)
    config = run.manifest.get("config")
    options = config.get("options") if isinstance(config, dict) else None
    if not isinstance(options, dict):
        raise GeodiagError(f"{path} is no run of geodiag train; resume one that is")
    if run.status() == "running":
        raise GeodiagError(f"{path} is still running; stop it first")
    if not snapshots_in(path):
        raise GeodiagError(
            f"{path} holds no snapshots; only a training with --rollback disk can be resumed"
        )
    return options


def _as_words(every: Any) -> tuple[str, ...]:
    """Older manifests hold one number instead of a list."""
    return tuple(every) if isinstance(every, list) else (str(every),)


def _as_json(value: Any) -> Any:
    """Return the value as a manifest gives it back."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
