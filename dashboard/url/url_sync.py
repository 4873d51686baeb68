"""Callbacks that write every control, drag and click of a page into the query string.

The address is the only state. Charts and controls are set from it, so that a copied link, the back
button and a zoom on another page all lead to the same view.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dash import Dash, Input, Output, State, ctx, no_update

from geodiag.dashboard.data.grid import row_name
from geodiag.dashboard.url.url_state import View, apply_zoom

_NEWEST = 20
"""A slider this close to the newest step of a live run follows it and is not a choice."""


class Control(NamedTuple):
    """A component whose `value` is one field of the view."""

    field: str
    default: Any = None
    """Value while nothing is chosen, or a function of (pathname, view) that returns it."""


OnClick = Callable[[str, View, str, dict], View]
"""(pathname, view, graph id, clicked point) → the view after the click."""


def sync_url(
    app: Dash,
    controls: Mapping[str, Control],
    graphs: Sequence[str],
    clicked: OnClick | None = None,
) -> None:
    """Connect the controls and charts of a page with the address, in both directions."""

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
    def update_url(values, drags, clicks, search, pathname):
        view = View.parse(search)
        moved = view
        # Drags first: a double click is also a click, but only its range counts.
        for prop in sorted(
            (e["prop_id"] for e in ctx.triggered), key=lambda p: not p.endswith(".relayoutData")
        ):
            if not (prop.endswith(".clickData") and moved.steps != view.steps):
                moved = _after_event(prop, moved, pathname, values, drags, clicks)
        return moved.query_string() if moved != view else no_update

    if controls:
        _follow(app, controls)

    def _after_event(
        prop_id: str, view: View, pathname: str, values: list, drags: list, clicks: list
    ) -> View:
        """Return the view after one action of the reader."""
        name, _, prop = prop_id.rpartition(".")
        if name in controls:
            value = values[list(controls).index(name)]
            return _with_value(view, controls[name], value, pathname)
        if prop == "relayoutData":
            return apply_zoom(view, drags[graphs.index(name)])
        points = (clicks[graphs.index(name)] or {}).get("points") if prop == "clickData" else None
        return clicked(pathname, view, name, points[0]) if clicked and points else view


def _follow(app: Dash, controls: Mapping[str, Control]) -> None:
    """Set the controls from the address."""

    @app.callback(
        output=[Output(name, "value") for name in controls],
        inputs={
            "search": Input("url", "search"),
            "values": [State(name, "value") for name in controls],
            "pathname": State("url", "pathname"),
        },
        prevent_initial_call=True,
    )
    def follow(search, values, pathname):
        values_now = [_component_value(View.parse(search), c, pathname) for c in controls.values()]
        return [
            no_update if new in (old, None) else new
            for new, old in zip(values_now, values, strict=True)
        ]


def _with_value(view: View, control: Control, value: Any, pathname: str) -> View:
    """Return the view after a control was set to `value`; a default is not a choice."""
    shown = _component_value(view, control, pathname)
    if value is None or value == shown:
        return view
    if control.field == "step" and view.step is None and abs(value - shown) <= _NEWEST:
        return view
    default = _component_value(view.replaced(**{control.field: None}), control, pathname)
    converted = _FROM_COMPONENT.get(control.field, str)(value)
    return view.replaced(**{control.field: None if value == default else converted})


def _component_value(view: View, control: Control, pathname: str) -> Any:
    """Return the value that the component shows for this view."""
    value = getattr(view, control.field)
    if value is None:
        return control.default(pathname, view) if callable(control.default) else control.default
    return _TO_COMPONENT[control.field](value) if control.field in _TO_COMPONENT else value


_FROM_COMPONENT: dict[str, Callable[[Any], Any]] = {
    "layer": int,
    "step": int,
    "site": lambda name: View.parse(f"?site={name}").site,
}
_TO_COMPONENT: dict[str, Callable[[Any], str]] = {"layer": str, "site": row_name}
