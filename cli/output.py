"""Output of the commands: tables and prose for people, JSON for programs."""

import json
import math
from textwrap import TextWrapper
from typing import Any

from rich.console import Console
from rich.text import Text

from geodiag.errors import GeodiagError

STATUS_STYLE = {"running": "green", "finished": "blue", "failed": "red", "interrupted": "yellow"}


_UNLIMITED_WIDTH = 10_000
"""Width for a pipe or a file, where lines are never folded or cut."""

_PROSE_WIDTH = 100
"""Largest width of prose on a wide terminal; longer lines are hard to read."""


def screen() -> Console:
    """Return a console on the current stdout that folds no lines."""
    console = Console(highlight=False, soft_wrap=True)
    if console.is_terminal:
        return console
    return Console(highlight=False, soft_wrap=True, width=_UNLIMITED_WIDTH)


def prose(words: str, indent: int = 0) -> Text:
    """Return sentences for `screen().print`: folded on a terminal, one line in a pipe."""
    console = screen()
    width = min(console.width, _PROSE_WIDTH) if console.is_terminal else _UNLIMITED_WIDTH
    margin = " " * indent
    # No word is broken, so that a path stays in one piece.
    wrapper = TextWrapper(width, margin, margin, break_long_words=False, break_on_hyphens=False)
    return Text(wrapper.fill(words))


def print_json(data: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(data, indent=2, allow_nan=False))


def print_error(error: GeodiagError) -> None:
    """Print the error as one red line on stderr, not folded, so that a path can be copied."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"geodiag: {error}", style="bold red", markup=False
    )


def number(value: float | None, unit: str = "") -> str:
    """Return e.g. `×1.23`, `4.5 %`, `12.3 s`; a dash for None, words for NaN and infinity."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        if math.isnan(value):
            return "NaN"
        return "infinite" if value > 0 else "minus infinite"
    if unit == "share":
        return f"{100 * value:.3g} %"
    if unit == "×":
        return f"×{value:.4g}"
    shown = f"{value + 0.0:.4g}"  # + 0.0 turns -0.0 into 0
    return shown if unit in ("", "1", "score") else f"{shown} {unit}"


def place(layer: int | None, site: str | None = None, expert: int | None = None) -> str:
    """Return e.g. `layer 3 ffn` or `layer 3 expert 5`."""
    parts = []
    if layer is not None:
        parts.append(f"layer {layer}")
    if site:
        parts.append(site)
    if expert is not None:
        parts.append(f"expert {expert}")
    return " ".join(parts)
