"""What the commands print with: one console, JSON for programs, numbers for people."""

import json
import math
from typing import Any

from rich.console import Console

from geodiag.errors import GeodiagError

STATUS_STYLE = {"running": "green", "finished": "blue", "failed": "red", "interrupted": "yellow"}


def screen() -> Console:
    """Where people read, lines never folded; made when used, so that it follows a redirected stdout."""
    return Console(highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """One JSON document on stdout, nothing else."""
    print(json.dumps(data, indent=2, allow_nan=False))


def print_error(error: GeodiagError) -> None:
    """One red line on stderr, never folded: a path in it can be copied."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"geodiag: {error}", style="bold red", markup=False)


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
    return f"{value:.4g}" + (f" {unit}" if unit not in ("", "1", "score") else "")


def place(layer: int | None, site: str | None = None, expert: int | None = None) -> str:
    """`layer 3 ffn`, `layer 3 expert 5`."""
    parts = [] if layer is None else [f"layer {layer}"]
    parts += [site] if site else []
    parts += [] if expert is None else [f"expert {expert}"]
    return " ".join(parts)
