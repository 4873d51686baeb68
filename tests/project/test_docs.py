"""README.md and docs/ name every command, option, metric and kind of event."""

import re
from typing import Any

import pytest
import typer

from geodiag.cli.main import app
from geodiag.events import KINDS
from geodiag.metrics import catalogue
from geodiag.metrics.schema import METRICS, SCHEMAS
from tests.paths import ROOT

HIDDEN = {"--help", "-h", "--install-completion", "--show-completion"}


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def pages(readme: str) -> str:
    """README.md and all pages of docs/."""
    return readme + "".join(p.read_text() for p in sorted((ROOT / "docs").glob("*.md")))


def missing(names: set[str], text: str) -> list[str]:
    """Return the names that are not in the text as whole words."""
    return sorted(n for n in names if not re.search(rf"(?<![\w-]){re.escape(n)}(?![\w-])", text))


def commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_every_command_is_documented(readme: str) -> None:
    assert missing({f"geodiag {name}" for name in commands()}, readme) == []


def test_every_option_is_documented(pages: str) -> None:
    options = {
        o for c in commands().values() for p in c.params for o in p.opts if o.startswith("--")
    }
    assert len(options) > 5
    assert missing(options - HIDDEN, pages) == []


def test_every_option_and_argument_has_its_help() -> None:
    for name, command in commands().items():
        assert command.help, name
        for param in command.params:
            assert getattr(param, "help", None) or param.name == "help", f"{name} {param.name}"


def test_every_metric_and_table_is_documented(pages: str) -> None:
    assert missing({name for _, name in METRICS}, pages) == []
    assert missing(set(SCHEMAS), pages) == []


def test_every_kind_of_event_is_documented(pages: str) -> None:
    assert [kind for kind in KINDS if f"`{kind}`" not in pages] == []


def test_the_catalogue_page_is_the_registry_printed() -> None:
    page = ROOT / "docs/metrics.md"
    assert page.read_text() == catalogue.page(), "run make docs"


def test_the_tree_in_the_readme_is_the_tree(readme: str) -> None:
    drawn = set(re.findall(r"^(?:[│├└─ ]*)([a-z_]+)/", readme, flags=re.MULTILINE))
    hidden = {"build", "dist", "exports", "runs"}
    real = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith((".", "_"))}
    real = {n for n in real if not n.endswith(".egg-info")} - hidden
    assert real - drawn == set(), "folders that the drawing lacks"
    top = set(re.findall(r"^(?:[├└]── )?([a-z_]+)/", readme, flags=re.MULTILINE))
    assert top - real == set(), "folders in the drawing that do not exist"


def test_what_is_missing_would_be_reported() -> None:
    text = "Run `geodiag show RUN --json` to see `loss`, then geodiag spikes-all."
    assert missing({"geodiag show", "--json", "loss", "geodiag spikes", "--js", "los"}, text) == [
        "--js",
        "geodiag spikes",
        "los",
    ]


def test_the_readme_stays_short(readme: str) -> None:
    assert len(readme.splitlines()) <= 180


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
