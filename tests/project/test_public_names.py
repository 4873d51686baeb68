"""Public names, and the docstring and length of every module."""

import ast
import importlib

import pytest

import geodiag
from tests.paths import ROOT
from tests.project.import_graph import TOP_LEVEL, module_name, source_files


def test_the_public_names_are_these_and_each_can_be_imported() -> None:
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
        "policy",
    ]
    assert sorted(geodiag.__all__) == public
    for name in public:
        assert getattr(geodiag, name) is not None
    assert set(public) <= set(dir(geodiag))
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        geodiag.atach  # noqa: B018


def test_every_module_can_be_imported_and_has_a_docstring() -> None:
    for folder in ("", *TOP_LEVEL):
        for path in source_files(ROOT, folder):
            if not path.read_text():
                assert path.name == "__init__.py"
                continue
            doc = ast.get_docstring(ast.parse(path.read_text()))
            assert doc, f"{path} has no docstring"
            assert doc.splitlines()[0].strip(), f"{path}: the docstring's first line is empty"
            importlib.import_module(module_name(ROOT, path))


def test_no_file_outgrows_one_idea() -> None:
    # Tests are left out: they are lists of facts.
    everywhere = [p for folder in ("", *TOP_LEVEL) for p in source_files(ROOT, folder)]
    long = {
        p.relative_to(ROOT).as_posix(): n
        for p in everywhere
        if (n := len(p.read_text().splitlines())) > 300
    }
    assert long == {}
