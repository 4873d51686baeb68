"""Who may import whom: between the top-level folders, between the rooms of each, and no loops."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.project.import_graph import (
    TOP_LEVEL,
    Graph,
    import_graph,
    import_loops,
    imports,
    room_arrows,
    rooms,
    source_files,
)

ROOMS = {
    "geodiag": """
        errors
        < log, jsonable, extras, defaults
        < events
        < metrics
        < schema, store
        < control
        < run
        < health
        < spikes, anomaly
        < cascade
        < export
    """,
    "geodiag.hooks": """
        failure_guard, step_context, torch_internals
        < adapters, distributed
        < measure, routing, faults
        < record
        < probes, snapshots, control
        < step_measurement
        < rewind, step_recording
        < monitor
        < build_monitor
        < attach
        < autorecord
    """,
    "geodiag.dashboard": """
        data
        < figures, server
        < url
        < components
        < cascade
        < pages
        < reports
        < app
        < serve
    """,
}
"""Rooms of an area in the order of their imports.

A room may import the rooms of the lines above its own, and no others: neither its neighbours in the
same line nor the lines below.
"""

KNOWN_ARROWS: set[tuple[str, str, str]] = set()
"""(area, room, imported room) that break the table today; an entry that is repaired must go."""

KNOWN_LOOPS: set[frozenset[str]] = set()
"""Loops between modules of today; an entry that is repaired must go."""


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(ROOT)


# -- loops and rooms -----------------------------------------------------------------------


def test_no_modules_import_one_another_in_a_circle(graph: Graph) -> None:
    found = import_loops(graph)
    assert found - KNOWN_LOOPS == set()
    assert KNOWN_LOOPS - found == set(), "repaired: take it out of KNOWN_LOOPS"


def allowed(table: str) -> dict[str, set[str]]:
    """Return what each room may import, from a table of ROOMS."""
    lines = [re.findall(r"\w+", line) for line in table.split("<")]
    return {
        room: {above for line in lines[:i] for above in line}
        for i, line in enumerate(lines)
        for room in line
    }


def broken_arrows(graph: Graph, area: str) -> dict[tuple[str, str], list[str]]:
    """Return the arrows that the table of the area does not allow, with the imports behind each."""
    may = allowed(ROOMS[area])
    found = room_arrows(graph, area)
    return {arrow: why for arrow, why in found.items() if arrow[1] not in may[arrow[0]]}


@pytest.mark.parametrize("area", ROOMS)
def test_every_room_has_its_line_in_the_table(graph: Graph, area: str) -> None:
    unknown = rooms(graph, area) - set(allowed(ROOMS[area]))
    assert unknown == set(), f"add it to ROOMS[{area!r}], behind what it imports"


@pytest.mark.parametrize("area", ROOMS)
def test_rooms_import_only_the_rooms_above_them(graph: Graph, area: str) -> None:
    known = {(room, other) for where, room, other in KNOWN_ARROWS if where == area}
    found = broken_arrows(graph, area)
    assert {arrow: why for arrow, why in found.items() if arrow not in known} == {}
    assert known - set(found) == set(), "repaired: take it out of KNOWN_ARROWS"


def checkout(root: Path, **files: str) -> Path:
    """Write a small checkout; `hooks__a` is the file hooks/a.py."""
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_loop_is_found_when_one_of_its_imports_is_late(tmp_path: Path) -> None:
    root = checkout(
        tmp_path,
        hooks__a="from geodiag.hooks import b\n",
        hooks__b="from geodiag.hooks.c import f\n",
        hooks__c="def f():\n    import geodiag.hooks.a\n",
        hooks__d="from geodiag.hooks.a import x\n",
    )
    loop = frozenset({"geodiag.hooks.a", "geodiag.hooks.b", "geodiag.hooks.c"})
    assert import_loops(import_graph(root)) == {loop}


def test_an_import_for_type_checkers_makes_no_loop(tmp_path: Path) -> None:
    root = checkout(
        tmp_path,
        hooks__a="from geodiag.hooks import b\n",
        hooks__b="if TYPE_CHECKING:\n    from geodiag.hooks.a import T\n",
    )
    assert import_loops(import_graph(root)) == set()


def test_an_arrow_to_a_neighbour_or_a_later_room_is_found(tmp_path: Path) -> None:
    root = checkout(
        tmp_path,
        hooks__measure__reduce="from geodiag.hooks.adapters import base\n",
        hooks__adapters__base="def f():\n    from geodiag.hooks.measure.reduce import g\n",
        hooks__routing__base="from geodiag.hooks.measure import reduce\n",
    )
    assert broken_arrows(import_graph(root), "geodiag.hooks") == {
        ("adapters", "measure"): [
            "geodiag.hooks.adapters.base imports geodiag.hooks.measure.reduce"
        ],
        ("routing", "measure"): ["geodiag.hooks.routing.base imports geodiag.hooks.measure.reduce"],
    }


# -- top-level folders ---------------------------------------------------------------------


def offenders(
    folder: str,
    *banned: str,
    root: Path = ROOT,
    only_early: bool = False,
    but: tuple[str, ...] = (),
) -> list[str]:
    """Return the imports of banned modules in a top-level folder, files under `but` left out."""
    found = set()
    for path in source_files(root, folder):
        where = path.relative_to(root).as_posix()
        if where.startswith(but):
            continue
        for names, early in imports(path):
            if early or not only_early:
                found |= {f"{where} imports {n}" for n in names if _is_one_of(n, banned)}
    return sorted(found)


def _is_one_of(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_the_core_imports_neither_torch_nor_dash_nor_another_folder() -> None:
    others = [f"geodiag.{folder}" for folder in TOP_LEVEL]
    assert offenders("", "torch", "triton", "dash", "plotly", *others) == []


def test_the_reference_models_import_nothing_of_the_rest() -> None:
    found = offenders("reference_models", "geodiag", "dash", "pandas", "typer")
    assert [f for f in found if not re.search(r"imports geodiag\.reference_models", f)] == []


def test_hooks_know_a_model_only_through_an_adapter() -> None:
    models = ("geodiag.reference_models", "transformers")
    above = ("geodiag.cli", "geodiag.dashboard", "dash", "plotly")
    assert offenders("hooks", *models, but=("hooks/adapters/",)) == []
    assert offenders("hooks", *above) == []


def test_the_dashboard_knows_run_directories_and_no_training() -> None:
    training = ("torch", "triton", "geodiag.hooks", "geodiag.reference_models", "geodiag.cli")
    assert offenders("dashboard", *training) == []


def test_only_the_command_line_imports_the_benchmarks() -> None:
    for folder in ("", "hooks", "dashboard", "reference_models"):
        assert offenders(folder, "geodiag.benchmarks") == []


def test_commands_import_what_is_heavy_only_when_they_run() -> None:
    heavy = ("torch", "dash", "pandas", "numpy", "pyarrow", "plotly", "geodiag")
    light = ("geodiag", "geodiag.__version__", "geodiag.GeodiagError", "geodiag.cli")
    found = {f.split()[-1] for f in offenders("cli", *heavy, only_early=True)}
    allowed_too = (
        "geodiag.cli.",
        "geodiag.defaults",
        "geodiag.errors",
        "geodiag.extras",
        "geodiag.hooks.control.policy",
        "geodiag.hooks.control.policy_parts",
        "geodiag.reference_models.config",
    )
    assert {f for f in found if f not in light and not f.startswith(allowed_too)} == set()


def test_a_banned_import_is_found_at_the_top_and_inside_a_function(tmp_path: Path) -> None:
    root = checkout(
        tmp_path,
        dashboard__a="def f():\n    from torch import nn\n",
        dashboard__b="from geodiag import hooks\nfrom typing import TYPE_CHECKING\n",
        dashboard__c="if TYPE_CHECKING:\n    import torch\n",
    )
    assert offenders("dashboard", "torch", "geodiag.hooks", root=root) == [
        "dashboard/a.py imports torch",
        "dashboard/a.py imports torch.nn",
        "dashboard/b.py imports geodiag.hooks",
    ]
    assert offenders("dashboard", "torch", root=root, only_early=True) == []


# -- what is loaded ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["import geodiag", "import geodiag.cli.main", "import geodiag; geodiag.open_run"]
)
def test_starting_up_loads_nothing_heavy(code: str) -> None:
    heavy = {"torch", "dash", "pandas", "plotly", "transformers"}
    if "open_run" not in code:
        heavy |= {"pyarrow", "numpy"}
    code += f"; import sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("folder", TOP_LEVEL)
def test_a_top_level_folder_refuses_to_be_imported_under_its_own_name(folder: str) -> None:
    command = [sys.executable, "-c", f"import {folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"ImportError: import geodiag.{folder}, not {folder}"
