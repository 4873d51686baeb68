"""The house itself: who may import whom, what is public, what is packaged, what is documented."""

import ast
import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import geodiag
from tests.paths import ROOT

ROOMS = ("hooks", "dashboard", "cli", "reference_models", "benchmarks")


def sources(room: str = "") -> list[Path]:
    """The real Python files of a top-level folder; "" is the core."""
    if room:
        return sorted((ROOT / room).rglob("*.py"))
    links = {ROOT / "geodiag" / r for r in ROOMS}
    return sorted(p for p in (ROOT / "geodiag").rglob("*.py") if links.isdisjoint(p.parents))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether at its top level; what only type checkers see
    does not count.
    """
    tree = ast.parse(path.read_text(), str(path))
    seen_by_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    late = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in seen_by_types:
            continue
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by dots; write from geodiag.x import y"
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        else:
            continue
        yield from ((name, id(node) not in late) for name in names)


def offenders(
    room: str, *banned: str, only_early: bool = False, but: tuple[str, ...] = ()
) -> list[str]:
    """Imports of the banned modules in a room, files in `but` aside."""
    found = []
    for path in sources(room):
        where = path.relative_to(ROOT).as_posix()
        if where.startswith(but):
            continue
        for name, early in imports(path):
            if any(name == b or name.startswith(b + ".") for b in banned) and (
                early or not only_early
            ):
                found.append(f"{where} imports {name}")
    return sorted(set(found))


# -- arrows --------------------------------------------------------------------------------


def test_the_core_imports_neither_torch_nor_dash_nor_any_room() -> None:
    rooms = [f"geodiag.{r}" for r in ROOMS]
    assert offenders("", "torch", "triton", "dash", "plotly", *rooms) == []


def test_the_reference_models_import_nothing_of_the_rest() -> None:
    core = [f"geodiag.{p.stem}" for p in sources() if p.stem != "__init__"]
    found = offenders("reference_models", "geodiag", "dash", "pandas", "typer")
    assert [f for f in found if not re.search(r"imports geodiag\.reference_models", f)] == []
    assert len(core) > 5


def test_hooks_know_a_model_only_through_an_adapter() -> None:
    models = (
        "geodiag.reference_models",
        "transformers",
        "geodiag.cli",
        "geodiag.dashboard",
        "dash",
    )
    assert offenders("hooks", *models, but=("hooks/adapters/",)) == []
    assert offenders("hooks", "geodiag.cli", "geodiag.dashboard", "dash", "plotly") == []


def test_the_dashboard_knows_run_directories_and_no_training() -> None:
    assert (
        offenders(
            "dashboard",
            "torch",
            "triton",
            "geodiag.hooks",
            "geodiag.reference_models",
            "geodiag.cli",
        )
        == []
    )


def test_commands_import_what_is_heavy_only_when_they_run() -> None:
    heavy = ("torch", "dash", "pandas", "numpy", "pyarrow", "plotly", "geodiag")
    light = (
        "geodiag",
        "geodiag.__version__",
        "geodiag.GeodiagError",
        "geodiag.cli",
        "geodiag.errors",
    )
    found = {f.split()[-1] for f in offenders("cli", *heavy, only_early=True)}
    assert (
        sorted(
            f
            for f in found
            if f not in light and not f.startswith(("geodiag.cli.", "geodiag.errors."))
        )
        == []
    )


def test_the_arrows_can_fail(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "dashboard").mkdir()
    (tmp_path / "dashboard/a.py").write_text("def f():\n    from torch import nn\n")
    (tmp_path / "dashboard/b.py").write_text(
        "from geodiag import hooks\nfrom typing import TYPE_CHECKING\n"
    )
    (tmp_path / "dashboard/c.py").write_text("if TYPE_CHECKING:\n    import torch\n")
    assert offenders("dashboard", "torch", "geodiag.hooks") == [
        "dashboard/a.py imports torch",
        "dashboard/a.py imports torch.nn",
        "dashboard/b.py imports geodiag.hooks",
    ]
    assert offenders("dashboard", "torch", only_early=True) == []


@pytest.mark.parametrize(
    "code", ["import geodiag", "import geodiag.cli.main", "from geodiag.cli.main import app"]
)
def test_starting_up_loads_nothing_heavy(code: str) -> None:
    heavy = "{'torch', 'dash', 'pandas', 'pyarrow', 'plotly', 'numpy', 'transformers'}"
    code += f"; import sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_reading_a_run_loads_neither_torch_nor_dash() -> None:
    code = "import geodiag; geodiag.open_run; import sys; print(sorted({'torch', 'dash', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- what is public ------------------------------------------------------------------------


def test_the_public_names_are_these_and_each_can_be_had() -> None:
    public = [
        "AnticipatoryRouting",
        "GeodiagError",
        "Policy",
        "RouterLag",
        "Run",
        "Snapshots",
        "SpikeDetector",
        "__version__",
        "attach",
        "explain",
        "faults",
        "open_run",
    ]
    assert sorted(geodiag.__all__) == public
    for name in public:
        assert getattr(geodiag, name) is not None
    assert set(public) <= set(dir(geodiag))
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        geodiag.atach  # noqa: B018


def test_every_module_can_be_imported_and_says_in_its_first_line_what_it_is() -> None:
    for room in ("", *ROOMS):
        for path in sources(room):
            if not path.read_text():
                assert path.name == "__init__.py"
                continue
            doc = ast.get_docstring(ast.parse(path.read_text()))
            assert doc, f"{path} has no docstring"
            assert doc.splitlines()[0].strip(), (
                f"{path}: the docstring's first line says what the module is"
            )
            where = path.relative_to(ROOT).with_suffix("")
            parts = where.parts if where.parts[0] == "geodiag" else ("geodiag", *where.parts)
            importlib.import_module(".".join(p for p in parts if p != "__init__"))


def test_no_file_outgrows_one_idea() -> None:
    everywhere = [p for room in ("", *ROOMS) for p in sources(room)]  # tests are lists of facts
    long = {
        p.relative_to(ROOT).as_posix(): n
        for p in everywhere
        if (n := len(p.read_text().splitlines())) > 430
    }
    assert long == {}


# -- what is packaged ----------------------------------------------------------------------


def files_to_ship() -> set[str]:
    """Modules and assets by their place inside the package."""
    ship = {"geodiag/py.typed", *(p.relative_to(ROOT).as_posix() for p in sources())}
    for room in ROOMS:
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


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel that is made from it: the longest way a user's copy can come."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


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
    code = "import geodiag; from geodiag.cli.main import main; print(geodiag.__file__, flush=True); main()"
    env = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    said = [str(tmp_path / "geodiag/__init__.py"), f"geodiag {geodiag.__version__}"]
    assert done.stdout.splitlines() == said, done.stderr


def test_the_rooms_are_real_folders_and_their_import_names_are_relative_links() -> None:
    for room in ROOMS:
        link = ROOT / "geodiag" / room
        assert link.is_symlink()
        assert link.readlink() == Path("..") / room
        assert not (ROOT / room).is_symlink()
        assert importlib.import_module(f"geodiag.{room}").__file__


def test_the_version_is_said_in_one_place(cli) -> None:
    assert cli("--version").output == f"geodiag {geodiag.__version__}\n"
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


def test_every_dependency_is_pinned_to_a_version_that_its_range_allows() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        Requirement(r) for r in project["dependencies"] + project["optional-dependencies"]["test"]
    ]
    for need in wanted:
        assert need.name in pins, f"{need.name} is not in constraints.txt"
        assert need.specifier.contains(pins[need.name], prereleases=True), need
    assert not any("+" in v for v in pins.values()), "a build tag exists on one index only"
