"""Environments with a built wheel and some of its extras, made without a download.

Such an environment is a fresh virtual environment. A file of its site-packages adds the packages of
the present environment and hides those that neither geodiag nor the extras require. A package that
geodiag uses and does not declare is hidden too.
"""

import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_HIDE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = path is None and name in HIDDEN
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds the wheel and the packages of some extras."""

    folder: Path

    def python(self, *args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run the environment's interpreter away from the checkout."""
        unwanted = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "COLUMNS"}
        env = {k: v for k, v in os.environ.items() if k not in unwanted}
        command = [str(self.folder / "bin/python"), *map(str, args)]
        return subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, check=False
        )


def install(wheel: Path, folder: Path, *extras: str) -> Environment:
    """Make a virtual environment in `folder` with the wheel and what the extras require."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as z:
        z.extractall(site)
        (name,) = (n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        needs = metadata.Distribution.at(site / Path(name).parent).requires or []

    shown = required(needs, set(extras))
    hidden = sorted(
        module
        for module, owners in metadata.packages_distributions().items()
        if module != "geodiag" and not shown & {canonicalize_name(owner) for owner in owners}
    )
    (site / "hide_packages.py").write_text(f"HIDDEN = {hidden!r}\n{_HIDE}")
    here = sorted({p for p in sys.path if p.endswith("site-packages")})
    (site / "packages.pth").write_text("\n".join(["import hide_packages", *here]) + "\n")
    return Environment(folder)


def required(needs: list[str], extras: set[str]) -> set[str]:
    """Return the names of all distributions that geodiag requires, directly or not."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(need), frozenset(extras)) for need in needs]
    while waiting:
        need, wanted = waiting.pop()
        if need.marker and not any(need.marker.evaluate({"extra": e}) for e in wanted | {""}):
            continue
        key = (canonicalize_name(need.name), frozenset(need.extras))
        if key not in found:
            found.add(key)
            inner = needs if key[0] == "geodiag" else _requires(key[0])
            waiting += [(Requirement(n), key[1]) for n in inner]
    return {name for name, _ in found} - {"geodiag"}


def _requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # required on another platform or Python only
        return []
