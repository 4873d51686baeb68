"""From a reader's hand to the address: every control, drag and click of a page becomes its query string.

The address is the only state. Charts are drawn from it, so a copied link, the back button and another page's
zoom all show the same thing; the controls follow it too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dash import Dash, Input, Output, State, ctx, no_update

from geodiag.dashboard.view import View, zoomed


class Control(NamedTuple):
    """A component whose `value` is one field of the view, and what the field means when it is absent."""

    field: str
    default: Any = None


Clicked = Callable[[str, View, str, dict], View]
"""(pathname, view, graph id, clicked point) → the view after the click."""


def steer(
    app: Dash,
    controls: Mapping[str, Control],
    graphs: Sequence[str],
    clicked: Clicked | None = None,
) -> None:
    """Joins the page's controls and charts to the address, both ways."""

    @app.callback(
        output=Output("url", "search", allow_duplicate=True),
        inputs={
            "values": [Input(name, "value") for name in controls],
            "drags": [Input(name, "relayoutData") for name in graphs],
            "clicks": [Input(name, "clickData") for name in graphs],
            "search": State("url", "search"),
            "pathname": State("url", "pathname"),
        },
        prevent_initial_call=True,
    )
    def turn(values, drags, clicks, search, pathname):
        view = moved = View.parse(search)
        props = [e["prop_id"] for e in ctx.triggered]
        if any(p.endswith(".relayoutData") for p in props):  # a double click clicks too, and means only the range
            props = [p for p in props if not p.endswith(".clickData")]
        for prop in props:
            moved = _moved(prop, moved, pathname, values, drags, clicks)
        return moved.search() if moved != view else no_update

    @app.callback(
        output=[Output(name, "value") for name in controls],
        inputs={"search": Input("url", "search"), "values": [State(name, "value") for name in controls]},
        prevent_initial_call=True,
    )
    def follow(search, values):
        wanted = [_value(View.parse(search), c) for c in controls.values()]
        return [no_update if w in (v, None) else w for w, v in zip(wanted, values, strict=True)]

    def _moved(prop_id: str, view: View, pathname: str, values: list, drags: list, clicks: list) -> View:
        """The view after one thing that the reader just did."""
        name, _, prop = prop_id.rpartition(".")
        if name in controls:
            field, default = controls[name]
            value = values[list(controls).index(name)]
            said = _value(view, controls[name])
            return view if value == said else view.but(**{field: None if value == default else _typed(field, value)})
        if prop == "relayoutData":
            return zoomed(view, drags[graphs.index(name)])
        points = (clicks[graphs.index(name)] or {}).get("points") if prop == "clickData" else None
        return clicked(pathname, view, name, points[0]) if clicked and points else view


def _value(view: View, control: Control) -> Any:
    """What the component shows for this view; None where only the page itself knows."""
    value = getattr(view, control.field)
    if value is None:
        return control.default
    return str(value) if control.field == "layer" else value


def _typed(field: str, value: Any) -> Any:
    return int(value) if field in ("layer", "step") and value is not None else value
