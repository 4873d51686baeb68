"""From a reader's hand to the address: every control, drag and click of a page becomes its query
string.

The address is the only state. Charts are drawn from it, so a copied link, the back button and
another page's zoom all show the same thing; the controls follow it too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dash import Dash, Input, Output, State, ctx, no_update

from geodiag.dashboard.data.grid import row_name
from geodiag.dashboard.url.url_state import View, apply_zoom

_NEWEST = 20
"""A slider that was set to the newest step may be so many steps behind a living run: that is not a
choice.
"""


class Control(NamedTuple):
    """A component whose `value` is one field of the view."""

    field: str
    default: Any = None
    """What it shows while the field is not chosen; or a function (pathname, view) that knows."""


OnClick = Callable[[str, View, str, dict], View]
"""(pathname, view, graph id, clicked point) → the view after the click."""


def sync_url(
    app: Dash,
    controls: Mapping[str, Control],
    graphs: Sequence[str],
    clicked: OnClick | None = None,
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
        # Drags first: a double click clicks too, and then means only the range.
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
        """The view after one thing that the reader just did."""
        name, _, prop = prop_id.rpartition(".")
        if name in controls:
            value = values[list(controls).index(name)]
            return _with_value(view, controls[name], value, pathname)
        if prop == "relayoutData":
            return apply_zoom(view, drags[graphs.index(name)])
        points = (clicks[graphs.index(name)] or {}).get("points") if prop == "clickData" else None
        return clicked(pathname, view, name, points[0]) if clicked and points else view


def _follow(app: Dash, controls: Mapping[str, Control]) -> None:
    """The controls show what the address says."""

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
        wanted = [_component_value(View.parse(search), c, pathname) for c in controls.values()]
        return [no_update if w in (v, None) else w for w, v in zip(wanted, values, strict=True)]


def _with_value(view: View, control: Control, value: Any, pathname: str) -> View:
    """The view after a control took `value`; what it shows anyway is no choice."""
    shown = _component_value(view, control, pathname)
    if value is None or value == shown:
        return view
    if control.field == "step" and view.step is None and abs(value - shown) <= _NEWEST:
        return view
    default = _component_value(view.replaced(**{control.field: None}), control, pathname)
    typed = _TYPED.get(control.field, str)(value)
    return view.replaced(**{control.field: None if value == default else typed})


def _component_value(view: View, control: Control, pathname: str) -> Any:
    """What the component shows for this view; None where it shows nothing of its own."""
    value = getattr(view, control.field)
    if value is None:
        return control.default(pathname, view) if callable(control.default) else control.default
    return _SHOWN[control.field](value) if control.field in _SHOWN else value


_TYPED: dict[str, Callable[[Any], Any]] = {
    "layer": int,
    "step": int,
    "site": lambda name: View.parse(f"?site={name}").site,
}
_SHOWN: dict[str, Callable[[Any], str]] = {"layer": str, "site": row_name}
