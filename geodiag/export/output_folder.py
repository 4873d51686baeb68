"""The folder of an export: written whole or not at all, never inside a run or over other files."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from geodiag.errors import GeodiagError
from geodiag.run import Run
from geodiag.store.files import Folder

MARK = "export.json"
"""Describes the export; `--force` replaces only a folder that has this file."""


def default_out(run: Run, to: str) -> Path:
    """Return `exports/tensorboard/hc` for `sample_runs/hc`: TensorBoard opens a folder of runs."""
    return Path("exports", to, run.name or "run")


def refuse_early(out: Path, run: Run, force: bool) -> None:
    """Raise GeodiagError where `out` may not be written, before the long work begins."""
    if ":/" in str(out):
        raise GeodiagError(
            f"cannot write to {out}; "
            "pass a folder on this machine with --out, and copy it from there"
        )
    store = Folder.of(run.url)
    if store.is_local:
        here, root = out.resolve(), Path(store.root).resolve()
        if here == root or root in here.parents:
            raise GeodiagError(
                f"{out} is inside the run; pass a folder outside of {run.url} with --out"
            )
    try:
        inside = os.listdir(out)
    except FileNotFoundError:
        return
    except OSError as e:
        raise cannot_write(out, e) from None
    if os.path.ismount(out):
        raise GeodiagError(
            f"{out} is a disk of its own, which cannot be put in place whole; pass a folder in it"
        )
    if inside and not force:
        how = (
            "pass --force to replace that export, or another --out"
            if MARK in inside
            else "pass another --out"
        )
        raise GeodiagError(f"{out} exists and is not empty; {how}")
    if inside and MARK not in inside:
        raise GeodiagError(
            f"{out} was not written by geodiag export, so --force leaves it alone; "
            "pass another --out"
        )


@contextmanager
def whole_folder(out: Path, force: bool) -> Iterator[Path]:
    """Yield a hidden folder beside `out`, renamed to `out` on success and removed on an error."""
    here = out.resolve()
    tmp, old = (here.with_name(f".{here.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    made = [p for p in here.parents if not p.exists()]
    try:
        here.parent.mkdir(parents=True, exist_ok=True)
        tmp.mkdir()
    except OSError as e:
        raise cannot_write(out, e) from None
    try:
        yield tmp
        with disk_errors(out):
            if force and here.exists():
                os.replace(here, old)
            os.replace(tmp, here)
    except BaseException:  # Ctrl-C too: remove what is incomplete, put the old folder back
        if old.exists() and not here.exists():
            os.replace(old, here)
        shutil.rmtree(tmp, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # another program may have written a file there
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn an error of the disk into a GeodiagError."""
    try:
        yield
    except OSError as e:
        raise cannot_write(out, e) from None


def cannot_write(out: Path, error: OSError) -> GeodiagError:
    """Return the error for a folder that cannot be written."""
    why = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
    return GeodiagError(
        f"cannot write {out}: {why}; free space there, or pass a folder you may write with --out"
    )
