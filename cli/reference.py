"""The command line as a page: docs/cli.md, printed from the commands so that the two cannot differ.

`make docs` writes it; a test compares.
"""

import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from typer.models import ArgumentInfo, OptionInfo, ParameterInfo
from typer.utils import get_params_from_function

from geodiag.cli.bench import BENCHES
from geodiag.cli.main import app

_INTRODUCTION = """\
# The command line

Printed from `cli/` by `make docs`; `geodiag COMMAND --help` prints the same.

Commands that read a run take `--json` and then print JSON only. A mistake of the user is one line
on stderr that names the fix, and exit code 1. Ctrl-C is exit code 130. `geodiag --version` prints
the version; `-h` is `--help`.
"""
_BENCH = """\
## geodiag bench NAME

{does}

Each benchmark has options of its own: `geodiag bench NAME --help`.

| name | what it measures |
|---|---|
{rows}
"""


def page() -> str:
    """Return the whole page as Markdown."""
    commands = [(c.callback, c.rich_help_panel) for c in app.registered_commands]
    parts = [_INTRODUCTION, _contents(commands)]
    parts += [_section(command) for command, _ in commands if command is not None]
    parts.append(_benches())
    return "\n".join(parts)


def _contents(commands: list[tuple[Any, Any]]) -> str:
    rows = [f"| `geodiag {c.__name__}` | {_first_line(c)} | {panel} |" for c, panel in commands]
    rows.append(f"| `geodiag bench` | {_bench_help()} | {_bench_panel()} |")
    return "\n".join(["| command | does | group |", "|---|---|---|", *rows, ""])


def _section(command: Callable) -> str:
    """Return one command: its help, its arguments, and a table of options per help panel."""
    parameters = list(_parameters(command))
    arguments = [p for p in parameters if isinstance(p.info, ArgumentInfo)]
    usage = " ".join(p.value if p.required else f"[{p.value}]" for p in arguments)
    parts = [f"## geodiag {command.__name__} {usage}".rstrip(), *_paragraphs(command)]

    if arguments:
        rows = [f"| `{_cell(p.value)}` | {p.default} | {_cell(p.help)} |" for p in arguments]
        parts.append("\n".join(["| argument | default | what it is |", "|---|---|---|", *rows]))

    options = [p for p in parameters if isinstance(p.info, OptionInfo)]
    for panel in dict.fromkeys(p.info.rich_help_panel for p in options):
        rows = [p.row() for p in options if p.info.rich_help_panel == panel]
        head = ["| option | value | default | what it does |", "|---|---|---|---|"]
        table = "\n".join([*head, *rows])
        parts.append(f"### {panel}\n\n{table}" if panel else table)

    return "\n\n".join(parts) + "\n"


def _benches() -> str:
    rows = [f"| `{name}` | {_cell(what)} |" for name, what in BENCHES.items()]
    return _BENCH.format(does=_bench_help(), rows="\n".join(rows))


def _bench_help() -> str:
    (group,) = app.registered_groups
    assert group.typer_instance is not None
    return str(group.typer_instance.info.help)


def _bench_panel() -> str:
    (group,) = app.registered_groups
    return str(group.rich_help_panel)


def _first_line(command: Callable) -> str:
    return _cell(_paragraphs(command)[0])


def _paragraphs(command: Callable) -> list[str]:
    """Return the help of a command, one line a paragraph."""
    return [" ".join(p.split()) for p in (inspect.getdoc(command) or "").split("\n\n")]


class _Parameter:
    """One parameter of a command's function: an argument or an option."""

    def __init__(self, name: str, annotation: Any, info: ParameterInfo) -> None:
        self.info = info
        self.help = info.help or ""
        self.required = info.default is ...
        self._name = name
        self._annotation = annotation

    @property
    def names(self) -> tuple[str, ...]:
        """The spellings of an option, e.g. `--run` and `--run-dir`."""
        written = [d for d in self.info.param_decls or () if d.startswith("-")]
        return tuple(written) or ("--" + self._name.replace("_", "-"),)

    @property
    def value(self) -> str:
        """What follows the option: a placeholder or the choices, with its range; "" for a flag."""
        if self.info.metavar:
            return self.info.metavar
        kind = self._annotation
        if isinstance(self.info, ArgumentInfo):
            return self._name.upper()
        if kind is bool:
            return ""
        if get_origin(kind) is Literal:
            return "|".join(get_args(kind))
        if isinstance(kind, type) and issubclass(kind, Enum):
            return "|".join(str(e.value) for e in kind)
        if kind is Path:
            return "PATH"
        placeholders: dict[Any, str] = {str: "TEXT", list[str]: "TEXT", int: "N", float: "X"}
        return self._in_range(placeholders[kind])

    def _in_range(self, placeholder: str) -> str:
        low = self.info.min
        high = self.info.max
        left = "" if low is None else f"{low:g} ≤ " if high is not None else ""
        right = f" ≤ {high}" if high is not None else f" ≥ {low:g}" if low is not None else ""
        return left + placeholder + right

    @property
    def default(self) -> str:
        """The default as the help shows it; "" where an option that is left out means nothing."""
        if isinstance(self.info.show_default, str):
            return _cell(self.info.show_default)
        if self.required:
            return "required"
        if self.info.default is None:
            return ""
        if isinstance(self.info.default, bool):
            return (
                ("on" if self.info.default else "off") if any("/" in n for n in self.names) else ""
            )
        shown = (
            self.info.default.value if isinstance(self.info.default, Enum) else self.info.default
        )
        return f"`{shown}`"

    def row(self) -> str:
        """Return the option's row of a Markdown table."""
        names = ", ".join(f"`{n}`" for n in self.names)
        value = f"`{_cell(self.value)}`" if self.value else ""
        return f"| {names} | {value} | {self.default} | {_cell(self.help)} |"


def _parameters(command: Callable) -> Iterator[_Parameter]:
    for name, parameter in get_params_from_function(command).items():
        if isinstance(parameter.default, ParameterInfo):
            yield _Parameter(name, _without_none(parameter.annotation), parameter.default)


def _without_none(annotation: Any) -> Any:
    """Return T of `T | None`."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = [a for a in get_args(annotation) if a is not type(None)]
    return annotation


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(page(), end="")
