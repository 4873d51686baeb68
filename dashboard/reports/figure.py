"""One figure in two themes: the light figure, and the changes that make it the dark one."""

import json
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go

from geodiag.dashboard.figures.style import THEMES, Theme

Change = tuple[list[str | int], Any]
"""A path into the figure, and the new value there."""


def light_and_dark(make: Callable[[Theme], go.Figure]) -> dict[str, Any]:
    """Return `figure` (light) and `dark` (the changes for dark), both without the template."""
    light, dark = (json.loads(make(THEMES[name]).to_json()) for name in ("light", "dark"))
    for figure in (light, dark):
        figure["layout"].pop("template", None)
    return {"figure": light, "dark": differences(light, dark)}


def template() -> Any:
    """Return Plotly's template, which is the same for all figures of a page."""
    return json.loads(go.Figure().to_json())["layout"]["template"]


def differences(old: Any, new: Any, at: tuple[str | int, ...] = ()) -> list[Change]:
    """Return the changes from `old` to `new`; lists of numbers or texts change as a whole."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [c for k in old for c in differences(old[k], new[k], (*at, k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and _objects(old):
        return [
            c
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for c in differences(a, b, (*at, i))
        ]
    return [] if old == new else [(list(at), new)]


def _objects(items: list) -> bool:
    return any(isinstance(i, dict) for i in items)
