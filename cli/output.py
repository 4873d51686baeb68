"""What the commands print with: one console, JSON for programs, numbers for people."""

import json
import math
from textwrap import TextWrapper
from typing import Any

from rich.console import Console
from rich.text import Text

from geodiag.errors import GeodiagError

STATUS_STYLE = {"running": "green", "finished": "blue", "failed": "red", "interrupted": "yellow"}


_ANY_WIDTH = 10_000
"""A pipe or a file has no edge: what is read by another program, or by eye later, is never cut."""
_READABLE = 100
"""Longer lines of prose are hard to follow, however wide the terminal."""


def screen() -> Console:
    """Where people read, lines never folded; made when used, so that it follows a redirected
    stdout.
    """
    console = Console(highlight=False, soft_wrap=True)
    return (
        console
        if console.is_terminal
        else Console(highlight=False, soft_wrap=True, width=_ANY_WIDTH)
    )


def prose(words: str, indent: int = 0) -> Text:
    """Sentences: on a terminal broken between words, in a pipe one line."""
    width, edge = (
        min(screen().width, _READABLE) if screen().is_terminal else _ANY_WIDTH,
        " " * indent,
    )
    fold = TextWrapper(
        width, edge, edge, break_long_words=False, break_on_hyphens=False
    )  # a path stays in one piece
    return Text(fold.fill(words))


def print_json(data: Any) -> None:
    """One JSON document on stdout, nothing else."""
    print(json.dumps(data, indent=2, allow_nan=False))


def print_error(error: GeodiagError) -> None:
    """One red line on stderr, never folded: a path in it can be copied."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"geodiag: {error}", style="bold red", markup=False
    )


def number(value: float | None, unit: str = "") -> str:
    """`×1.23`, `4.5 %`, `12.3 s`; a dash where nothing was measured, words where it was no number."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    if unit == "share":
        return f"{100 * value:.3g} %"
    if unit == "×":
        return f"×{value:.4g}"
    return f"{value + 0.0:.4g}" + (f" {unit}" if unit not in ("", "1", "score") else "")


def place(layer: int | None, site: str | None = None, expert: int | None = None) -> str:
    """`layer 3 ffn`, `layer 3 expert 5`."""
    parts = [] if layer is None else [f"layer {layer}"]
    parts += [site] if site else []
    parts += [] if expert is None else [f"expert {expert}"]
    return " ".join(parts)
