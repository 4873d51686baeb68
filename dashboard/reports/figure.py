"""One figure in two looks: the light one whole, and of the dark one only what differs, which is a
few colours.
"""

import json
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go

from geodiag.dashboard.figures.style import THEMES, Theme

Change = tuple[list[str | int], Any]
"""Where in the figure, and the value there."""


def light_and_dark(make: Callable[[Theme], go.Figure]) -> dict[str, Any]:
    """`figure` in light, and `dark`, the changes that make it the dark one. The template is left to
    the page.
    """
    light, dark = (json.loads(make(THEMES[name]).to_json()) for name in ("light", "dark"))
    for figure in (light, dark):
        figure["layout"].pop("template", None)
    return {"figure": light, "dark": differences(light, dark)}


def template() -> Any:
    """What every figure's layout is laid over."""
    return json.loads(go.Figure().to_json())["layout"]["template"]


def differences(old: Any, new: Any, at: tuple[str | int, ...] = ()) -> list[Change]:
    """The changes from `old` to `new`: into objects and lists of objects, other lists as a whole."""
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
