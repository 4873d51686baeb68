"""What is packaged: wheel, sdist, links, versions and pins."""

import importlib
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import geodiag
from tests.paths import ROOT
from tests.project.import_graph import TOP_LEVEL, source_files


def files_to_ship() -> set[str]:
    """Modules and assets by their place inside the package."""
    ship = {"geodiag/py.typed", *(p.relative_to(ROOT).as_posix() for p in source_files(ROOT))}
    for room in TOP_LEVEL:
        found = [
            p
            for p in (ROOT / room).rglob("*")
            if p.suffix in (".py", ".css", ".js", ".svg", ".ico")
        ]
        ship |= {
            f"geodiag/{p.relative_to(ROOT).as_posix()}"
            for p in found
            if "__pycache__" not in p.parts
        }
    return ship


@pytest.mark.slow
def test_the_wheel_made_from_the_sdist_holds_every_module_and_asset_as_a_real_file(
    built: Path,
) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        inside = {i.filename: i for i in z.infolist()}
    assert files_to_ship() - set(inside) == set()
    assert not any((i.external_attr >> 28) == 0o12 for i in inside.values()), (
        "a link in a wheel points at nothing"
    )
    python = {n for n in inside if n.endswith(".py")}
    assert python - files_to_ship() == set(), "nothing but the package is installed"
    assert any(n.endswith("licenses/LICENSE") for n in inside)


@pytest.mark.slow
def test_the_sdist_holds_every_module(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as t:
        names = {n.split("/", 1)[1] for n in t.getnames() if "/" in n}
    missing = {
        n for n in files_to_ship() if n not in names and n.removeprefix("geodiag/") not in names
    }
    assert missing == set()


@pytest.mark.slow
def test_the_installed_wheel_runs_away_from_the_checkout(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path)
    code = "import geodiag; from geodiag.cli.main import main; "
    code += "print(geodiag.__file__, flush=True); main()"
    env = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    said = [str(tmp_path / "geodiag/__init__.py"), f"geodiag {geodiag.__version__}"]
    assert done.stdout.splitlines() == said, done.stderr


def test_the_rooms_are_real_folders_and_their_import_names_are_relative_links() -> None:
    for room in TOP_LEVEL:
        link = ROOT / "geodiag" / room
        assert link.is_symlink()
        assert link.readlink() == Path("..") / room
        assert not (ROOT / room).is_symlink()
        assert importlib.import_module(f"geodiag.{room}").__file__


def test_the_version_is_written_once(cli) -> None:
    assert cli("--version").output == f"geodiag {geodiag.__version__}\n"
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


def test_every_dependency_is_pinned_to_a_version_that_its_range_allows() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    for need in map(Requirement, lines):
        if need.name == "geodiag":  # an extra that is made of others
            continue
        assert need.name in pins, f"{need.name} is not in constraints.txt"
        assert need.specifier.contains(pins[need.name], prereleases=True), need
    assert not any("+" in v for v in pins.values()), "a build tag exists on one index only"
