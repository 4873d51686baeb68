"""Which folders are run directories, and the error for one that is not."""

import os

from geodiag.errors import GeodiagError
from geodiag.store.files import Folder


def looks_like_a_run(store: Folder, sub: str = "") -> bool:
    """Return whether `sub` is a run directory, with or without its manifest."""
    return bool(set(store.names(sub)) & {"run.json", "journal", "steps"})


def run_names(store: Folder) -> list[str]:
    """Return the names of the run directories in a folder."""
    return [name for name in store.names() if looks_like_a_run(store, name)]


def not_a_run(store: Folder, path: str | os.PathLike[str]) -> GeodiagError:
    """Return the error for a path that is not a run directory."""
    example = "sample_runs/mhc-tear"
    if runs := run_names(store):
        what = "is a folder of runs"
        example = f"{store.url.rstrip('/')}/{runs[0]}"
    elif store.exists():
        what = "has no run.json"
    else:
        what = "does not exist"
    return GeodiagError(f"{path} {what}; pass a run directory, e.g. {example}")
