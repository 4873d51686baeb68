"""docs/cli.md: the page is printed from the commands, and no command or option is missing."""

import typer

from geodiag.cli import reference
from geodiag.cli.bench import BENCHES
from geodiag.cli.main import app
from tests.paths import ROOT

PAGE = ROOT / "docs/cli.md"


def sections(page: str) -> dict[str, str]:
    """The text of each command's section, by the command's name."""
    found = {}
    for part in page.split("\n## geodiag ")[1:]:
        found[part.split()[0]] = part
    return found


def missing(page: str) -> list[str]:
    """Commands without a section, and options that are not in the section of their command."""
    written = sections(page)
    absent = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        options = [o for p in command.params for o in p.opts + p.secondary_opts]
        named = [f"{name} {o}" for o in options if o.startswith("--") and o != "--help"]
        absent += [n for n in named if n.split()[1] not in written.get(name, "")]
        absent += [] if name in written else [name]
    return absent


def test_the_page_is_printed_from_the_commands() -> None:
    assert PAGE.read_text() == reference.page(), "run make docs"


def test_every_command_and_option_is_on_the_page() -> None:
    page = reference.page()
    assert missing(page) == []
    assert [name for name in BENCHES if f"| `{name}` |" not in page] == []


def test_a_missing_option_or_command_is_found() -> None:
    page = reference.page()
    assert missing(page.replace("`--snapshot-every`", "")) == ["train --snapshot-every"]
    assert missing(page.replace("## geodiag doctor", "")) == ["doctor --json", "doctor"]
